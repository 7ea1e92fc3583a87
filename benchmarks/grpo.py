"""Our GRPO step beside TRL's GRPOTrainer: same prompts, policy, reward model, reference, precision and threads.

A step is 8 prompts of real conversations x 8 completions x 64 new tokens, beta 0.04. Four sides, each a process of its own, do
one step in turn, so that whatever else the machine does meets all of them:

- `trl_defaults`: gradient checkpointing on, 8 completions a forward pass, as GRPOConfig has it;
- `trl_large`: no checkpointing, all 64 completions in one forward pass;
- `trl_small`: no checkpointing, 8 completions a forward pass, which takes less memory and is often faster;
- `ours`: densityrm_core's own loop.

The last line is a JSON object: `ratio_vs_defaults` and `ratio_vs_tuned` (TRL's seconds / ours, the median over the steps; tuned
is the faster of the two without checkpointing), `cpu_ratio_vs_...` (the same of CPU seconds, which a busy machine disturbs less),
`split` (mean wall seconds of generate, reward, reference and train, of every side), `peak_rss_ratio` (ours / `trl_defaults`), and
every side's own figures, or null for a side that `failed`, with the reason. Without fast bfloat16 all sides compute in float32.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import polars as pl
import torch

from benchmarks.trl_work import (
    arguments,
    conditions,
    new_language_model,
    new_reward_model,
    new_tokenizer,
    real_pairs,
    short_prompts,
)
from benchmarks.turns import Side, Step, Turns, take_turns

PROMPTS, GROUP, NEW_TOKENS, BETA, LEARNING_RATE, WARM_UP = 8, 8, 64, 0.04, 1e-6, 1
SIDES = ("trl_defaults", "trl_large", "trl_small", "ours")
STEPS = {"5m": 8, "47m": 4, "135m": 3}
VERBATIM = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # prompts are whole conversations already


def main() -> None:
    asked = arguments(__doc__, SIDES, STEPS)
    steps = WARM_UP + asked.steps
    texts = real_pairs()
    tokenizer = new_tokenizer(texts)
    prompts = short_prompts(texts, tokenizer)[: PROMPTS * steps]
    with tempfile.TemporaryDirectory(prefix="densityrm.") as folder:
        _save_models(Path(folder), asked.model, tokenizer)
        sides = {name: Side(_run, name, prompts, folder, asked.precision, asked.threads) for name in asked.sides}
        take_turns(sides, steps)
    print(json.dumps({**_compare(sides), **conditions(asked)}))


def _save_models(folder: Path, shape: str, tokenizer: Any) -> None:
    """Policy and reward model of random weights, as folders that both sides load."""
    from densityrm_core.models.folders import save_model
    from densityrm_core.models.tokens import Codec

    tokenizer.chat_template = VERBATIM
    codec = Codec(tokenizer, 512, NEW_TOKENS)
    save_model(new_language_model(shape, tokenizer), codec, folder / "policy", {})
    save_model(new_reward_model(shape, tokenizer), codec, folder / "rm", {"reward_mean": 0.0, "reward_std": 1.0})


def _compare(sides: dict[str, Side]) -> dict[str, Any]:
    timed = {name: side.steps[WARM_UP:] for name, side in sides.items() if not side.failed}
    ours, defaults = timed.get("ours"), timed.get("trl_defaults")
    tuned = [timed[name] for name in ("trl_large", "trl_small") if name in timed]
    report: dict[str, Any] = {}
    for of, key in (("wall", "ratio_vs"), ("cpu", "cpu_ratio_vs")):
        report[f"{key}_defaults"] = round(_ratio(defaults, ours, of), 2) if ours and defaults else None
        report[f"{key}_tuned"] = round(min(_ratio(their, ours, of) for their in tuned), 2) if ours and tuned else None
    report["split"] = {name: _split(steps) for name, steps in timed.items()}
    if ours and defaults:
        report["peak_rss_ratio"] = round(ours[-1].peak / defaults[-1].peak, 2)
    for name, side in sides.items():
        report[name] = None if side.failed else _figures(timed[name])
    return {**report, "failed": {name: side.failed for name, side in sides.items() if side.failed}}


def _ratio(theirs: list[Step], ours: list[Step], of: str) -> float:
    return statistics.median(getattr(t, of) / getattr(u, of) for t, u in zip(theirs, ours, strict=True))


def _split(steps: list[Step]) -> dict[str, float]:
    """Mean wall seconds of the parts; what no part has is training."""
    names = ("generate", "reward", "reference")
    means = {name: statistics.mean(step.parts.get(name, 0.0) for step in steps) for name in names}
    whole = statistics.mean(step.wall for step in steps)
    return {name: round(value, 3) for name, value in {**means, "train": whole - sum(means.values())}.items()}


def _figures(steps: list[Step]) -> dict[str, float]:
    return {
        "median_step_s": round(statistics.median(step.wall for step in steps), 3),
        "median_step_cpu_s": round(statistics.median(step.cpu for step in steps), 3),
        "peak_rss_mib": round(steps[-1].peak / 2**20),
    }


def _run(turns: Turns, side: str, prompts: list[str], folder: str, precision: str, threads: int) -> None:
    """All the steps of one side, in its own process."""
    torch.set_num_threads(threads)
    if side == "ours":
        _train_ours(turns, prompts, Path(folder), precision)
    else:
        _train_trl(turns, prompts, folder, precision, side)


def _train_ours(turns: Turns, prompts: list[str], folder: Path, precision: str) -> None:
    """densityrm_core's own training, told when to go on by the question whether to stop."""
    from densityrm_core.policies import grpo
    from densityrm_core.policies.engines import TransformersEngine
    from densityrm_core.policies.rewards import ModelRewarder
    from densityrm_core.settings import ComputeSettings, GrpoSettings
    from densityrm_core.training.loop import Watch

    turns.part("generate", TransformersEngine, "sample")
    turns.part("reward", ModelRewarder, "rewards")
    turns.part("reference", grpo, "log_probs")
    settings = GrpoSettings(
        steps=len(prompts) // PROMPTS + 1,  # the last one, which is not taken, would be evaluated
        prompts_per_step=PROMPTS,
        group_size=GROUP,
        max_new_tokens=NEW_TOKENS,
        tokens_per_batch=1024,  # a prompt's group or two: on a CPU as fast as a whole step at a time, in half the memory
        learning_rate=LEARNING_RATE,
        kl_coefficient=BETA,
        kl_budget=None,
        evaluate_every=10_000,
        log_every=1,
    )

    def wait() -> bool:
        turns.begin()
        return False

    asked = pl.DataFrame({"context": [[{"role": "user", "content": text}] for text in prompts], "weight": [1.0] * len(prompts)})
    compute = ComputeSettings(precision="bf16" if precision == "bf16" else "fp32", device="cpu")
    watch = Watch(report=lambda step, plan, metrics: turns.end(metrics["train/loss"]), should_stop=wait)
    task = grpo.PolicyTask(folder / "policy", folder / "rm", asked, asked.head(0), settings, 0, compute=compute)
    grpo.train_policy(task, watch)


