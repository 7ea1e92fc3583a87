"""Packed rows equal the padded computation, tokens are tokens everywhere, a loop stops, fails and repeats as it should."""

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from densityrm_core.models.base_model import train_base_model
from densityrm_core.models.folders import load_causal_lm, load_codec, load_reward_model, new_reward_model, save_model
from densityrm_core.models.likelihood import log_probs
from densityrm_core.models.packing import pack, rewards
from densityrm_core.reward_models.loss import bradley_terry_loss, correctness
from densityrm_core.reward_models.scoring import tokenize_pairs
from densityrm_core.reward_models.train import RewardModelTask, train_reward_model
from densityrm_core.settings import BaseModelSettings, ComputeSettings, RewardModelSettings
from densityrm_core.training.loop import Plan, TrainingError, TrainingStoppedError, Watch, learning_rate_at, optimize

SETTINGS = BaseModelSettings(vocab_size=400, hidden_size=32, layers=2, steps=40, batch_size=16, max_reply_tokens=16)


@pytest.fixture(scope="module")
def pairs() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    nouns, good, bad = ["tomato", "bicycle", "violin"], ["Sure, water it.", "Okay, oil it."], ["No.", "Why would you ask that?"]
    rows = [
        {
            "prompt_id": f"{i % 30:016x}",
            "context": [{"role": "user", "content": f"How do I fix my {nouns[i % 3]} number {i % 30}?"}],
            "chosen": str(rng.choice(good)),
            "rejected": str(rng.choice(bad)),
        }
        for i in range(120)
    ]
    return pl.DataFrame(rows)


@pytest.fixture(scope="module")
def base(pairs: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model, codec, _ = train_base_model(pairs, SETTINGS, Watch())
    save_model(model, codec, folder, {})
    return folder


@pytest.fixture(scope="module")
def reward_model(base: Path, pairs: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rm")
    settings = RewardModelSettings(steps=30, pairs_per_step=16, evaluate_every=10, learning_rate=3e-3)
    trained = train_reward_model(RewardModelTask(base, pairs, np.ones(120), pairs.head(40), settings, 0), Watch())
    save_model(trained.model, trained.codec, folder, {})
    return folder


def test_packed_rewards_equal_the_models_own_padded_forward(base: Path, pairs: pl.DataFrame):
    model, codec = new_reward_model(base, seed=0).eval(), load_codec(base)
    tokens = tokenize_pairs(pairs.head(12), codec)
    packed = rewards(model, pack([(t.prompt, [t.chosen, t.rejected]) for t in tokens]))
    rows = [t.prompt + reply for t in tokens for reply in (t.chosen, t.rejected)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [codec.pad] * (width - len(row)) for row in rows])
    padded = model(input_ids=ids, attention_mask=(ids != codec.pad).long()).logits.squeeze(-1)
    assert packed.detach() == pytest.approx(padded.detach(), abs=1e-5)


def test_packed_gradients_equal_the_padded_computation(base: Path, pairs: pl.DataFrame):
    model, codec = new_reward_model(base, seed=0), load_codec(base)
    tokens = tokenize_pairs(pairs.head(12), codec)

    def gradient(groups: list) -> torch.Tensor:
        model.zero_grad()
        r = rewards(model, pack(groups)).view(-1, 2)
        bradley_terry_loss(r[:, 0], r[:, 1]).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    shared = gradient([(t.prompt, [t.chosen, t.rejected]) for t in tokens])
    alone = gradient([(t.prompt, [reply]) for t in tokens for reply in (t.chosen, t.rejected)])
    assert (shared - alone).norm() / alone.norm() < 1e-5


def test_changing_one_branch_leaves_its_sibling_alone(base: Path):
    model = new_reward_model(base, seed=0).eval()
    first, second = (rewards(model, pack([([5, 6, 7], [branch, [9, 10, 11]])])) for branch in ([20, 21], [30]))
    assert first[1].item() == pytest.approx(second[1].item(), abs=1e-6)


def test_log_probs_equal_the_full_softmax(base: Path):
    model, codec = load_causal_lm(base).eval(), load_codec(base)
    prompt, replies = codec.prompt([{"role": "user", "content": "How?"}]), [codec.reply("Sure, water it."), codec.reply("No.")]
    packed = log_probs(model, pack([(prompt, replies)]))
    plain = []
    for reply in replies:
        logits = model(torch.tensor([prompt + reply])).logits[0].log_softmax(-1)
        plain += [logits[len(prompt) + i - 1, token].item() for i, token in enumerate(reply)]
    assert packed.tolist() == pytest.approx(plain, abs=1e-5)


def test_every_reply_ends_with_end_of_sequence_even_when_cut(base: Path):
    codec = load_codec(base)
    ids = codec.reply("word " * 100)
    assert len(ids) == SETTINGS.max_reply_tokens
    assert ids[-1] == codec.eos


def test_a_long_context_keeps_its_end(base: Path):
    codec = load_codec(base)
    long, short = (codec.prompt([{"role": "user", "content": text}]) for text in ("word " * 200 + "end?", "end?"))
    assert len(long) == SETTINGS.max_prompt_tokens
    assert long[-3:] == short[-3:]


def test_a_trained_reward_model_loads_without_this_project_and_ranks_pairs(reward_model: Path, pairs: pl.DataFrame):
    model, codec = load_reward_model(reward_model).eval(), load_codec(reward_model)
    tokens = tokenize_pairs(pairs, codec)
    r = rewards(model, pack([(t.prompt, [t.chosen, t.rejected]) for t in tokens])).view(-1, 2)
    assert (r[:, 0] > r[:, 1]).float().mean() > 0.9


def test_training_repeats_bit_for_bit_with_its_seed(base: Path, pairs: pl.DataFrame):
    settings = RewardModelSettings(steps=5, pairs_per_step=8, evaluate_every=5)
    tasks = [RewardModelTask(base, pairs, np.ones(120), pairs.head(8), settings, seed) for seed in (0, 0, 1)]
    states = [torch.cat([p.flatten() for p in train_reward_model(task, Watch()).model.parameters()]) for task in tasks]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_bradley_terry_loss_is_the_negative_log_likelihood():
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 3.0])
    expected = -(torch.sigmoid(chosen - rejected).log()).mean()
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx(expected.item())


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="shape"):
        bradley_terry_loss(torch.zeros(4), torch.zeros(4, 1))


