"""What the options of a reward model's training do, each against its slow or obvious twin."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from densityrm_core.density.tempering import temper_weights
from densityrm_core.models.base_model import train_base_model
from densityrm_core.models.folders import CARD, ModelError, common_precision, load_codec, new_reward_model, save_model
from densityrm_core.reward_models.loss import bradley_terry_loss, centering_penalty, relative_lead, targets_of
from densityrm_core.reward_models.scoring import tokenize_pairs
from densityrm_core.reward_models.train import (
    RewardModelTask,
    TrainedRewardModel,
    batches_of,
    preference_loss,
    train_reward_model,
)
from densityrm_core.sampling import IidSampler, uniform_weights
from densityrm_core.settings import BaseModelSettings, ComputeSettings, DensitySettings, RewardModelSettings
from densityrm_core.training.checkpoints import CheckpointFolder
from densityrm_core.training.loop import TrainingStoppedError, Watch
from densityrm_core.training.precision import resolve_precision
from densityrm_core.training.ranks import SOLO

PAIRS = 60
SETTINGS = RewardModelSettings(steps=6, pairs_per_step=8, evaluate_every=2, learning_rate=3e-3)


@pytest.fixture(scope="module")
def pairs() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    words = ["tomato", "bicycle", "violin", "teapot", "lamp", "river"]
    rows = [
        {
            "context": [{"role": "user", "content": " ".join(rng.choice(words, 1 + i % 4))}],
            "chosen": "Sure: " + " ".join(rng.choice(words, 1 + i % 3)),
            "rejected": "No " + " ".join(rng.choice(words, 1 + i % 5)),
            "score_chosen": None if i % 3 == 0 else 2.0 + i % 4,
            "score_rejected": None if i % 3 == 0 else 1.0,
            "src": "ab"[i % 2],
        }
        for i in range(PAIRS)
    ]
    return pl.DataFrame(rows, schema_overrides={"score_chosen": pl.Float32, "score_rejected": pl.Float32})


@pytest.fixture(scope="module")
def base(pairs: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model, codec, _ = train_base_model(pairs, BaseModelSettings(vocab_size=300, hidden_size=32, layers=2, steps=0), Watch())
    save_model(model, codec, folder, {})
    return folder


def train(base: Path, pairs: pl.DataFrame, watch: Watch | None = None, compute: dict | None = None, **changes: object):
    settings = RewardModelSettings.model_validate({**SETTINGS.model_dump(), **changes})
    resources = ComputeSettings.model_validate(compute or {})
    task = RewardModelTask(base, pairs, np.arange(1.0, PAIRS + 1), pairs.head(20), settings, 0, compute=resources)
    return train_reward_model(task, watch or Watch())


def weights_of(trained: TrainedRewardModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in trained.model.named_parameters()}


def test_the_loss_is_the_cross_entropy_of_a_soft_label_under_a_margin():
    chosen, rejected = torch.tensor([1.0, -2.0, 0.3]), torch.tensor([0.0, 3.0, 0.3])
    margin, label, weight = torch.tensor([0.5, 0.0, 1.0]), torch.tensor([1.0, 0.8, 0.5]), torch.tensor([1.0, 2.0, 0.5])
    p = torch.sigmoid(chosen - rejected - margin)
    naive = (-weight * (label * p.log() + (1 - label) * (1 - p).log())).mean()
    assert bradley_terry_loss(chosen, rejected, margin=margin, label=label, weight=weight).item() == pytest.approx(naive.item())


def test_centering_pulls_the_sum_of_two_rewards_to_zero():
    assert centering_penalty(torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 1.0])).item() == pytest.approx(4.5)


def test_leads_are_relative_to_their_sources_mean_and_absent_scores_ask_nothing(pairs: pl.DataFrame):
    lead = relative_lead(pairs)
    assert np.isnan(lead[::3]).all()
    for source in "ab":
        assert np.nanmean(lead[(pairs["src"] == source).to_numpy()]) == pytest.approx(1, abs=1e-6)
    settings = RewardModelSettings(score_margin=0.5, label_smoothing=0.1)
    targets = targets_of(pairs, np.ones(PAIRS), settings)
    assert targets.margin[0] == 0
    assert targets.margin[1].item() == pytest.approx(0.5 * lead[1])
    assert targets.label.unique().tolist() == pytest.approx([0.9])
    soft = targets_of(pairs, np.ones(PAIRS), RewardModelSettings(soft_labels=2.0))
    assert soft.label[0] == 1
    assert soft.label[1].item() == pytest.approx(1 / (1 + np.exp(-2 * lead[1])))


def test_importance_correction_leaves_the_gradient_of_uniform_sampling_unbiased(base: Path, pairs: pl.DataFrame):
    """10^4 draws by uneven weights: the mean of the corrected gradients is the uniform one, coordinate by coordinate."""
    model, train = new_reward_model(base, seed=0), tokenize_pairs(pairs, load_codec(base))
    weights = np.random.default_rng(0).lognormal(0, 1, PAIRS)
    settings = RewardModelSettings(importance_correction=True, tokens_per_batch=100_000)
    corrected, plain = targets_of(pairs, weights, settings), targets_of(pairs, weights, RewardModelSettings())

    def gradients(targets) -> np.ndarray:
        found = []
        for i in range(PAIRS):
            (batch,) = batches_of(train, np.array([i]), 100_000, SOLO)
            model.zero_grad()
            preference_loss(model, batch, targets, settings, "fp32")[0].backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()])[::97].double().numpy())
        return np.stack(found)

    uniform, draws = gradients(plain).mean(0), IidSampler(weights, 10_000, seed=1).draw(np.arange(10_000))

    def furthest(drawn: np.ndarray) -> float:
        """From the uniform gradient, in standard errors."""
        error = drawn.std(0) / np.sqrt(len(drawn))
        return np.abs((drawn.mean(0) - uniform)[error > 0] / error[error > 0]).max()

    assert furthest(gradients(corrected)[draws]) < 5
    assert furthest(gradients(plain)[draws]) > 10


def test_uniform_density_weights_train_the_uniform_reward_model(base: Path, pairs: pl.DataFrame):
    """At an effective sample fraction of 1 every weight is 1/n, so the two trainings draw alike and end in the same bits."""
    log_density, ones = np.random.default_rng(0).normal(0, 1, PAIRS), np.ones(PAIRS, np.int64)
    solved = temper_weights(log_density, ones, DensitySettings(target_ess=1.0), ones).weights
    models = [
        train_reward_model(RewardModelTask(base, pairs, w, pairs.head(20), SETTINGS, 0), Watch())
        for w in (solved, uniform_weights(PAIRS))
    ]
    one, other = map(weights_of, models)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_frozen_layers_keep_the_weights_of_the_base(base: Path, pairs: pl.DataFrame):
    trained, first = weights_of(train(base, pairs, frozen_layers=1)), load_file(base / "model.safetensors")
    same = {name for name, value in first.items() if name in trained and torch.equal(trained[name], value)}
    assert {name for name in trained if "layers.0." in name or "embed_tokens" in name} == same


def test_more_frozen_layers_than_there_are_is_an_error(base: Path, pairs: pl.DataFrame):
    with pytest.raises(ModelError, match="frozen_layers is 3, but the model has 2 layers"):
        train(base, pairs, frozen_layers=3)


def test_low_rank_updates_end_in_a_plain_model_whose_embeddings_did_not_move(base: Path, pairs: pl.DataFrame):
    trained, first = weights_of(train(base, pairs, lora_rank=4)), load_file(base / "model.safetensors")
    assert set(trained) == set(weights_of(train(base, pairs)))
    moved = {name for name, value in first.items() if name in trained and not torch.equal(trained[name], value)}
    assert moved == {name for name in first if "proj" in name}
    change = trained["model.layers.0.mlp.up_proj.weight"] - first["model.layers.0.mlp.up_proj.weight"]
    assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 4


def test_recomputed_activations_change_nothing(base: Path, pairs: pl.DataFrame):
    plain, recomputed = weights_of(train(base, pairs)), weights_of(train(base, pairs, compute={"gradient_checkpointing": True}))
    assert max(float((plain[name] - recomputed[name]).abs().max()) for name in plain) < 1e-5


@pytest.mark.takes("precision=fp32", "precision=bf16", "device=cpu", "ranks=alone", "compile=off")
def test_bfloat16_trains_nearly_as_float32(base: Path, pairs: pl.DataFrame):
    full, half = Watch(), Watch()
    train(base, pairs, full, {"precision": "fp32"})
    trained = train(base, pairs, half, {"precision": "bf16"})
    assert trained.model.dtype == torch.float32
    assert half.points[0][1]["train/loss"] == pytest.approx(full.points[0][1]["train/loss"], abs=0.02)
    assert half.points[0][1]["train/loss"] != full.points[0][1]["train/loss"]


@pytest.mark.parametrize(
    ("kind", "width", "expected"),
    [
        ("cpu", 4096, "fp32"),
        ("cpu-avx512-bf16", 384, "bf16"),
        ("cpu-amx", 383, "fp32"),
        ("cuda", 4096, "fp32"),
        ("cuda-bf16", 576, "bf16"),
        ("cuda-bf16", 128, "fp32"),
    ],
)
def test_precision_follows_from_the_device_and_the_width(kind: str, width: int, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("densityrm_core.hardware.device_kind", lambda device: kind)
    assert resolve_precision("auto", "cpu", width) == expected
    assert [resolve_precision(wanted, "cpu", width) for wanted in ("fp32", "bf16")] == ["fp32", "bf16"]


def test_all_that_starts_from_a_base_model_has_its_precision_wherever_it_is_trained(
    base: Path, pairs: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(base, tmp_path / "base")
    card = json.loads((base / CARD).read_text())
    (tmp_path / "base" / CARD).write_text(json.dumps({**card, "precision": "bf16"}))
    monkeypatch.setattr("densityrm_core.hardware.device_kind", lambda device: "cpu")
    assert train(tmp_path / "base", pairs).card["precision"] == "bf16"
    assert train(tmp_path / "base", pairs, compute={"precision": "fp32"}).card["precision"] == "fp32"
    assert train(base, pairs).card["precision"] == "fp32"  # a base model of before: the rule


def test_models_of_two_precisions_are_not_compared(base: Path, pairs: pl.DataFrame, tmp_path: Path):
    for precision in ("fp32", "bf16"):
        trained = train(base, pairs, compute={"precision": precision})
        save_model(trained.model, trained.codec, tmp_path / precision, trained.card)
    assert common_precision([base, tmp_path / "bf16", tmp_path]) == "bf16"  # what has no record, or is no model, says nothing
    with pytest.raises(ModelError, match=r"was trained in fp32, .* in bf16: .* compute.precision"):
        common_precision([tmp_path / "fp32", tmp_path / "bf16"])


@pytest.mark.parametrize("stored", [False, True], ids=["in memory", "beside checkpoints"])
def test_the_weights_of_the_lowest_validation_loss_are_kept(base: Path, pairs: pl.DataFrame, stored: bool, tmp_path: Path):
    watch = Watch(folder=CheckpointFolder(tmp_path) if stored else None)
    overfit = {"steps": 12, "learning_rate": 0.3, "warmup": 0.0, "max_grad_norm": 1e6}
    trained = train(base, pairs, watch, **overfit)
    losses = {at // 8: metrics["eval/loss"] for at, metrics in watch.points if "eval/loss" in metrics}
    assert trained.step == min(losses, key=lambda step: (losses[step], step))
    assert trained.metrics["eval/loss"] == losses[trained.step]
    stopped_there = train(base, pairs, Watch(), **{**overfit, "keep": "last"})
    assert stopped_there.step == 12


def test_the_best_weights_of_before_a_stop_are_found_again(base: Path, pairs: pl.DataFrame, tmp_path: Path):
    seen: list[int] = []
    options = {"steps": 12, "learning_rate": 0.3, "warmup": 0.0, "max_grad_norm": 1e6}
    watch = Watch(folder=CheckpointFolder(tmp_path, every=1), should_stop=lambda: len(seen) == 4)
    watch.report = lambda step, plan, metrics: seen.append(step)
    with pytest.raises(TrainingStoppedError):
        train(base, pairs, watch, **options)
    gone_on = train(base, pairs, Watch(folder=CheckpointFolder(tmp_path, every=1)), **options)
    undisturbed = train(base, pairs, **options)
    assert gone_on.step == undisturbed.step
    one, other = weights_of(gone_on), weights_of(undisturbed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_margin_of_scores_and_soft_labels_train(base: Path, pairs: pl.DataFrame):
    plain, margin, soft = (
        weights_of(train(base, pairs, **options)) for options in ({}, {"score_margin": 1.0}, {"soft_labels": 1.0})
    )
    assert not torch.equal(plain["score.weight"], margin["score.weight"])
    assert not torch.equal(plain["score.weight"], soft["score.weight"])
