"""The command line: `densityrm demo` runs an experiment, `densityrm up` opens its interfaces."""

import os
import sys
import time

import typer
from dagster._core.errors import DagsterExecutionInterruptedError  # what Ctrl-C becomes inside a run; exported nowhere else

from densityrm_core.experiment import ExperimentError, home, load_experiment
from densityrm_dagster.cli_data import export_nanochat, import_nanochat, inspect
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
    experiment = load_experiment()
    root = home()
    prepare_home(root, experiment.name)
    from densityrm_dagster.run import RunFailedError, describe_sources, run_experiment

    started = time.monotonic()
    print(f"experiment {experiment.name}, seeds {', '.join(map(str, experiment.seeds))}, state in {root}\n", file=sys.stderr)
    try:
        made = [run_experiment(seed, experiment, root) for seed in experiment.seeds]
    except RunFailedError as failure:
        for reason in failure.reasons:
            print(f"error: {reason}", file=sys.stderr)
        raise typer.Exit(1) from None
    except (KeyboardInterrupt, DagsterExecutionInterruptedError):
        print("\ninterrupted; the same command goes on where this one stopped", file=sys.stderr)
        raise typer.Exit(130) from None
    if not any(made):
        print("everything is up to date; this is the verdict of the last run", file=sys.stderr)
    report = root / experiment.name / "reports" / "hypothesis_report"
    print("\n" + describe_sources(experiment) + "\n")
    print((report / "report.txt").read_text(encoding="utf-8"))
    print(f"report   {report / 'report.md'}")
    print(f"took     {(time.monotonic() - started) / 60:.1f} minutes")
    print("look     make up    (opens the Dagster and MLflow interfaces on this state)")


@app.command()
def up() -> None:
    """Start the Dagster interface with its daemon, and the MLflow interface, on loopback; Ctrl-C stops all."""
    in_use = prepare_home(home(), load_experiment().name)
    from densityrm_dagster.servers import serve

    raise typer.Exit(serve(home(), in_use))


for command in (inspect, export_nanochat, import_nanochat):
    app.command()(command)


@app.command()
def check() -> None:
    """Say whether the experiment file is valid, and which one it is."""
    experiment = load_experiment()
    file = os.environ.get("DENSITYRM_EXPERIMENT") or "built-in"
    print(f"{file}: experiment {experiment.name}, fingerprint {experiment.fingerprint}")
