"""The objective is the published one: advantages, averages, clipping, KL, and each against its obvious form."""

import math

import pytest
import torch

from densityrm_core.policies.kl_control import KLControl
from densityrm_core.policies.loss import Sampled, completion_weights, group_advantages, penalised, policy_loss
from densityrm_core.settings import GrpoSettings

NAN = float("nan")


def sampled(
    old: torch.Tensor, advantage: list[float], lengths: list[int], reference: torch.Tensor | None = None, **how
) -> Sampled:
    branch = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    weight = completion_weights(torch.tensor(lengths), how.get("average", "completion"), how.get("longest", 8))
    return Sampled(branch, old, reference, torch.tensor(advantage), weight)


def test_advantages_have_no_mean_and_tied_groups_none_at_all():
    advantages = group_advantages(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    assert advantages.mean(1).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert advantages[1].tolist() == [0, 0, 0]


def test_advantages_are_in_the_units_that_were_asked_for():
    rewards = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 6.0]])
    plain = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, -2.0, 4.0]])
    assert torch.equal(group_advantages(rewards, "none"), plain)
    assert torch.allclose(group_advantages(rewards, "std"), plain / (rewards.std(1, keepdim=True) + 1e-4))
    assert torch.allclose(group_advantages(rewards, "batch"), plain / (rewards.std() + 1e-4))


@pytest.mark.parametrize("scale", ["std", "none", "batch"])
def test_a_completion_without_a_reward_takes_no_part(scale):
    with_nan = group_advantages(torch.tensor([[1.0, NAN, 3.0], [2.0, 4.0, 9.0]]), scale)
    assert with_nan[0, 1] == 0
    if scale != "batch":
        assert torch.allclose(with_nan[0, [0, 2]], group_advantages(torch.tensor([[1.0, 3.0]]), scale)[0])


@pytest.mark.parametrize(
    ("average", "expected"), [("completion", [1 / 4, 1 / 12]), ("token", [1 / 8] * 2), ("constant", [1 / 20] * 2)]
)
def test_token_weights_are_those_of_the_papers(average, expected):
    assert completion_weights(torch.tensor([2, 6]), average, 10).tolist() == pytest.approx(expected)


def test_on_policy_the_ratio_is_one_and_the_gradient_the_policy_gradient():
    current = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    about = sampled(current.detach(), [1.0, -1.0], [2, 1], current.detach(), average="constant", longest=1)
    loss, told = policy_loss(current, None, about, GrpoSettings(), beta=0.3)
    loss.backward()
    advantage = torch.tensor([1.0, 1.0, -1.0])
    assert loss.item() == -advantage.sum().item() / 2  # exactly: the ratio is 1 to the last bit
    assert told["train/clipped"] == 0
    assert current.grad.tolist() == pytest.approx((-advantage / 2).tolist())  # at the reference the KL has no gradient


def test_clipping_stops_the_gradient_once_the_ratio_has_moved_the_wanted_way():
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    current = (old + torch.tensor([0.5, -0.5, 0.5, -0.5])).requires_grad_()
    about = sampled(old, [1.0, 1.0, -1.0, -1.0], [1, 1, 1, 1])
    loss, told = policy_loss(current, None, about, GrpoSettings(clip_low=0.2, clip_high=0.28), beta=0)
    loss.backward()
    expected = -(1.28 + math.exp(-0.5) - math.exp(0.5) - 0.8) / 4
    assert loss.item() == pytest.approx(expected)
    assert [bool(g) for g in current.grad] == [False, True, True, False]
    assert told["train/clipped"] == 0.5


def test_the_sequence_ratio_is_the_geometric_mean_of_the_tokens():
    old = torch.tensor([-1.0, -1.0, -2.0])
    current = torch.tensor([-0.9, -1.3, -2.1], requires_grad=True)
    about = sampled(old, [2.0, -1.0], [2, 1])
    loss, _ = policy_loss(current, None, about, GrpoSettings(ratio="sequence", clip_low=0.9, clip_high=9), beta=0)
    assert loss.item() == pytest.approx(-(2 * math.exp((0.1 - 0.3) / 2) - math.exp(-0.1)) / 2)


def test_kl_penalty_has_the_gradient_of_the_kl():
    """E over pi of grad k3*ratio equals grad KL(pi || ref), enumerated over a small vocabulary."""
    logits, reference = torch.tensor([0.3, -0.2, 0.9], requires_grad=True), torch.tensor([0.1, 0.5, -0.4]).log_softmax(0)
    log_pi = logits.log_softmax(0)
    (log_pi.exp() * (log_pi - reference)).sum().backward()
    exact = logits.grad.clone()
    logits.grad = None
    log_pi = logits.log_softmax(0)
    about = Sampled(torch.arange(3), log_pi.detach(), reference, torch.zeros(3), log_pi.exp().detach())
    policy_loss(log_pi, None, about, GrpoSettings(), beta=1.0)[0].backward()
    assert logits.grad.tolist() == pytest.approx(exact.tolist(), abs=1e-6)


def test_the_entropy_bonus_rewards_entropy():
    current, entropy = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    about = sampled(current.detach(), [0.0, 0.0], [1, 1])
    policy_loss(current, entropy, about, GrpoSettings(entropy_bonus=0.1), beta=0)[0].backward()
    assert entropy.grad.tolist() == pytest.approx([-0.05, -0.05])


def test_overlong_completions_cost_up_to_one():
    lengths, cut = torch.tensor([70, 80, 90, 100, 100]), torch.tensor([False, False, False, False, True])
    assert (1 - penalised(torch.ones(5), lengths, cut, 100)).tolist() == pytest.approx([0, 0, 0.5, 1, 1])


def test_beta_follows_its_target_by_at_most_two_percent_a_step():
    control = KLControl(GrpoSettings(kl_coefficient=0.1, kl_target=1.0), {})
    control.observe(50.0)
    assert control.beta == pytest.approx(0.102)
    control.observe(0.9)
    assert control.beta == pytest.approx(0.102 * 0.99)


def test_the_budget_is_passed_by_the_mean_of_ten_steps():
    control = KLControl(GrpoSettings(kl_budget=1.0), {})
    for kl in [5.0] + [0.0] * 8:
        control.observe(kl)
    assert not control.past_budget()
    control.observe(5.5)
    assert control.past_budget()
