"""The command line: `densityrm demo` runs an experiment, `densityrm up` opens its interfaces."""

import os
import sys
import time

import typer

from densityrm_core.experiment import ExperimentError, home, load_experiment
from densityrm_dagster.services import prepare_home

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Does sampling preference pairs by 1/density help?")


def main() -> None:
    """Run a command; a wrong experiment file is one message and exit code 2, never a traceback."""
    try:
        app()
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@app.command()
def demo() -> None:
    """Run the experiment for every seed and print the verdict; what is up to date is not made again."""
    experiment = load_experiment()
    root = home()
    prepare_home(root)
    from densityrm_dagster.run import describe_sources, run_experiment

    started = time.monotonic()
    print(f"experiment {experiment.name}, seeds {', '.join(map(str, experiment.seeds))}, state in {root}\n", file=sys.stderr)
    for seed in experiment.seeds:
        failures = run_experiment(seed)
        if failures:
            for failure in failures:
                print(f"error: {failure}", file=sys.stderr)
            raise typer.Exit(1)
    report = root / experiment.name / "reports" / "hypothesis_report"
    print("\n" + describe_sources(experiment) + "\n")
    print((report / "report.txt").read_text(encoding="utf-8"))
    print(f"report   {report / 'report.md'}")
    print(f"took     {(time.monotonic() - started) / 60:.1f} minutes")
    print("look     make up    (opens the Dagster and MLflow interfaces on this state)")


@app.command()
def up() -> None:
    """Start the Dagster interface with its daemon, and the MLflow interface, on loopback; Ctrl-C stops all."""
    load_experiment()
    prepare_home(home())
    from densityrm_dagster.servers import serve

    raise typer.Exit(serve(home()))


@app.command()
def check() -> None:
    """Say whether the experiment file is valid, and which one it is."""
    experiment = load_experiment()
    file = os.environ.get("DENSITYRM_EXPERIMENT") or "built-in"
    print(f"{file}: experiment {experiment.name}, fingerprint {experiment.fingerprint}")
