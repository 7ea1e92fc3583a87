"""The command line: `densityrm demo` runs an experiment, `densityrm up` opens its interfaces."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import typer
from dagster._core.errors import DagsterExecutionInterruptedError  # what Ctrl-C becomes inside a run; exported nowhere else

from densityrm_core.experiment import Experiment, ExperimentError, home, load_experiment
from densityrm_core.files import lock
from densityrm_dagster.commands.chat import chat
from densityrm_dagster.commands.doctor import doctor, warn
from densityrm_dagster.commands.score import score
from densityrm_dagster.commands.tables import explain, export_nanochat, import_nanochat, inspect
from densityrm_dagster.services import prepare_home

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Does sampling preference pairs by 1/density help?")


def main() -> None:
    """Run a command; a wrong experiment file is one message and exit code 2, never a traceback."""
    try:
        app()
    except ExperimentError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


@app.command()
def demo() -> None:
    """Run the experiment for every seed and print the verdict; what is up to date is not made again."""
    experiment, root, started = load_experiment(), home(), time.monotonic()
    _materialize(experiment, root, experiment.seeds)
    report = root / experiment.name / "reports" / "hypothesis_report"
    print((report / "report.txt").read_text(encoding="utf-8"))
    print(f"report   {report / 'report.md'}")
    print(f"took     {(time.monotonic() - started) / 60:.1f} minutes")
    print("look     make up    (opens the Dagster and MLflow interfaces on this state)")


@app.command()
def read() -> None:
    """Read the raw rows into pairs and prompts, without embedding or training anything, and print what became of them."""
    experiment, root = load_experiment(), home()
    from densityrm_dagster.groups import data_assets

    _materialize(experiment, root, experiment.seeds[:1], data_assets())
    print(f"tables   {root / experiment.name / 'tables'}\nlook     densityrm inspect")


@app.command()
def reward_models() -> None:
    """Train and evaluate both reward models for every seed, without policies, and print what the test split says of them."""
    experiment, root, started = load_experiment(), home(), time.monotonic()
    from densityrm_dagster.groups import reward_model_steps

    _materialize(experiment, root, experiment.seeds, reward_model_steps())
    from densityrm_dagster.cards.reward_models import evaluation_text

    print(evaluation_text(root / experiment.name / "tables" / "rm_evaluation", experiment))
    print(f"took     {(time.monotonic() - started) / 60:.1f} minutes")


def _materialize(experiment: Experiment, root: Path, seeds: Sequence[int], only: frozenset[str] | None = None) -> None:
    state = root / experiment.name
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: {root} cannot be written ({error.strerror}); set DENSITYRM_HOME to a folder that can", file=sys.stderr)
        raise typer.Exit(1) from None
    if not lock(os.open(state / "work.lock", os.O_RDWR | os.O_CREAT, 0o644)):  # held until this process ends
        print(f"error: another command is at work in {state}; wait for it, or set another DENSITYRM_HOME", file=sys.stderr)
        raise typer.Exit(1)
    warn(experiment, root)
    _refuse_impossible(experiment, only)
    prepare_home(root, experiment.name)
    from densityrm_dagster.commands.run import RunFailedError, describe_sources, run_experiment

    print(f"experiment {experiment.name}, seeds {', '.join(map(str, seeds))}, state in {root}\n", file=sys.stderr)
    try:
        made = [run_experiment(seed, experiment, root, only) for seed in seeds]
    except RunFailedError as failure:
        for reason in failure.reasons:
            print(f"error: {reason}", file=sys.stderr)
        raise typer.Exit(1) from None
    except (KeyboardInterrupt, DagsterExecutionInterruptedError):
        print("\ninterrupted; the same command goes on where this one stopped", file=sys.stderr)
        raise typer.Exit(130) from None
    if not any(made):
        print("everything is up to date; nothing was made again", file=sys.stderr)
    print("\n" + describe_sources(experiment) + "\n")


def _refuse_impossible(experiment: Experiment, only: frozenset[str] | None) -> None:
    """End before anything is made if what the experiment forces cannot be had here, and these assets need it."""
    from densityrm_core.hardware import driver_is_there
    from densityrm_dagster.doctor.machine import impossible

    needed = {"device", "attention"} if only is None or "base_model" in only else set[str]()
    needed |= {"rollouts"} if only is None else set[str]()
    hopeless = [line for line in impossible(experiment.compute, driver_is_there()) if line.subject in needed]
    for line in hopeless:
        print(f"error: {line.found}; {line.remedy}", file=sys.stderr)
    if hopeless:
        raise typer.Exit(1)


@app.command()
def up() -> None:
    """Start the Dagster interface with its daemon, and the MLflow interface, on loopback; Ctrl-C stops all."""
    in_use = prepare_home(home(), load_experiment().name)
    from densityrm_dagster.commands.servers import serve

    raise typer.Exit(serve(home(), in_use))


for command in (doctor, inspect, explain, export_nanochat, import_nanochat, score, chat):
    app.command()(command)


@app.command()
def check() -> None:
    """Say whether the experiment file is valid, and which one it is."""
    experiment = load_experiment()
    file = os.environ.get("DENSITYRM_EXPERIMENT") or "built-in"
    print(f"{file}: experiment {experiment.name}, fingerprint {experiment.fingerprint}")
