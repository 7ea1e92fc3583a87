"""Our reward-model training step beside TRL's RewardTrainer: same pairs, weights, precision, threads, optimizer kind.

Five sides, each a process of its own, do one step in turn, so that whatever else the machine does meets all of them:

- `trl_defaults`: gradient checkpointing on, pairs in a random order;
- `trl_stock`: no checkpointing, the fastest that TRL does as it is;
- `trl_tuned`: besides, batches of pairs of like length, those that `group_by_length` makes of the whole split (the option itself
  fails in RewardTrainer, which drops the column of lengths);
- `trl_micro`: besides, four micro-batches of 4 pairs of like length instead of one of 16, so that still less is padding;
- `ours`: densityrm_core's own step, pairs in a random order, the one of `trl_defaults`.

All sides have seen the same pairs after the last step. The last line is a JSON object: `ratio_vs_defaults` and `ratio_vs_stock`
(TRL's seconds / ours, the median over the steps, each of the same 16 pairs), `ratio_vs_tuned` and `ratio_vs_micro` (of the
seconds of all steps together), `cpu_ratio_vs_...` (the same of CPU seconds, which a busy machine disturbs less), `peak_rss_ratio`
(ours / `trl_defaults`, which take less than `trl_tuned`), `loss_difference` (relative, first step), and every side's own figures,
or null for a side that `failed`, with the reason.
"""

import json
import random
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.trl_work import (
    IdPair,
    arguments,
    conditions,
    new_reward_model,
    new_tokenizer,
    real_pairs,
    tokenize,
)
from benchmarks.turns import Side, Step, Turns, take_turns
from densityrm_core.training.precision import Precision
from densityrm_core.training.ranks import SOLO

PAIRS, LONGEST, WARM_UP, LEARNING_RATE = 16, 512, 2, 1e-4
SIDES = ("trl_defaults", "trl_stock", "trl_tuned", "trl_micro", "ours")
STEPS = {"5m": 12, "47m": 6, "135m": 4}


def main() -> None:
    asked = arguments(__doc__, SIDES, STEPS)
    texts = real_pairs()
    tokenizer = new_tokenizer(texts)
    warm_up, timed = _batches(tokenize(texts, tokenizer, LONGEST), asked.steps)
    mixed, grouped = warm_up + random.Random(0).sample(timed, len(timed)), warm_up + timed
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        sides: dict[str, Side] = {}
        for name in asked.sides:
            pairs = grouped if name in ("trl_tuned", "trl_micro") else mixed
            sides[name] = Side(_run, name, pairs, asked.model, folder, asked.precision, asked.threads)
        take_turns(sides, WARM_UP + asked.steps)
    print(json.dumps({**_compare(sides), **conditions(asked)}))


def _batches(pairs: list[IdPair], steps: int) -> tuple[list[IdPair], list[IdPair]]:
    """Pairs to warm up with, and evenly spaced ones of the batches that `group_by_length` makes of all pairs, short to long."""
    from transformers.trainer_pt_utils import get_length_grouped_indices

    lengths = [max(map(len, pair)) for pair in pairs]
    order = get_length_grouped_indices(lengths, PAIRS, generator=torch.Generator().manual_seed(0))
    batches = [order[at : at + PAIRS] for at in range(0, len(order) - PAIRS + 1, PAIRS)]
    batches.sort(key=lambda batch: max(lengths[i] for i in batch))
    spaced = [batches[int((number + 0.5) * len(batches) / steps)] for number in range(steps)]
    return pairs[: WARM_UP * PAIRS], [pairs[i] for batch in spaced for i in batch]


def _compare(sides: dict[str, Side]) -> dict[str, Any]:
    report: dict[str, Any] = {}
    timed = {name: side.steps[WARM_UP:] for name, side in sides.items() if not side.failed}
    ours, defaults = timed.get("ours"), timed.get("trl_defaults")
    for name in ("defaults", "stock", "tuned", "micro"):
        theirs = timed.get(f"trl_{name}")
        if f"trl_{name}" in sides:
            paired = name in ("defaults", "stock")  # the same 16 pairs at every step
            report[f"ratio_vs_{name}"] = theirs and ours and round(_ratio(theirs, ours, "wall", paired), 2)
            report[f"cpu_ratio_vs_{name}"] = theirs and ours and round(_ratio(theirs, ours, "cpu", paired), 2)
    if ours and defaults:
        report["peak_rss_ratio"] = round(ours[-1].peak / defaults[-1].peak, 2)
        first, their_first = (sides[name].steps[0].loss for name in ("ours", "trl_defaults"))
        report["loss_difference"] = abs(first - their_first) / their_first
    for name, side in sides.items():
        report[name] = None if side.failed else {**_figures(timed[name]), "first_loss": side.steps[0].loss}
    return {**report, "failed": {name: side.failed for name, side in sides.items() if side.failed}}