def _train_trl(turns: Turns, prompts: list[str], folder: str, precision: str, side: str) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class InTurn(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end(0.0)

    completions = PROMPTS * GROUP
    micro = completions if side == "trl_large" else 8
    tokenizer, reader = (AutoTokenizer.from_pretrained(f"{folder}/policy", padding_side=to) for to in ("left", "right"))
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(f"{folder}/policy", dtype=torch.float32),
        reward_funcs=AutoModelForSequenceClassification.from_pretrained(f"{folder}/rm", dtype=torch.float32),
        reward_processing_classes=reader,
        args=GRPOConfig(
            output_dir=f"{folder}/{side}",
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=completions // micro,
            num_generations=GROUP,
            max_completion_length=NEW_TOKENS,
            max_steps=len(prompts) // PROMPTS,
            beta=BETA,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            bf16=precision == "bf16",
            gradient_checkpointing=side == "trl_defaults",
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            seed=0,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
        processing_class=tokenizer,
        callbacks=[InTurn()],
    )
    turns.part("generate", trainer, "_generate_single_turn")
    turns.part("reward", trainer, "_calculate_rewards")
    _time_reference(turns, trainer)
    trainer.train()


def _time_reference(turns: Turns, trainer: Any) -> None:
    """TRL computes the reference's log-probabilities by the method that also computes the policy's, given another model."""
    policy_and_reference = trainer._get_per_token_logps_and_entropies
    turns.part("reference", trainer, "_get_per_token_logps_and_entropies")
    timed = trainer._get_per_token_logps_and_entropies

    def only_reference(model: Any, *arguments: Any, **named: Any) -> Any:
        method = timed if model is trainer.ref_model else policy_and_reference
        return method(model, *arguments, **named)

    trainer._get_per_token_logps_and_entropies = only_reference


if __name__ == "__main__":
    main()
