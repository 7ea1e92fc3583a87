"""What `densityrm doctor` finds on a machine where all is well, and on one where something is not."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from typer.testing import CliRunner

from densityrm_core import hardware
from densityrm_core.experiment import Experiment
from densityrm_core.models.folders import CARD
from densityrm_dagster.commands import main as cli
from densityrm_dagster.commands.doctor import warn
from densityrm_dagster.doctor.examination import examine, warnings
from densityrm_dagster.doctor.lines import Line
from densityrm_dagster.doctor.versions import versions

from ..core.tiny_models import tiny_language_model
from .conftest import TINY

REPOSITORY = Path(__file__).parents[2]
PORTS = ("DENSITYRM_DAGSTER_PORT", "DENSITYRM_MLFLOW_PORT")


def unused() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder and ports of the test's own."""
    for variable in PORTS:
        monkeypatch.setenv(variable, str(unused()))
    monkeypatch.setenv("DENSITYRM_HOME", str(tmp_path / "home"))
    select(tmp_path, monkeypatch, TINY)
    return tmp_path / "home"


def select(folder: Path, monkeypatch: pytest.MonkeyPatch, settings: object) -> None:
    (folder / "experiment.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("DENSITYRM_EXPERIMENT", str(folder / "experiment.yaml"))


def found(subject: str, home: Path, **settings: object) -> Line:
    """What the doctor says of one subject."""
    examined = examine(Experiment.model_validate({**TINY, **settings}), home, probe=False)
    (line,) = [line for line in examined.lines if line.subject == subject]
    return line


@pytest.mark.takes("model files=package")
def test_where_all_is_well_every_line_is_green_and_the_exit_code_0():
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("Everything this experiment needs is here; it takes about ")
    assert "red" not in result.stdout and "yellow" not in result.stdout


@pytest.mark.takes("terminal=no")
def test_json_is_all_that_is_printed_then(monkeypatch: pytest.MonkeyPatch):
    result = CliRunner().invoke(cli.app, ["doctor", "--json", "--no-probe"])
    told = json.loads(result.stdout)
    assert told["worst"] == "green" and result.exit_code == 0
    assert {"colour", "subject", "found", "remedy"} == set(told["lines"][0])
    assert "time" not in [line["subject"] for line in told["lines"]]
    monkeypatch.setenv("DENSITYRM_TERMINAL", "no")
    assert "\x1b" not in CliRunner().invoke(cli.app, ["doctor", "--no-probe"]).stdout


@pytest.mark.takes("terminal=yes")
def test_a_person_sees_colours_and_no_line_that_is_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DENSITYRM_TERMINAL", "yes")
    monkeypatch.setenv("COLUMNS", "120")  # the path of this test's state is one word
    shown = CliRunner().invoke(cli.app, ["doctor", "--no-probe"], color=True).stdout
    assert "\x1b[32m✓\x1b[0m processor" in shown
    for code in ("32", "2", "1", "0"):
        shown = shown.replace(f"\x1b[{code}m", "")
    sections = shown.split("\n\n")[1:-1]
    assert max(len(line) for section in sections for line in section.splitlines()) <= 120


def test_a_taken_port_is_red_and_names_itself_and_the_variable_to_set(monkeypatch: pytest.MonkeyPatch, home: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("DENSITYRM_DAGSTER_PORT", port)
        line = found("Dagster port", home)
        assert line.colour == "red" and f"{port} is taken by process {os.getpid()}, " in line.found
        assert "DENSITYRM_DAGSTER_PORT" in line.remedy
        result = CliRunner().invoke(cli.app, ["doctor", "--no-probe"])
        assert result.exit_code == 1
        assert result.stdout.splitlines()[-1] == "1 red: Dagster port."


def test_before_a_run_a_taken_port_is_only_a_warning(
    monkeypatch: pytest.MonkeyPatch, home: Path, capsys: pytest.CaptureFixture[str]
):
    assert warnings(Experiment.model_validate(TINY), home) == []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("DENSITYRM_MLFLOW_PORT", str(taken.getsockname()[1]))
        warn(Experiment.model_validate(TINY), home)
    said = capsys.readouterr()
    assert not said.out
    assert said.err.startswith("  yellow MLflow port") and "-> set DENSITYRM_MLFLOW_PORT" in said.err


def test_a_port_that_is_no_number_is_red(monkeypatch: pytest.MonkeyPatch, home: Path):
    monkeypatch.setenv("DENSITYRM_MLFLOW_PORT", "five thousand")
    line = found("ports", home)
    assert line.colour == "red" and "DENSITYRM_MLFLOW_PORT" in line.remedy


def test_two_servers_at_one_port_are_red(monkeypatch: pytest.MonkeyPatch, home: Path):
    for variable in PORTS:
        monkeypatch.setenv(variable, "3311")
    assert found("ports", home).found == "both servers have port 3311"


FORCED = [
    ({"device": "cuda"}, "device", "error: compute.device is cuda, but PyTorch sees no GPU; set compute.device to auto or cpu"),
    ({"attention": "flex"}, "attention", "error: compute.attention is flex, which has no backward pass on a processor; set"),
    ({"rollouts": "vllm"}, "rollouts", "error: compute.rollouts is vllm, which is not installed or has no GPU; set"),
]


@pytest.mark.skipif(hardware.driver_is_there(), reason="there is a GPU, where these can be had")
@pytest.mark.parametrize(("compute", "subject", "error"), FORCED, ids=[subject for _, subject, _ in FORCED])
def test_what_cannot_be_had_here_is_red_and_a_demo_refused_before_it_makes_anything(
    monkeypatch: pytest.MonkeyPatch, home: Path, compute: dict[str, str], subject: str, error: str
):
    assert found(subject, home, compute=compute).colour == "red"
    select(home.parent, monkeypatch, {**TINY, "compute": compute})
    result = CliRunner().invoke(cli.app, ["demo"])
    assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith(error)
    assert [path.name for path in (home / "tiny").iterdir()] == ["work.lock"]


def test_a_state_folder_that_cannot_be_made_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DENSITYRM_HOME", str(tmp_path / "file"))
    result = CliRunner().invoke(cli.app, ["demo"])
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"error: {tmp_path / 'file'} cannot be written (Not a directory); set DENSITYRM_HOME to a folder that can"
    ]


def test_a_full_disk_is_red_and_half_a_disk_yellow(monkeypatch: pytest.MonkeyPatch, home: Path):
    monkeypatch.setattr(hardware, "free_disk", lambda _: 100 << 20)
    full = found("disk needed", home)
    assert full.colour == "red" and "100 MiB free" in full.found and "DENSITYRM_HOME" in full.remedy
    monkeypatch.setattr(hardware, "free_disk", lambda _: 300 << 20)
    assert found("disk needed", home).colour == "yellow"
    assert "disk needed" in [line.subject for line in warnings(Experiment.model_validate(TINY), home)]


def test_too_little_memory_is_red_and_names_settings(monkeypatch: pytest.MonkeyPatch, home: Path):
    monkeypatch.setattr(hardware, "available_memory", lambda: 1 << 30)
    line = found("memory needed", home, base_model={"hidden_size": 2048, "layers": 8})
    assert line.colour == "red" and "reward_model.tokens_per_batch" in line.remedy


@pytest.mark.takes("model files=elsewhere")
def test_without_the_packaged_encoder_and_without_network_there_is_a_remedy(
    monkeypatch: pytest.MonkeyPatch, home: Path, tmp_path: Path
):
    monkeypatch.setattr(hardware, "package_folder", lambda _: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    line = found("encoder files", home)
    assert line.colour == "red" and "embedding.model" in line.found
    assert "pip install 'densityrm[offline]'" in line.remedy and "make venv" in line.remedy
    assert line in warnings(Experiment.model_validate(TINY), home)


def test_a_hub_that_does_not_answer_is_yellow(monkeypatch: pytest.MonkeyPatch, home: Path):
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused()}")
    line = found("hh_rlhf", home, **with_path("hf://datasets/owner/name/*.jsonl"))
    assert line.colour == "yellow" and "cannot be reached" in line.found and "sources.hh_rlhf.path" in line.remedy


def test_a_missing_data_folder_is_red_and_names_its_key(home: Path, tmp_path: Path):
    line = found("hh_rlhf", home, **with_path(str(tmp_path / "nowhere")))
    assert line.colour == "red" and "nowhere" in line.found and "sources.hh_rlhf.path" in line.remedy


def test_data_that_are_there_are_counted(home: Path, tmp_path: Path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text("{}\n")
    assert found("hh_rlhf", home, **with_path(str(tmp_path / "rows"))).found.startswith("1 file, ")


def with_path(path: str) -> dict[str, object]:
    return {"sources": {"hh_rlhf": {"path": path}}, "judge": {"kind": "model"}}


@pytest.mark.parametrize(
    ("model", "words"),
    [("./nowhere", "no folder ./nowhere"), ("nowhere.gguf", "no file nowhere.gguf"), (str(REPOSITORY), "holds no model")],
)
def test_a_base_model_that_is_not_there_is_red(home: Path, model: str, words: str):
    line = found("base model", home, base_model={"model": model})
    assert line.colour == "red" and "base_model.model" in line.found and words in line.found


@pytest.mark.takes("precision=bf16")
def test_the_precision_of_a_base_model_that_is_made_is_its_recorded_one(home: Path):
    folder = tiny_language_model(home / "tiny" / "models" / "base_model")
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps({**card, "precision": "bf16"}))
    assert "bf16, recorded with the base model" in found("precision", home).found


@pytest.mark.takes("encoder=float32", "encoder=bfloat16")
def test_the_precision_of_the_encoder_can_be_forced(home: Path):
    for dtype in ("float32", "bfloat16"):
        assert found("encoder", home, embedding={"dtype": dtype}).found.startswith(dtype)


def test_every_choice_names_the_setting_that_forces_it(home: Path):
    examined = examine(Experiment.model_validate(TINY), home, probe=False)
    (used,) = [section for section in examined.sections if section.title == "What will be used"]
    for line in used.lines:
        assert line.found.endswith("]") and "  [" in line.found, line


def test_a_version_off_the_constraints_is_yellow_and_names_both(tmp_path: Path):
    pinned = tmp_path / "constraints.txt"
    pinned.write_text("numpy==0.0.1\n")
    (line,) = [line for line in versions(pinned) if line.colour != "green"]
    assert line.colour == "yellow" and line.subject == "numpy" and line.remedy == "pip install numpy==0.0.1"
    assert "0.0.1" in line.found and hardware.package_folder("numpy") is not None
    (line,) = versions(tmp_path / "absent.txt")
    assert line.colour == "green" and "there is no constraints.txt" in line.found


def test_a_database_that_does_not_open_is_red(home: Path):
    (home / "mlflow").mkdir(parents=True)
    (home / "mlflow" / "mlflow.db").write_bytes(b"no database " * 100)
    line = found("MLflow", home)
    assert line.colour == "red" and "mlflow.db" in line.remedy


def test_a_broken_experiment_file_is_one_message_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    select(tmp_path, monkeypatch, {"reward_model": {"learning_rte": 1}})
    monkeypatch.setattr(sys, "argv", ["densityrm", "doctor"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and "reward_model.learning_rte" in line


def test_what_is_checked_before_a_run_loads_no_heavy_library():
    program = (
        "import sys\n"
        "from densityrm_core.experiment import home, load_experiment\n"
        "from densityrm_dagster.commands.doctor import warn\n"
        "warn(load_experiment(), home())\n"
        "assert not {'torch', 'transformers', 'faiss', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY)  # noqa: S603  our own program


def test_our_own_server_at_a_port_is_no_fault_that_of_another_state_is_one(
    monkeypatch: pytest.MonkeyPatch, home: Path, elsewhere: Callable[[str], int]
):
    port = elsewhere(str(home.parent / "other"))
    monkeypatch.setenv("DENSITYRM_MLFLOW_PORT", str(port))
    line = found("MLflow port", home)
    assert line.colour == "red" and "other" in line.found
    monkeypatch.setenv("DENSITYRM_MLFLOW_PORT", str(elsewhere(str(home))))
    assert found("MLflow port", home).colour == "green"


@pytest.fixture
def elsewhere() -> Iterator[Callable[[str], int]]:
    """Starts a process that answers as MLflow does, on a state folder; gives its port."""
    program = (
        "from http.server import *\n"
        "class Healthy(BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200); self.end_headers(); self.wfile.write(b'OK')\n"
        "server = HTTPServer(('127.0.0.1', 0), Healthy); print(server.server_port, flush=True); server.serve_forever()"
    )
    started: list[subprocess.Popen[str]] = []

    def start(state: str) -> int:
        process = subprocess.Popen(  # noqa: S603  our own program
            [sys.executable, "-c", program],
            env={"DENSITYRM_HOME": state},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        return int(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.communicate()