def _ratio(theirs: list[Step], ours: list[Step], of: str, paired: bool) -> float:
    them, us = ([getattr(step, of) for step in steps] for steps in (theirs, ours))
    return statistics.median(t / u for t, u in zip(them, us, strict=True)) if paired else sum(them) / sum(us)


def _figures(steps: list[Step]) -> dict[str, float]:
    return {
        "pairs_per_s": round(PAIRS * len(steps) / sum(step.wall for step in steps), 2),
        "median_step_s": round(statistics.median(step.wall for step in steps), 3),
        "median_step_cpu_s": round(statistics.median(step.cpu for step in steps), 3),
        "peak_rss_mib": round(steps[-1].peak / 2**20),
    }


def _run(turns: Turns, side: str, pairs: list[IdPair], shape: str, folder: str, precision: Precision, threads: int) -> None:
    """All the steps of one side, in its own process."""
    from transformers import PreTrainedTokenizerFast

    torch.set_num_threads(threads)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = new_reward_model(shape, tokenizer)
    if side == "ours":
        _train_ours(turns, model, pairs, precision)
    else:
        _train_trl(turns, model, tokenizer, pairs, precision, side, folder)


def _train_ours(turns: Turns, model: Any, pairs: list[IdPair], precision: Precision) -> None:
    """densityrm_core's own loop and loss."""
    from densityrm_core.reward_models.loss import Targets
    from densityrm_core.reward_models.scoring import PreferenceTokens
    from densityrm_core.reward_models.train import batches_of, preference_loss
    from densityrm_core.settings import RewardModelSettings
    from densityrm_core.training.loop import Part, Plan, Watch, optimize

    settings = RewardModelSettings(pairs_per_step=PAIRS, center_rewards=0, weight_decay=0)
    train = [PreferenceTokens(*_split(chosen, rejected)) for chosen, rejected in pairs]
    targets = Targets(torch.zeros(len(train)), torch.ones(len(train)), torch.ones(len(train)))
    losses: list[float] = []

    def parts_at(step: int) -> Iterator[Part]:
        turns.begin()
        losses.clear()
        drawn = np.arange(step * PAIRS, (step + 1) * PAIRS)
        for batch in batches_of(train, drawn, settings.tokens_per_batch, SOLO):
            loss, metrics = preference_loss(model, batch, targets, settings, precision)
            losses.append(loss.item())
            yield loss, metrics

    optimize(model, Plan(len(pairs) // PAIRS, PAIRS, LEARNING_RATE), Watch(), parts_at, lambda step: turns.end(sum(losses)))


def _split(chosen: list[int], rejected: list[int]) -> tuple[list[int], list[int], list[int]]:
    """What two sequences have in common at their beginning, and the rest of each, which is never empty."""
    same = [one == other for one, other in zip(chosen[:-1], rejected[:-1], strict=False)]
    common = [*same, False].index(False)
    return chosen[:common], chosen[common:], rejected[common:]


def _train_trl(turns: Turns, model: Any, tokenizer: Any, pairs: list[IdPair], precision: str, side: str, folder: str) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import RewardConfig, RewardTrainer

    micro = 4 if side == "trl_micro" else 1
    losses: list[float] = []

    class InTurn(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end(statistics.mean(losses[-micro:]))

    class Trainer(RewardTrainer):
        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            loss = super().compute_loss(*arguments, **named)
            losses.append(float(loss.detach()))
            return loss

    trainer = Trainer(
        model=model,
        args=RewardConfig(
            output_dir=folder,
            max_length=LONGEST,
            per_device_train_batch_size=PAIRS // micro,
            gradient_accumulation_steps=micro,
            max_steps=len(pairs) // PAIRS,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            gradient_checkpointing=side == "trl_defaults",
            bf16=precision == "bf16",
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            seed=0,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in pairs]),
        processing_class=tokenizer,
        callbacks=[InTurn()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
