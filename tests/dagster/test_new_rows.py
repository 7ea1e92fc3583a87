"""A source that grew is noticed, read for what is new, and carried on only if its content changed."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from densityrm_core.experiment import Experiment
from densityrm_dagster.build import build_definitions
from densityrm_dagster.commands.run import stored_under
from densityrm_dagster.freshness import changed_sources, outdated
from densityrm_dagster.groups import data_assets


@dataclass(frozen=True)
class State:
    root: Path
    files: Path
    experiment: Experiment
    definitions: dg.Definitions
    instance: dg.DagsterInstance

    def read(self, *assets: str) -> dg.ExecuteInProcessResult:
        graph = self.definitions.resolve_asset_graph()
        keys = [key for key in graph.get_all_asset_keys() if key.to_user_string() in (assets or data_assets())]
        job = self.definitions.resolve_job_def("run_experiment")
        return job.execute_in_process(instance=self.instance, partition_key="0", asset_selection=keys)

    def outdated(self) -> set[str]:
        found = outdated(self.instance, self.definitions, "0", stored_under(self.root / "grown"))
        return {key.to_user_string() for key in found} & data_assets()

    def changed(self) -> set[str]:
        return set(changed_sources(self.instance, self.experiment, self.root / "raw"))

    def requested(self) -> dg.RunRequest | None:
        sensor = self.definitions.get_sensor_def("source_files")
        context = dg.build_sensor_context(instance=self.instance, definitions=self.definitions)
        requests = sensor.evaluate_tick(context).run_requests
        return requests[0] if requests else None

    def table(self, name: str) -> pl.DataFrame:
        return pl.read_parquet(self.root / "grown" / "tables" / f"{name}.parquet")


def write(path: Path, first: int, count: int) -> None:
    turns = (f"\n\nHuman: Tell me about topic {i * 7919 % 10007} and {i}\n\nAssistant:" for i in range(first, first + count))
    path.write_text("".join(json.dumps({"chosen": f"{t} Yes.", "rejected": f"{t} No."}) + "\n" for t in turns))


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    files = tmp_path / "files"
    files.mkdir()
    write(files / "b.jsonl", 0, 200)
    off = {"enabled": False}
    sources = {"hh_rlhf": {"path": str(files)}, "ultrafeedback": off, "stack_exchange": off}
    experiment = Experiment.model_validate({"name": "grown", "sources": sources, "judge": {"kind": "model"}})
    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path)) as instance:
        state = State(tmp_path, files, experiment, build_definitions(experiment, tmp_path), instance)
        assert state.read().success
        yield state


def test_nothing_new_asks_for_nothing(state: State):
    assert (state.changed(), state.outdated(), state.requested()) == (set(), set(), None)


def test_a_new_file_asks_for_its_source_and_only_new_content_is_carried_on(state: State):
    before = dict(state.table("prompts").select("prompt", "split").iter_rows())
    write(state.files / "a.jsonl", 200, 100)
    request = state.requested()
    assert request is not None
    assert {key.to_user_string() for key in request.asset_selection} == {"hh_rlhf_pairs", "hh_rlhf_rejects"}
    assert request.run_key == state.requested().run_key
    assert state.outdated() == set()
    state.read("hh_rlhf_pairs", "hh_rlhf_rejects")
    assert (state.changed(), state.requested()) == (set(), None)
    assert state.outdated() == {"preference_pairs", "preference_rejects", "prompts"}
    state.read("preference_pairs", "preference_rejects", "prompts")
    after = dict(state.table("prompts").select("prompt", "split").iter_rows())
    assert len(after) == 300
    assert {prompt: after[prompt] for prompt in before} == before


def test_a_file_touched_but_not_changed_is_read_as_before_and_carries_nothing_on(state: State):
    (state.files / "b.jsonl").touch()
    assert state.changed() == {"hh_rlhf"}
    result = state.read("hh_rlhf_pairs", "hh_rlhf_rejects")
    [event] = [e for e in result.get_asset_materialization_events() if e.asset_key == dg.AssetKey("hh_rlhf_pairs")]
    assert "earlier" in event.materialization.metadata["files"].value
    assert (state.changed(), state.outdated()) == (set(), set())


def test_a_source_that_went_away_asks_for_a_run_that_will_say_so(state: State):
    (state.files / "b.jsonl").unlink()
    assert state.requested() is not None


def test_a_lost_table_is_made_again(state: State):
    (state.root / "grown" / "tables" / "preference_pairs.parquet").unlink()
    assert {"preference_pairs", "prompts"} <= state.outdated()
    assert "hh_rlhf_pairs" not in state.outdated()


def test_knobs_of_the_union_leave_the_sources_alone(state: State):
    sources = {**state.experiment.sources.model_dump(), "hh_rlhf": {"path": str(state.files), "weight": 0.5}}
    changed = Experiment.model_validate({**state.experiment.model_dump(), "sources": sources})
    definitions = build_definitions(changed, state.root)
    again = State(state.root, state.files, changed, definitions, state.instance)
    assert again.outdated() == {"preference_pairs", "preference_rejects", "prompts"}
    again.read("preference_pairs", "preference_rejects")
    event = state.instance.get_latest_materialization_event(dg.AssetKey("preference_pairs"))
    card = event.asset_materialization.metadata
    removed = 200 - card["pairs"].value
    assert 0.3 < removed / 200 < 0.7
    assert f"| sources.*.weight | hh_rlhf 0.5 | {removed} |" in card["knobs"].value
