"""Policies climb their reward, stay inside their budget, and whatever comes up has a stated outcome."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from densityrm_core.models.base_model import scratch_model
from densityrm_core.models.folders import ModelError, load_causal_lm, load_codec, save_model
from densityrm_core.models.tokens import Codec
from densityrm_core.policies.decoding import Decoding
from densityrm_core.policies.engines import TransformersEngine
from densityrm_core.policies.experience import Collector
from densityrm_core.policies.grpo import PolicyTask, train_policy
from densityrm_core.policies.questions import Questions
from densityrm_core.policies.rewards import FunctionRewarder, ModelRewarder, RewardScale, load_rewarder, scale_of
from densityrm_core.policies.rollout import sample_completions
from densityrm_core.policies.watch import sequence_kl
from densityrm_core.sampling import SystematicSampler
from densityrm_core.settings import BaseModelSettings, ComputeSettings, GrpoSettings
from densityrm_core.training.checkpoints import CheckpointFolder
from densityrm_core.training.loop import TrainingError, TrainingStoppedError, Watch
from densityrm_core.training.precision import Precision
from tests.core.tiny_models import TEXTS, tiny_language_model, tiny_reward_model

QUICK = {"prompts_per_step": 4, "group_size": 8, "max_new_tokens": 8, "evaluate_every": 50, "warmup": 0.0}
FREE = {"kl_coefficient": 0.0, "kl_budget": None}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def reward_model(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_reward_model(tmp_path_factory.mktemp("rm"), base)


@pytest.fixture(scope="module")
def prompts() -> pl.DataFrame:
    return prompts_of(*(f"What is number {i}?" for i in range(12)))


def prompts_of(*texts: str) -> pl.DataFrame:
    rows = [
        {
            "prompt_id": f"{i:016x}",
            "prompt": text,
            "context": [{"role": "user", "content": text}],
            "weight": 1.0,
            "decile": 1 + i % 10,
            "quartile": 1 + i % 4,
        }
        for i, text in enumerate(texts)
    ]
    return pl.DataFrame(rows, schema_overrides={"decile": pl.Int8, "quartile": pl.Int8})


def share_of_a(_contexts: Sequence[Any], replies: Sequence[str]) -> list[float]:
    """The share of a given token, the letter a, with or without a space before it."""
    written = [reply.replace(" ", "") for reply in replies]
    return [reply.count("a") / max(1, len(reply)) for reply in written]


def nothing(_contexts: Sequence[Any], replies: Sequence[str]) -> list[float]:
    return [0.5] * len(replies)


def task(
    base: Path, prompts: pl.DataFrame, reward: Any, seed: int = 0, compute: ComputeSettings | None = None, **settings: Any
) -> PolicyTask:
    asked = GrpoSettings(**{**QUICK, **settings})
    return PolicyTask(base, reward, prompts, prompts.head(4), asked, seed, compute=compute or ComputeSettings())


def weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def points(watch: Watch, metric: str) -> list[float]:
    return [metrics[metric] for _, metrics in watch.points if metric in metrics]


GSPO = {"ratio": "sequence", "loss_average": "completion", "inner_epochs": 2, "clip_low": 0.5, "clip_high": 0.5}


@pytest.mark.parametrize("how", [{}, {"advantage": "none", "loss_average": "token"}, GSPO])
def test_a_bandit_is_solved_to_95_percent_within_200_steps(base: Path, prompts: pl.DataFrame, how: dict[str, Any]):
    trained = train_policy(task(base, prompts, share_of_a, steps=100, learning_rate=1e-2, **FREE, **how), Watch())
    before, after = (trained.completions.filter(step=step)["own_reward"].mean() for step in (0, 100))
    assert before < 0.1
    assert after > 0.95


BF16 = ComputeSettings(device="cpu", precision="bf16")


@pytest.mark.takes("precision=bf16", "rollouts=transformers", "device=cpu")
def test_in_bfloat16_a_bandit_is_solved_too(base: Path, prompts: pl.DataFrame):
    watch = Watch()
    trained = train_policy(
        task(base, prompts, share_of_a, compute=BF16, steps=60, learning_rate=1e-2, log_every=10, **FREE), watch
    )
    before, after = (trained.completions.filter(step=step)["own_reward"].mean() for step in (0, 60))
    assert before < 0.1
    assert after > 0.9
    assert trained.model.dtype == torch.float32 and trained.card["precision"] == "bf16"
    assert max(points(watch, "rollout/log_prob_gap")) < 0.05  # a stale copy would be nats away


FLEX = ComputeSettings(device="cpu", attention="flex_eager")


@pytest.mark.parametrize(("compute", "off_by"), [(BF16, 0.3), (FLEX, 1e-3)], ids=["bf16", "flex"])
def test_other_arithmetic_computes_nearly_the_same_step(
    base: Path, prompts: pl.DataFrame, compute: ComputeSettings, off_by: float
):
    """bfloat16 may sample another token here and there; attention by blocks only rounds otherwise."""
    plain, other = Watch(), Watch()
    train_policy(task(base, prompts, share_of_a, steps=1, kl_coefficient=0.5, log_every=1), plain)
    train_policy(task(base, prompts, share_of_a, compute=compute, steps=1, kl_coefficient=0.5, log_every=1), other)
    for metric in ("train/grad_norm", "reward/mean", "completions/tokens"):
        assert points(other, metric) == pytest.approx(points(plain, metric), rel=off_by, abs=off_by / 10)


def test_without_a_spread_of_rewards_nothing_moves(base: Path, prompts: pl.DataFrame):
    watch = Watch()
    trained = train_policy(task(base, prompts, nothing, steps=3, kl_coefficient=1.0, learning_rate=0.1, log_every=1), watch)
    assert torch.equal(weights(trained.model), weights(load_causal_lm(base)))
    assert points(watch, "groups/dropped") == [4.0] * 3


def test_with_one_update_a_rollout_the_ratio_is_exactly_one(base: Path, prompts: pl.DataFrame, monkeypatch: pytest.MonkeyPatch):
    from densityrm_core.policies import grpo

    ratios: list[bool] = []
    whole = grpo.policy_loss

    def observed(current: torch.Tensor, entropy: Any, sampled: Any, *rest: Any) -> Any:
        ratios.append(bool(((current - sampled.old).exp() == 1).all()))
        return whole(current, entropy, sampled, *rest)

    monkeypatch.setattr(grpo, "policy_loss", observed)
    train_policy(task(base, prompts, share_of_a, steps=3, learning_rate=1e-2), Watch())
    assert ratios
    assert all(ratios)
    ratios.clear()
    train_policy(task(base, prompts, share_of_a, steps=3, learning_rate=1e-2, inner_epochs=2), Watch())
    assert ratios[0]
    assert not all(ratios)


def test_a_policy_climbs_its_reward_model(base: Path, reward_model: Path, prompts: pl.DataFrame):
    watch = Watch()
    train_policy(task(base, prompts, reward_model, steps=40, learning_rate=4e-3, **FREE), watch)
    assert points(watch, "reward/mean")[-1] > points(watch, "reward/mean")[0] + 0.5


def test_training_ends_once_the_kl_budget_is_spent_and_keeps_weights_inside_it(base: Path, prompts: pl.DataFrame):
    settings = GrpoSettings(
        **{**QUICK, "steps": 150, "learning_rate": 5e-3, "kl_coefficient": 0.0, "kl_budget": 2.0, "evaluate_every": 2}
    )
    trained = train_policy(PolicyTask(base, share_of_a, prompts, prompts, settings, 0), Watch())
    assert trained.stopped_by_kl
    assert 0 < trained.kept_step < trained.steps < 150
    at = trained.completions.filter(step=trained.kept_step)
    assert at["kl"].mean() <= 2.0
    codec = load_codec(base)
    ids = [codec.prompt(context) for context in prompts["context"].to_list()]
    groups = sample_completions(trained.model, ids, codec.eos, 8, Decoding(8), 99).groups
    assert sequence_kl(trained.model, load_causal_lm(base).eval(), ids, groups, settings).mean() < 2.0


def test_a_budget_passed_at_once_leaves_the_base_policy(base: Path, prompts: pl.DataFrame):
    trained = train_policy(
        task(base, prompts, share_of_a, steps=60, learning_rate=0.05, kl_coefficient=0, kl_budget=1e-6), Watch()
    )
    assert trained.stopped_by_kl
    assert trained.kept_step == 0
    assert torch.equal(weights(trained.model), weights(load_causal_lm(base)))


def test_the_penalty_keeps_a_policy_near_its_reference(base: Path, prompts: pl.DataFrame):
    given = [
        task(base, prompts, share_of_a, steps=30, learning_rate=2e-2, kl_budget=None, kl_coefficient=beta) for beta in (0.0, 2.0)
    ]
    drift = [train_policy(one, Watch()).completions.filter(step=30)["kl"].mean() for one in given]
    assert drift[1] < 0.3 * drift[0]


def test_an_adaptive_penalty_rises_while_kl_is_above_its_target(base: Path, prompts: pl.DataFrame):
    watch = Watch()
    given = task(base, prompts, share_of_a, steps=30, learning_rate=1e-2, kl_budget=None, kl_target=0.01, kl_coefficient=0.1)
    train_policy(given, watch)
    assert points(watch, "kl/coefficient")[-1] > points(watch, "kl/coefficient")[0]


def test_the_same_seed_gives_the_same_bits_and_another_others(base: Path, prompts: pl.DataFrame):
    ends = [train_policy(task(base, prompts, share_of_a, seed, steps=4), Watch()) for seed in (0, 0, 1)]
    assert torch.equal(weights(ends[0].model), weights(ends[1].model))
    assert ends[0].completions.equals(ends[1].completions)
    assert not torch.equal(weights(ends[0].model), weights(ends[2].model))


def test_a_step_in_batches_is_the_step_as_a_whole(base: Path, prompts: pl.DataFrame):
    whole, parts = (
        weights(train_policy(task(base, prompts, share_of_a, steps=2, tokens_per_batch=most), Watch()).model)
        for most in (100_000, 64)
    )
    assert (whole - parts).abs().max() < 1e-5


@pytest.mark.parametrize(("updates", "precision"), [(1, "fp32"), (2, "fp32"), (1, "bf16")])
def test_stopped_and_run_again_it_ends_in_the_same_bits(
    base: Path, prompts: pl.DataFrame, tmp_path: Path, updates: int, precision: Precision
):
    how = {"steps": 9, "evaluate_every": 3, "log_every": 2, "inner_epochs": updates, "kl_target": 1.0}
    given = task(base, prompts, share_of_a, compute=ComputeSettings(device="cpu", precision=precision), **how)
    straight, watch = Watch(), Watch(folder=CheckpointFolder(tmp_path, every=2))
    expected = train_policy(given, straight)
    asked = iter([False] * 5 + [True])
    watch.should_stop = lambda: next(asked)
    with pytest.raises(TrainingStoppedError, match="stopped before step 6 of 9"):
        train_policy(given, watch)
    again = Watch(folder=CheckpointFolder(tmp_path, every=2))
    trained = train_policy(given, again)
    assert torch.equal(weights(trained.model), weights(expected.model))
    assert trained.completions.equals(expected.completions)
    assert again.frame().equals(straight.frame())


def test_the_watched_prompts_are_answered_before_and_after(base: Path, prompts: pl.DataFrame):
    trained = train_policy(task(base, prompts, share_of_a, steps=7, evaluate_every=3), Watch())
    assert trained.completions["step"].unique().sort().to_list() == [0, 3, 6, 7]
    assert trained.completions.filter(step=0)["kl"].abs().max() < 1e-4
    assert trained.completions.height == 4 * 4


def test_nothing_needs_to_be_watched(base: Path, prompts: pl.DataFrame):
    given = PolicyTask(base, share_of_a, prompts, prompts.head(0), GrpoSettings(steps=2, **QUICK), 0)
    assert train_policy(given, Watch()).completions.is_empty()


def collector(base: Path, reward: Any, prompts: pl.DataFrame, **settings: Any) -> Collector:
    codec, model = load_codec(base), load_causal_lm(base)
    contexts = prompts["context"].to_list()
    questions = Questions(contexts, [codec.prompt(context) for context in contexts])
    samplers = tuple(SystematicSampler(prompts["weight"].to_numpy(), len(prompts), seed) for seed in (0, 1))
    rewarder = FunctionRewarder(codec, RewardScale(0.0, 1.0), reward)
    return Collector(
        TransformersEngine(model, codec.eos), rewarder, questions, samplers, GrpoSettings(**{**QUICK, **settings}), 0
    )


def test_a_completion_without_a_finite_reward_is_left_out_and_counted(base: Path, prompts: pl.DataFrame):
    def broken_once(contexts: Sequence[Any], replies: Sequence[str]) -> list[float]:
        return [float("nan"), *share_of_a(contexts, replies)[1:]]

    experience = collector(base, broken_once, prompts, advantage="none").collect(0)
    assert experience.metrics["reward/not_finite"] == 1
    assert sum(len(batch.advantage) for batch in experience.batches) % 8 in (0, 7)
    assert all(batch.advantage.isfinite().all() for batch in experience.batches)


def test_rewards_that_are_all_not_finite_end_the_training_with_a_reason(base: Path, prompts: pl.DataFrame):
    broken = lambda contexts, replies: [float("inf")] * len(replies)  # noqa: E731  shorter than a def
    with pytest.raises(TrainingError, match="at step 1 the reward model gave no completion a finite reward"):
        train_policy(task(base, prompts, broken, steps=2), Watch())


def test_a_policy_that_never_ends_a_reply_is_cut_counted_and_may_be_masked(base: Path, prompts: pl.DataFrame, tmp_path: Path):
    model, codec = load_causal_lm(base), load_codec(base)
    codec.tokenizer.eos_token = "<|system|>"  # noqa: S105  a token that a chat never ends with
    with torch.no_grad():
        model.get_input_embeddings().weight[codec.tokenizer.eos_token_id] = 0.0
        model.model.norm.weight.mul_(20)
    save_model(model, Codec(codec.tokenizer, 48, 32), tmp_path / "endless", {})
    watch = Watch()
    train_policy(task(tmp_path / "endless", prompts, share_of_a, steps=1), watch)
    assert points(watch, "completions/unfinished")[0] > 0.9
    assert points(watch, "completions/tokens")[0] > 7.5
    experience = collector(tmp_path / "endless", share_of_a, prompts, overlong="mask").collect(0)
    assert experience.completions < 8


def test_groups_without_a_spread_are_replaced_by_those_of_further_prompts(base: Path):
    mixed = prompts_of(*(f"{'Dull' if i % 2 else 'Rich'} {i}?" for i in range(12)))

    def dull_or_rich(contexts: Sequence[Any], replies: Sequence[str]) -> list[float]:
        shares = share_of_a(contexts, [reply + "a" * (number % 3) for number, reply in enumerate(replies)])
        return [s if c[0]["content"].startswith("Rich") else 0.0 for c, s in zip(contexts, shares, strict=True)]

    plain, resampled = (collector(base, dull_or_rich, mixed, resample_rounds=rounds) for rounds in (0, 5))
    dropped = [plain.collect(step).metrics["groups/dropped"] for step in range(6)]
    assert sum(dropped) > 0
    for step in range(6):
        experience = resampled.collect(step)
        assert experience.metrics["groups/dropped"] == 0
        assert len([1 for batch in experience.batches for _ in batch.packed.groups]) == 4
        assert experience.metrics["groups/asked"] >= 4 + dropped[step]


def test_a_reward_model_with_another_tokenizer_reads_the_text(base: Path, prompts: pl.DataFrame, tmp_path: Path):
    from densityrm_core.models.folders import new_reward_model

    model, tokenizer = scratch_model(
        [*TEXTS, "quite other words"] * 5, BaseModelSettings(vocab_size=340, hidden_size=32, layers=1)
    )
    save_model(model, Codec(tokenizer, 60, 32), tmp_path / "other", {})
    save_model(new_reward_model(tmp_path / "other", 0), load_codec(tmp_path / "other"), tmp_path / "rm", {})
    codec = load_codec(base)
    rewarder = load_rewarder(tmp_path / "rm", codec)
    assert isinstance(rewarder, ModelRewarder)
    assert not rewarder.same_tokens
    contexts = prompts["context"].to_list()[:2]
    texts = [["Sure, oil it.", "No."], ["Why?", "Then ride it."]]
    groups = [[codec.reply(text) for text in group] for group in texts]
    given = rewarder.rewards(contexts, [codec.prompt(context) for context in contexts], groups)
    repeated = [context for context in contexts for _ in range(2)]
    assert given.tolist() == pytest.approx(rewarder.scorer.score(repeated, [t for group in texts for t in group]), abs=1e-5)


def test_a_reward_model_of_the_same_tokenizer_reads_the_ids_and_a_cut_reply_closed(base: Path, reward_model: Path):
    codec = load_codec(base)
    rewarder = load_rewarder(reward_model, codec)
    assert isinstance(rewarder, ModelRewarder)
    assert rewarder.same_tokens
    context = [{"role": "user", "content": "How?"}]
    whole, cut = codec.reply("Sure, oil it."), codec.reply("Sure, oil it.")[:-1]
    given = rewarder.rewards([context], [codec.prompt(context)], [[whole, cut]]).tolist()
    assert given == pytest.approx(rewarder.scorer.score([context], ["Sure, oil it."]) * 2, abs=1e-6)


def test_rewards_are_on_the_scale_of_the_reward_models_card(base: Path, reward_model: Path, tmp_path: Path):
    import json

    shutil.copytree(reward_model, tmp_path / "rm")
    card = json.loads((tmp_path / "rm" / "densityrm.json").read_text())
    (tmp_path / "rm" / "densityrm.json").write_text(json.dumps({**card, "reward_mean": 2.0, "reward_std": 4.0}))
    codec, context = load_codec(base), [{"role": "user", "content": "How?"}]
    given = [
        load_rewarder(folder, codec).rewards([context], [codec.prompt(context)], [[[5, 6]]])
        for folder in (reward_model, tmp_path / "rm")
    ]
    assert scale_of(reward_model) is None
    assert given[1].item() == pytest.approx((given[0].item() - 2) / 4)


def test_a_prompt_too_long_for_the_context_is_refused_before_anything_is_sampled(base: Path, prompts: pl.DataFrame):
    with pytest.raises(ModelError, match=r"512 positions: lower base_model\.max_prompt_tokens"):
        train_policy(task(base, prompts, share_of_a, max_new_tokens=505), Watch())


def test_a_long_prompt_keeps_its_end(base: Path):
    long = prompts_of("word " * 400 + "end?", "Why?")
    watch = Watch()
    trained = train_policy(task(base, long, share_of_a, steps=1), watch)
    assert trained.codec.truncated == 2  # asked and watched


def test_vllm_without_a_gpu_is_refused_with_what_to_do(base: Path, prompts: pl.DataFrame):
    given = PolicyTask(
        base,
        share_of_a,
        prompts,
        prompts.head(0),
        GrpoSettings(**QUICK),
        0,
        compute=ComputeSettings(rollouts="vllm", device="cpu"),
    )
    with pytest.raises(ModelError, match="CUDA only; set it to transformers"):
        train_policy(given, Watch())
