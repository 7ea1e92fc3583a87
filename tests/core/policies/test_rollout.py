"""Completions come from the policy's own distribution, whatever else is in the batch."""

from typing import Any

import numpy as np
import pytest
import torch

from densityrm_core.models.folders import load_causal_lm, load_codec
from densityrm_core.models.likelihood import likelihood, log_probs
from densityrm_core.models.packing import pack
from densityrm_core.models.tokens import Codec
from densityrm_core.policies.decoding import Decoding, choose, member_keys, points_at, prompt_keys
from densityrm_core.policies.rollout import sample_completions
from tests.core.models.test_packing import MODELS, language_model
from tests.core.tiny_models import tiny_language_model


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of larger weights than at birth, so that its distributions are far from uniform."""
    folder = tiny_language_model(tmp_path_factory.mktemp("policy"))
    model = load_causal_lm(folder).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return load_codec(tiny_language_model(tmp_path_factory.mktemp("codec")))


def prompts_of(codec: Codec, *texts: str) -> list[list[int]]:
    return [codec.prompt([{"role": "user", "content": text}]) for text in texts]


@pytest.fixture
def prompts(codec: Codec) -> list[list[int]]:
    return prompts_of(codec, "How do I fix my bicycle?", "Why?", "Is a tomato a fruit, or is it not?")


def first_differences(one: list[list[list[int]]], other: list[list[list[int]]]) -> int:
    """How many completions differ; different kernels may round a logit otherwise, and a draw may fall on that very edge."""
    return sum(a != b for mine, theirs in zip(one, other, strict=True) for a, b in zip(mine, theirs, strict=True))


@MODELS
def test_greedy_completions_equal_hugging_face_generate(name: str):
    model = language_model(name).eval()
    prompts = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
    ours = sample_completions(model, prompts, 0, 2, Decoding(12, temperature=0), 0).groups
    for prompt, group in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=0)
        assert group[0] == group[1] == theirs[0, len(prompt) :].tolist()


@MODELS
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_log_probs_equal_recomputed_ones(name: str, temperature: float):
    model = language_model(name).eval()
    prompts = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
    rollout = sample_completions(model, prompts, 0, 4, Decoding(16, temperature), 0)
    sampled = torch.tensor([value for group in rollout.log_probs for values in group for value in values])
    recomputed = log_probs(model, pack(list(zip(prompts, rollout.groups, strict=True))), temperature)
    assert (sampled - recomputed).abs().max() < 1e-4


def test_in_bfloat16_sampled_log_probs_stray_by_hundredths(policy: Any, prompts: list[list[int]], codec: Codec):
    import copy

    rollout = sample_completions(copy.deepcopy(policy).bfloat16(), prompts, codec.eos, 8, Decoding(16), 0)
    sampled = torch.tensor([value for group in rollout.log_probs for values in group for value in values])
    gap = (sampled - log_probs(policy, pack(list(zip(prompts, rollout.groups, strict=True))))).abs()
    assert 0 < gap.mean() < 0.05


def test_tokens_come_from_the_policys_own_distribution(policy: Any, prompts: list[list[int]], codec: Codec):
    draws = 20_000
    replies = sample_completions(policy, prompts[:1], codec.eos, draws, Decoding(1), 0).groups[0]
    counts = torch.bincount(torch.tensor([reply[0] for reply in replies]), minlength=policy.config.vocab_size)
    expected = policy(torch.tensor(prompts[:1])).logits[0, -1].softmax(-1)
    likely = expected * draws > 5
    chi_squared = ((counts - expected * draws)[likely].square() / (expected * draws)[likely]).sum()
    freedom = int(likely.sum()) - 1
    assert chi_squared < freedom + 4 * (2 * freedom) ** 0.5


def test_a_completion_does_not_depend_on_its_batch(policy: Any, prompts: list[list[int]], codec: Codec):
    keys = prompt_keys(prompts, 7)
    together = sample_completions(policy, prompts, codec.eos, 8, Decoding(20), keys).groups
    alone = [
        sample_completions(policy, [prompt], codec.eos, 8, Decoding(20), keys[i : i + 1]).groups[0]
        for i, prompt in enumerate(prompts)
    ]
    fewer = [group[:3] for group in together]
    assert first_differences(together, alone) == 0
    assert first_differences(fewer, sample_completions(policy, prompts, codec.eos, 3, Decoding(20), keys).groups) == 0
    backwards = sample_completions(policy, prompts[::-1], codec.eos, 8, Decoding(20), keys[::-1]).groups[::-1]
    assert first_differences(together, backwards) == 0


def test_rollouts_repeat_with_their_seed_and_equal_prompts_are_drawn_apart(policy: Any, prompts: list[list[int]], codec: Codec):
    first, again, other = (sample_completions(policy, prompts, codec.eos, 8, Decoding(12), seed).groups for seed in (1, 1, 2))
    assert first == again != other
    one, two = sample_completions(policy, [prompts[0]] * 2, codec.eos, 8, Decoding(12), 1).groups
    assert one == first[0] != two


def test_finished_rows_leave_and_the_others_go_on_as_before(policy: Any, prompts: list[list[int]], codec: Codec, monkeypatch):
    decoding = Decoding(24, temperature=1.5)
    compacted = sample_completions(policy, prompts, 40, 16, decoding, 3).groups  # token 40 ends a completion here
    monkeypatch.setattr("densityrm_core.policies.rollout._COMPACT_BELOW", 0.0)
    whole = sample_completions(policy, prompts, 40, 16, decoding, 3).groups
    lengths = [len(reply) for group in whole for reply in group]
    assert len(set(lengths)) > 3
    assert all(reply.index(40) == len(reply) - 1 for group in whole for reply in group if 40 in reply)
    assert first_differences(compacted, whole) == 0


def test_padded_rows_give_the_same_completions(policy: Any, prompts: list[list[int]], codec: Codec, monkeypatch):
    packed = sample_completions(policy, prompts, codec.eos, 6, Decoding(16), 5)
    monkeypatch.setattr("densityrm_core.policies.rollout.why_padded", lambda model: "for once")
    padded = sample_completions(policy, prompts, codec.eos, 6, Decoding(16), 5)
    assert first_differences(packed.groups, padded.groups) == 0
    for ours, theirs in zip(packed.log_probs, padded.log_probs, strict=True):
        assert [v for values in ours for v in values] == pytest.approx([v for values in theirs for v in values], abs=1e-4)


def test_top_k_keeps_the_likeliest_and_top_p_the_fewest_of_that_probability():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().repeat(1000, 1)
    points = torch.arange(1000, dtype=torch.float64) / 1000
    tokens, log_prob = choose(logits, Decoding(1, top_k=2), points)
    assert torch.bincount(tokens, minlength=4).tolist() == pytest.approx([571, 429, 0, 0], abs=1)
    assert log_prob.exp()[tokens == 0][0].item() == pytest.approx(4 / 7)
    tokens, _ = choose(logits, Decoding(1, top_p=0.65), points)
    assert torch.bincount(tokens, minlength=4).tolist() == pytest.approx([571, 429, 0, 0], abs=1)
    tokens, _ = choose(logits, Decoding(1, top_p=0.75), points)
    assert torch.bincount(tokens, minlength=4)[3] == 0
    assert torch.bincount(tokens, minlength=4)[2] > 0


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]] * 2)
    edges = torch.tensor([0.0, 1 - 2.0**-32], dtype=torch.float64)
    assert choose(logits, Decoding(1), edges)[0].tolist() == [1, 3]


def test_points_are_uniform_and_keys_apart():
    members = member_keys(prompt_keys([[1, 2], [1, 2], [3]], 0), 4000)
    assert len(np.unique(members)) == len(members)
    points = torch.stack([points_at(members, place) for place in range(3)])
    assert points.mean(1).tolist() == pytest.approx([0.5] * 3, abs=0.01)
    assert abs(np.corrcoef(points[0], points[1])[0, 1]) < 0.03


def test_likelihood_in_parts_is_the_full_softmax_with_its_gradient(policy: Any, prompts: list[list[int]], monkeypatch):
    batch = pack([(prompt, [[20, 21, 22], [30]]) for prompt in prompts])

    def gradient() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        policy.zero_grad()
        found, entropy = likelihood(policy, batch, 0.7, entropy=True)
        (found.sum() + entropy.square().sum()).backward()
        return found.detach(), entropy.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()])

    whole = gradient()
    monkeypatch.setattr("densityrm_core.models.likelihood._LOGITS_AT_A_TIME", 2 * policy.config.vocab_size)
    for mine, theirs in zip(gradient(), whole, strict=True):
        assert (mine - theirs).norm() / theirs.norm() < 1e-5
    scores = (policy(torch.tensor([prompts[0] + [20, 21, 22]])).logits[0] / 0.7).log_softmax(-1)
    at = torch.arange(3) + len(prompts[0]) - 1
    assert whole[0][:3].tolist() == pytest.approx(scores[at, torch.tensor([20, 21, 22])].tolist(), abs=1e-5)
    assert whole[1][:3].tolist() == pytest.approx((-(scores.exp() * scores).sum(-1))[at].tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"max_new_tokens": 4, "top_p": 0}, {"max_new_tokens": 4, "temperature": -1}]
)
def test_impossible_decoding_is_refused(wrong: dict[str, float]):
    with pytest.raises(ValueError, match="needed"):
        Decoding(**wrong)


def test_the_copy_that_is_sampled_from_keeps_its_rotary_frequencies(policy: Any):
    """In bfloat16 they would turn a token at place 500 by half a radian too much."""
    from densityrm_core.policies.engines import TransformersEngine

    copied = TransformersEngine(policy, 0, "bf16")._sampled_from
    assert {parameter.dtype for parameter in copied.parameters()} == {torch.bfloat16}
    for kept, buffer in zip(copied.buffers(), policy.buffers(), strict=True):
        assert torch.equal(kept, buffer)
