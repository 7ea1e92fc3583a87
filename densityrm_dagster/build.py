"""One experiment -> all Dagster definitions. Tests build their own from their own experiment."""

from pathlib import Path

import dagster as dg

from densityrm_core.experiment import Experiment, home
from densityrm_dagster.assets.density import density_assets
from densityrm_dagster.assets.evaluation import evaluation_assets
from densityrm_dagster.assets.models import model_assets
from densityrm_dagster.assets.pairs import pair_assets
from densityrm_dagster.assets.policies import policy_assets
from densityrm_dagster.assets.report import report_assets
from densityrm_dagster.assets.reward_models import reward_model_assets
from densityrm_dagster.automation import automation_sensor, source_sensor, weekly_schedule
from densityrm_dagster.checks import density_checks
from densityrm_dagster.io_managers import FolderIOManager, ParquetIOManager
from densityrm_dagster.jobs import build_jobs
from densityrm_dagster.launch import guarded_experiment
from densityrm_dagster.services import tracking_uri, urls
from densityrm_dagster.terminal import terminal_logger
from densityrm_dagster.tracking.mirror import MLflowTracker


def build_definitions(experiment: Experiment, root: Path | None = None) -> dg.Definitions:
    """Assets, checks, jobs, schedule and resources of `experiment`, its state under `root` (default: DENSITYRM_HOME)."""
    root = root or home()
    state = root / experiment.name
    address = urls()
    assets = [
        *pair_assets(experiment, root / "raw", state / "shards"),
        *density_assets(experiment, state / "vectors"),
        *model_assets(experiment, root / "converted"),
        *reward_model_assets(experiment),
        *policy_assets(experiment),
        *evaluation_assets(experiment, root / "raw" / "hub"),
        *report_assets(experiment),
    ]
    jobs = build_jobs(experiment)
    return dg.Definitions(
        assets=assets,
        asset_checks=density_checks(),
        jobs=list(jobs.values()),
        schedules=[weekly_schedule(experiment, jobs["run_experiment"])],
        sensors=[automation_sensor(), source_sensor(experiment, root / "raw")],
        resources={
            "experiment": guarded_experiment(experiment),
            "tables": ParquetIOManager(folder=str(state / "tables")),
            "folders": FolderIOManager(folder=str(state / "models")),
            "reports": FolderIOManager(folder=str(state / "reports")),
            "mlflow": MLflowTracker(
                tracking_uri=tracking_uri(root),
                artifacts=str(root / "mlflow" / "artifacts"),
                ui_url=address.mlflow,
                dagster_url=address.dagster,
            ),
        },
        loggers={"terminal": terminal_logger},
    )
