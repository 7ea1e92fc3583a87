"""A small planted experiment, run once for all tests of the graph."""

from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest

from densityrm_core.experiment import Experiment
from densityrm_dagster.build import build_definitions

TINY = {
    "name": "tiny",
    "seeds": [0, 1],
    "planted": {"hh_rows": 150, "ultrafeedback_rows": 150, "stack_exchange_questions": 60},
    "base_model": {"hidden_size": 32, "layers": 1, "steps": 10, "vocab_size": 600},
    "reward_model": {"steps": 10, "evaluate_every": 5},
    "grpo": {"steps": 3},
    "evaluation": {"prompts": 20, "samples": 2, "bootstrap": 200},
}


@dataclass(frozen=True)
class Run:
    experiment: Experiment
    root: Path
    definitions: dg.Definitions
    instance: dg.DagsterInstance
    result: dg.ExecuteInProcessResult

    def metadata(self, asset: str) -> dict[str, dg.MetadataValue]:
        """Metadata of an asset's latest materialization."""
        event = self.instance.get_latest_materialization_event(dg.AssetKey(asset))
        assert event is not None and event.asset_materialization is not None, f"{asset} was not materialized"
        return dict(event.asset_materialization.metadata)

    def again(self, *assets: str, **options: object) -> dg.ExecuteInProcessResult:
        """Materialize some assets once more."""
        job = self.definitions.resolve_job_def("run_experiment")
        return job.execute_in_process(
            instance=self.instance, partition_key="0", asset_selection=[dg.AssetKey(a) for a in assets], **options
        )


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("home")
    experiment = Experiment.model_validate(TINY)
    definitions = build_definitions(experiment, root)
    instance = dg.DagsterInstance.ephemeral(tempdir=str(root))
    result = definitions.resolve_job_def("run_experiment").execute_in_process(instance=instance, partition_key="0")
    return Run(experiment, root, definitions, instance, result)
