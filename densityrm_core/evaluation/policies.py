"""What policies write for held-out prompts, and what the judge and both reward models say of it, with the stratum of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from densityrm_core.arms import ARMS, best_of_name
from densityrm_core.models.folders import load_causal_lm, load_codec
from densityrm_core.models.likelihood import likelihood, log_probs
from densityrm_core.models.packing import pack
from densityrm_core.models.tokens import Codec
from densityrm_core.policies.decoding import Decoding
from densityrm_core.policies.rewards import Rewarder, RewardFunction, load_rewarder
from densityrm_core.policies.rollout import sample_completions
from densityrm_core.settings import EvaluationSettings, GrpoSettings
from densityrm_core.streams import stream_seed

Groups = list[list[list[int]]]

_PROMPTS_AT_A_TIME = 32


class PolicyEvaluationError(ValueError):
    """A policy cannot be evaluated; the message names what is at fault and says what to do."""


@dataclass(frozen=True)
class PolicyExam:
    """What all policies of a seed are asked, and who reads the answers; `rewarders` are rm_uniform and rm_density."""

    base: Any
    codec: Codec
    prompts: pl.DataFrame  # of held_out_prompts
    judge: RewardFunction
    rewarders: Mapping[str, Rewarder]
    evaluation: EvaluationSettings
    grpo: GrpoSettings
    seed: int
    device: str = "cpu"

    @property
    def sampling(self) -> Decoding:
        evaluation = self.evaluation
        return Decoding(self.grpo.max_new_tokens, self.grpo.temperature, evaluation.top_k, evaluation.top_p)


def open_exam(
    base: Path,
    reward_models: Mapping[str, Path],
    prompts: pl.DataFrame,
    judge: RewardFunction,
    settings: tuple[EvaluationSettings, GrpoSettings],
    seed: int,
    device: str = "cpu",
) -> PolicyExam:
    """The exam of a seed, with the base model and the reward models, rm_uniform and rm_density, loaded once.

    Args:
        prompts: of `held_out_prompts`.
        settings: how many completions are sampled, and how; temperature and length are those of the training.
    """
    codec = load_codec(base)
    rewarders = {name: load_rewarder(folder, codec, device) for name, folder in reward_models.items()}
    return PolicyExam(load_causal_lm(base, device).eval(), codec, prompts, judge, rewarders, *settings, seed, device)


def evaluate_policy(policy: Path | None, own: str | None, exam: PolicyExam) -> pl.DataFrame:
    """Greedy and sampled replies of a policy: the columns of tables.POLICY_EVALUATION but seed, policy and fingerprint.

    All policies draw with the same random numbers, so that what they share cancels in their difference.

    Args:
        policy: its folder; the base policy if none.
        own: the reward model it was trained on, as a key of `exam.rewarders`; null rewards if none.

    Raises:
        PolicyEvaluationError: a reward is not a finite number.
    """
    model = load_causal_lm(policy, exam.device).eval() if policy else exam.base
    frames: list[pl.DataFrame] = []
    for start in range(0, exam.prompts.height, _PROMPTS_AT_A_TIME):
        asked = exam.prompts.slice(start, _PROMPTS_AT_A_TIME)
        prompts = [exam.codec.prompt(context) for context in asked["context"].to_list()]
        groups = _replies(model, prompts, exam, start)
        kl, entropy = _per_reply(model, prompts, groups, exam)
        rewards = _rewards(asked, prompts, groups, exam)
        frames.append(_rows(asked, groups, own, kl, entropy, rewards, exam, samples=range(exam.evaluation.samples + 1)))
    return pl.concat(frames)


def best_of_n(exam: PolicyExam) -> dict[str, pl.DataFrame]:
    """What a reward model is worth without training: of n replies of the base policy, the one that it ranks highest.

    Returns:
        per reward model, by the name of the policy, the columns of `evaluate_policy`; a row a prompt, `sample` 1. `kl` is
        log n - (n - 1) / n, an upper bound of the divergence from the base policy [Stiennon et al. 2020, appendix G.3].
    """
    n = exam.evaluation.best_of
    frames: dict[str, list[pl.DataFrame]] = {name: [] for name in exam.rewarders}
    for start in range(0, exam.prompts.height, _PROMPTS_AT_A_TIME):
        asked = exam.prompts.slice(start, _PROMPTS_AT_A_TIME)
        prompts = [exam.codec.prompt(context) for context in asked["context"].to_list()]
        seed = stream_seed(exam.seed, "best of n", start)
        groups = sample_completions(exam.base, prompts, exam.codec.eos, n, exam.sampling, seed).groups
        rewards = _rewards(asked, prompts, groups, exam)
        for name, values in rewards.items():
            first = values.view(-1, n).argmax(1)
            best = [[group[i]] for group, i in zip(groups, first.tolist(), strict=True)]
            taken = torch.arange(len(first)) * n + first
            _, entropy = _per_reply(exam.base, prompts, best, exam)
            of_best = {other: found[taken] for other, found in rewards.items()}
            kl = [log(n) - (n - 1) / n] * len(best)
            frames[name].append(_rows(asked, best, name, kl, entropy, of_best, exam, samples=range(1, 2)))
    return {best_of_name(n, name): pl.concat(parts) for name, parts in frames.items()}


def evaluate_policies(
    policies: Mapping[str, Path], exam: PolicyExam, say: Callable[[str], None] = lambda line: None
) -> dict[str, pl.DataFrame]:
    """`evaluate_policy` of the base policy and of every arm, and the best-of-n baselines if they are asked for, by name.

    Args:
        policies: folder of each arm.
        say: told what was evaluated.
    """
    answers = {"base": evaluate_policy(None, None, exam)}
    for arm, folder in policies.items():
        answers[arm] = evaluate_policy(folder, ARMS[arm].reward_model, exam)
        say(f"arm {arm.upper()} has answered {exam.prompts.height} held-out prompts")
    return answers | (best_of_n(exam) if exam.evaluation.best_of > 1 else {})


def _replies(model: Any, prompts: list[list[int]], exam: PolicyExam, start: int) -> Groups:
    """The greedy reply to each prompt, then the sampled ones."""
    seed, eos = stream_seed(exam.seed, "policy evaluation", start), exam.codec.eos
    greedy = sample_completions(model, prompts, eos, 1, replace(exam.sampling, temperature=0), seed).groups
    sampled = sample_completions(model, prompts, eos, exam.evaluation.samples, exam.sampling, seed).groups
    return [one + several for one, several in zip(greedy, sampled, strict=True)]


@torch.no_grad()
def _per_reply(model: Any, prompts: list[list[int]], groups: Groups, exam: PolicyExam) -> tuple[list[float], list[float]]:
    """Of every reply log pi - log pi_base, summed over its tokens, and the mean entropy of its tokens; nats."""
    batch = pack(list(zip(prompts, groups, strict=True)), model.device)
    own, entropy = likelihood(model, batch, exam.grpo.temperature, entropy=True)
    assert entropy is not None
    gap = own - (own if model is exam.base else log_probs(exam.base, batch, exam.grpo.temperature))
    kl, entropies, tokens = batch.totals(torch.stack([gap, entropy, torch.ones_like(gap)]))
    return kl.tolist(), (entropies / tokens).tolist()


def _rewards(asked: pl.DataFrame, prompts: list[list[int]], groups: Groups, exam: PolicyExam) -> dict[str, Tensor]:
    """Standardised reward of every reply by each reward model, (replies,)."""
    contexts = asked["context"].to_list()
    rewards = {name: rewarder.rewards(contexts, prompts, groups) for name, rewarder in exam.rewarders.items()}
    for name, values in rewards.items():
        if faults := int((~values.isfinite()).sum()):
            raise PolicyEvaluationError(f"{name}: {faults:,} rewards are not finite numbers; train this reward model again")
    return rewards


def _rows(
    asked: pl.DataFrame,
    groups: Groups,
    own: str | None,
    kl: Sequence[float],
    entropy: Sequence[float],
    rewards: Mapping[str, Tensor],
    exam: PolicyExam,
    samples: range,
) -> pl.DataFrame:
    """A row a reply; `samples` numbers those of one prompt."""
    text = [exam.codec.text(reply) for group in groups for reply in group]
    repeated = [context for context in asked["context"].to_list() for _ in samples]
    judged = np.asarray(exam.judge(repeated, text), np.float64)
    if faults := int((~np.isfinite(judged)).sum()):
        raise PolicyEvaluationError(f"rm_judge: {faults:,} rewards are not finite numbers; materialize the judge again")
    return asked.select(pl.all().exclude("prompt", "context").repeat_by(len(samples)).explode()).with_columns(
        pl.Series("sample", list(samples) * asked.height, pl.Int64),
        pl.Series("completion", text, pl.String),
        pl.Series("judge_reward", judged),
        pl.Series("own_reward", rewards[own].tolist() if own else [None] * len(text), pl.Float64),
        *(pl.Series(f"{name}_reward", values.tolist(), pl.Float64) for name, values in rewards.items()),
        pl.Series("kl", kl, pl.Float64),
        pl.Series("entropy", entropy, pl.Float64),
        pl.Series("tokens", [len(reply) for group in groups for reply in group], pl.Int64),
    )
