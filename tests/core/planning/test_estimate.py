"""What an experiment needs and how long it takes, before it runs."""

from pathlib import Path

import pytest
import torch

from densityrm_core.experiment import Experiment
from densityrm_core.models.base_model import scratch_model
from densityrm_core.models.folders import load_causal_lm
from densityrm_core.models.shapes import Shape, shape_of
from densityrm_core.planning.estimate import Estimate, Lengths, TooLargeError, Units, estimate, lengths_of, probe
from densityrm_core.planning.needs import disk_needed, memory_needed, training_needed
from densityrm_core.settings import BaseModelSettings

from ..models.test_base_models import write_gguf
from ..tiny_models import TEXTS, tiny_language_model

NOWHERE = Path("nowhere")
SMALL = Shape(width=32, layers=2, vocabulary=300, heads=1, key_value_heads=1, head_width=32, inner=96)
LENGTHS = Lengths(prompt=12, reply=8, validation=50, test=100)
SHORT = Experiment.model_validate({"grpo": {"max_new_tokens": 4}, "evaluation": {"samples": 1}})


def test_the_size_of_a_model_is_known_before_it_is_built():
    settings = BaseModelSettings(vocab_size=300, hidden_size=64, layers=2)
    shape = shape_of(settings, NOWHERE)
    model, _ = scratch_model(TEXTS * 5, settings)
    assert shape is not None and shape.vocabulary == model.config.vocab_size
    assert shape.parameters == pytest.approx(model.num_parameters(), rel=0.01)


def test_a_folder_and_a_gguf_file_tell_their_shape(tmp_path: Path):
    folder = tiny_language_model(tmp_path / "tiny")
    shape = shape_of(BaseModelSettings(model=str(folder)), NOWHERE)
    assert shape is not None and shape.width == 32
    assert shape.parameters == pytest.approx(load_causal_lm(folder).num_parameters(), rel=0.02)
    file = shape_of(BaseModelSettings(model=str(write_gguf(tmp_path / "tiny.gguf"))), NOWHERE)
    assert file is not None and file.layers >= 1 and file.vocabulary > 100


@pytest.mark.parametrize("model", ["owner/not-on-this-machine", "nowhere.gguf", "./nowhere"])
def test_the_shape_of_a_model_that_is_not_here_is_not_known(model: str):
    assert shape_of(BaseModelSettings(model=model), NOWHERE) is None


def test_seeds_and_arms_need_disk_and_what_is_made_needs_none(tmp_path: Path):
    one, two = (disk_needed(SHORT.model_copy(update={"seeds": seeds}), SMALL, tmp_path, None).bytes for seeds in ((0,), (0, 1)))
    assert two - one == 7 * SMALL.weights  # two reward models, each registered too, and three arms
    for name in ("base_model", "rm_uniform/0", "rm_density/0", "grpo_a/0", "grpo_b/0", "grpo_c/0"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "pair_weights.parquet").touch()
    assert disk_needed(SHORT.model_copy(update={"seeds": (0,)}), SMALL, tmp_path, None).bytes == 0


def test_a_search_takes_no_more_memory_than_it_may():
    little = SHORT.model_copy(update={"compute": SHORT.compute.model_copy(update={"max_memory_gib": 0.5})})
    assert memory_needed(little, SMALL, None, on_gpu=True).parts["the search for neighbours"] == 2**29
    assert memory_needed(SHORT, SMALL, None, on_gpu=True).bytes > memory_needed(SHORT, SMALL, 1000, on_gpu=True).bytes


def test_rows_of_the_planted_world_say_how_long_its_texts_are():
    lengths = lengths_of(SHORT, NOWHERE)
    assert 14 <= lengths.prompt <= 24 and 10 <= lengths.reply <= 18  # 17.6 and 12.2 by its tokenizer


def test_of_rows_that_nobody_has_read_half_of_the_longest_is_taken():
    real = Experiment.model_validate({"sources": {"hh_rlhf": {"path": "rows.jsonl"}}, "judge": {"kind": "model"}})
    assert (lengths_of(real, NOWHERE).prompt, lengths_of(real, NOWHERE).reply) == (48, 16)


def test_each_unit_of_work_takes_time_and_a_deep_model_more():
    threads = torch.get_num_threads()
    shallow = probe(SHORT, SMALL, LENGTHS, "cpu", "fp32", 2**30)
    deep = probe(SHORT, Shape(**{**vars(SMALL), "layers": 60}), LENGTHS, "cpu", "fp32", 2**30)
    assert min(vars(shallow).values()) > 0
    assert deep.prefer > 3 * shallow.prefer
    assert torch.get_num_threads() == threads


def test_a_model_that_is_too_large_for_a_probe_is_refused():
    with pytest.raises(TooLargeError, match="3 of its 30 layers"):
        probe(SHORT, Shape(4096, 30, 100_000, 32, 32, 128, 11_000), LENGTHS, "cpu", "fp32", 2**30)


def test_twice_the_seeds_take_almost_twice_as_long_and_one_processor_longer_than_two():
    units = Units(tune=0.2, prefer=0.1, score=0.001, improve=0.3, look=0.2, examine=0.6)
    three, six = (estimate(SHORT.model_copy(update={"seeds": tuple(range(n))}), units, LENGTHS, 5000, 2).seconds for n in (3, 6))
    assert 1.5 * three < six < 2 * three
    assert estimate(SHORT, units, LENGTHS, 5000, 1).seconds > 1.3 * three


@pytest.mark.parametrize(
    ("seconds", "text"), [(450, "about 6 to 9 minutes"), (40, "about 32 to 48 seconds"), (20_000, "about 4 to 7 hours")]
)
def test_an_estimate_is_said_as_a_range(seconds: float, text: str):
    assert str(Estimate(seconds)) == text


def test_a_frozen_half_of_the_layers_needs_less_memory():
    half = SHORT.model_copy(update={"reward_model": SHORT.reward_model.model_copy(update={"frozen_layers": 4})})
    deep = Shape(**{**vars(SMALL), "width": 512, "layers": 8, "inner": 1536})
    no_tuning = {"base_model": SHORT.base_model.model_copy(update={"steps": 0})}
    whole, frozen = (training_needed(each.model_copy(update=no_tuning), deep) for each in (SHORT, half))
    assert frozen < whole


def test_a_damaged_gguf_file_has_no_shape(tmp_path: Path):
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    for number, content in enumerate((whole[:100], b"GGML" + whole[4:])):
        (tmp_path / f"{number}.gguf").write_bytes(content)
        assert shape_of(BaseModelSettings(model=str(tmp_path / f"{number}.gguf")), NOWHERE) is None