def test_a_tie_counts_half():
    assert correctness(torch.tensor([1.0, 0.0, -1.0])).tolist() == [1.0, 0.5, 0.0]


def test_a_loss_that_is_not_finite_names_its_step():
    model = torch.nn.Linear(1, 1)
    with pytest.raises(TrainingError, match="step 3 of 5"):
        optimize(model, Plan(5, 1, 1e-3), Watch(), lambda step: [(model.weight.sum() / (0.0 if step == 2 else 1.0), {})])


def test_a_run_asked_to_stop_stops_before_its_next_step():
    model, steps = torch.nn.Linear(1, 1), []

    def parts_at(step: int):
        steps.append(step)
        return [(model.weight.sum() ** 2, {})]

    with pytest.raises(TrainingStoppedError):
        optimize(model, Plan(9, 1, 1e-3), Watch(should_stop=lambda: len(steps) == 4), parts_at)
    assert steps == [0, 1, 2, 3]


def test_the_learning_rate_warms_up_and_falls_to_nearly_zero():
    plan = Plan(100, 1, 1.0, warmup=0.1)
    rates = [learning_rate_at(step, plan) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=0.01)
    assert max(rates) == pytest.approx(rates[9], abs=0.02)
    assert rates[-1] < 0.001


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles for the CPU with g++, which is not installed")
@pytest.mark.takes("compile=on", "compile=off")
def test_compiled_layers_train_as_plain_ones_do(base: Path, pairs: pl.DataFrame):
    settings = RewardModelSettings(steps=2, pairs_per_step=8, learning_rate=1e-3)
    watches = [Watch(), Watch()]
    for watch, compiled in zip(watches, (False, True), strict=True):
        compute = ComputeSettings(device="cpu", compile=compiled)
        train_reward_model(RewardModelTask(base, pairs, np.ones(120), pairs.head(0), settings, 0, compute=compute), watch)
    plain, compiled = (watch.frame()["value"].to_numpy() for watch in watches)
    assert compiled == pytest.approx(plain, abs=1e-4)


@pytest.mark.takes("precision=bf16", "precision=fp32", "attention=flex_eager")
def test_a_base_model_is_tuned_in_the_precision_and_by_the_attention_that_are_asked_for(pairs: pl.DataFrame):
    few = SETTINGS.model_copy(update={"steps": 3})
    found: list[tuple[str, float]] = []
    for compute in ({}, {"precision": "bf16"}, {"attention": "flex_eager"}):
        watch = Watch()
        trained = train_base_model(pairs, few, watch, ComputeSettings(device="cpu", **compute))
        assert trained.model.dtype == torch.float32
        found.append((trained.card["precision"], watch.last("train/loss")))
    (plain, loss), (coarse, near), (flex, same) = found
    assert (plain, coarse, flex) == ("fp32", "bf16", "fp32")
    assert near == pytest.approx(loss, abs=0.05) and near != loss
    assert same == pytest.approx(loss, abs=1e-4)


def test_a_step_in_parts_is_the_step_as_a_whole(base: Path, pairs: pl.DataFrame):
    def trained(tokens: int) -> tuple[torch.Tensor, pl.DataFrame]:
        settings = RewardModelSettings(steps=3, pairs_per_step=16, tokens_per_batch=tokens, learning_rate=1e-3, evaluate_every=3)
        watch = Watch()
        trained = train_reward_model(RewardModelTask(base, pairs.head(40), np.ones(40), pairs.head(8), settings, 0), watch)
        return torch.cat([p.detach().flatten() for p in trained.model.parameters()]), watch.frame()

    (whole, metrics), (parts, others) = trained(100_000), trained(100)
    assert (whole - parts).abs().max() < 1e-4
    assert others["value"].to_numpy() == pytest.approx(metrics["value"].to_numpy(), abs=1e-4)
