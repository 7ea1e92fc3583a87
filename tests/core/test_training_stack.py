"""Packed rows equal the padded computation, tokens are tokens everywhere, GRPO samples from the policy it trains."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from densityrm_core.decoding import Decoding
from densityrm_core.grpo import group_advantages, grpo_loss, train_policy
from densityrm_core.likelihood import log_probs
from densityrm_core.losses import bradley_terry_loss, correctness
from densityrm_core.models import load_causal_lm, load_codec, load_reward_model, new_reward_model, save_model
from densityrm_core.packing import pack, rewards
from densityrm_core.reward_model import RewardModelTask, train_reward_model
from densityrm_core.rollout import sample_completions
from densityrm_core.scoring import tokenize_pairs
from densityrm_core.settings import BaseModelSettings, GrpoSettings, RewardModelSettings
from densityrm_core.sft import train_base_model
from densityrm_core.training import Plan, TrainingError, TrainingStoppedError, Watch, learning_rate_at, optimize

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
    model, codec = train_base_model(pairs, SETTINGS, Watch())
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


def test_sampled_completions_come_from_the_policys_own_distribution(base: Path):
    model, codec = load_causal_lm(base).eval(), load_codec(base)
    prompt = codec.prompt([{"role": "user", "content": "How do I fix my violin number 2?"}])
    first = [reply for reply in sample_completions(model, [prompt], codec.eos, 4000, Decoding(1), seed=0).groups[0]]
    counts = torch.bincount(torch.tensor([c[0] for c in first]), minlength=model.config.vocab_size) / len(first)
    expected = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    assert (counts - expected).abs().max() < 0.03


def test_greedy_completions_equal_hugging_face_generate(base: Path):
    model, codec = load_causal_lm(base).eval(), load_codec(base)
    prompts = [codec.prompt([{"role": "user", "content": text}]) for text in ("How do I fix my violin number 2?", "Why?")]
    ours = sample_completions(model, prompts, codec.eos, 2, Decoding(12, temperature=0), seed=0).groups
    for prompt, group in zip(prompts, ours, strict=True):
        theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :].tolist()
        assert group[0] == group[1] == theirs


def test_rollouts_repeat_with_their_seed(base: Path):
    model, codec = load_causal_lm(base), load_codec(base)
    prompts = [codec.prompt([{"role": "user", "content": "How?"}])]
    first, again, other = (sample_completions(model, prompts, codec.eos, 8, Decoding(12), seed=seed) for seed in (1, 1, 2))
    assert first == again != other


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


def test_a_policy_moves_towards_its_reward_model(base: Path, reward_model: Path, pairs: pl.DataFrame):
    watch = Watch()
    asked = pairs.unique("prompt_id", maintain_order=True).with_columns(weight=pl.lit(1.0))
    settings = GrpoSettings(
        steps=60, prompts_per_step=6, group_size=8, max_new_tokens=10, learning_rate=4e-3, kl_coefficient=0.0, kl_budget=1e6
    )
    train_policy(base, reward_model, asked, settings, 0, watch)
    rewards_seen = [metrics["reward/mean"] for _, metrics in watch.points]
    assert rewards_seen[-1] > rewards_seen[0] + 0.2


def test_a_policy_stops_once_its_kl_budget_is_spent(base: Path, reward_model: Path, pairs: pl.DataFrame):
    asked = pairs.unique("prompt_id", maintain_order=True).with_columns(weight=pl.lit(1.0))
    settings = GrpoSettings(
        steps=60, prompts_per_step=2, group_size=4, max_new_tokens=10, learning_rate=1e-2, kl_coefficient=0.0, kl_budget=0.5
    )
    trained = train_policy(base, reward_model, asked, settings, 0, Watch())
    assert trained.stopped_by_kl
    assert trained.steps < 60


def test_on_policy_loss_has_ratio_one_and_the_policy_gradient():
    current = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 0.5])
    loss = grpo_loss(current, current.detach(), advantage, kl_coefficient=0.3)
    loss.backward()
    assert loss.item() == pytest.approx(-advantage.sum().item())
    assert current.grad.tolist() == pytest.approx((-advantage).tolist())  # at the reference the KL term has no gradient


def test_kl_penalty_has_the_gradient_of_the_kl():
    """E over pi of grad k3*ratio equals grad KL(pi || ref), enumerated over a small vocabulary."""
    logits, reference = torch.tensor([0.3, -0.2, 0.9], requires_grad=True), torch.tensor([0.1, 0.5, -0.4]).log_softmax(0)
    log_pi = logits.log_softmax(0)
    (log_pi.exp() * (log_pi - reference)).sum().backward()
    exact = logits.grad.clone()
    logits.grad = None
    log_pi = logits.log_softmax(0)
    gap = reference - log_pi
    ((log_pi - log_pi.detach()).exp() * (gap.exp() - gap - 1) * log_pi.exp().detach()).sum().backward()
    assert logits.grad.tolist() == pytest.approx(exact.tolist(), abs=1e-6)


def test_advantages_have_no_mean_and_tied_groups_none_at_all():
    advantages = group_advantages(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    assert advantages.mean(1).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert advantages[1].tolist() == [0, 0, 0]


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


def test_a_step_in_parts_is_the_step_as_a_whole(base: Path, pairs: pl.DataFrame):
    def trained(tokens: int) -> tuple[torch.Tensor, pl.DataFrame]:
        settings = RewardModelSettings(steps=3, pairs_per_step=16, tokens_per_batch=tokens, learning_rate=1e-3, evaluate_every=3)
        watch = Watch()
        trained = train_reward_model(RewardModelTask(base, pairs.head(40), np.ones(40), pairs.head(8), settings, 0), watch)
        return torch.cat([p.detach().flatten() for p in trained.model.parameters()]), watch.frame()

    (whole, metrics), (parts, others) = trained(100_000), trained(100)
    assert (whole - parts).abs().max() < 1e-4
    assert others["value"].to_numpy() == pytest.approx(metrics["value"].to_numpy(), abs=1e-4)
