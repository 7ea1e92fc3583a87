"""The schema of every table: columns, dtypes, meaning. Whatever is stored is checked against these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import polars as pl


class TableError(ValueError):
    """A frame does not have the columns or dtypes that its table promises."""


@dataclass(frozen=True)
class Column:
    name: str
    dtype: pl.DataType | type[pl.DataType]
    meaning: str
    nullable: bool = False


@dataclass(frozen=True)
class Table:
    """A named schema. `width` of an embedding is known only when the encoder is, so `Array` matches any width."""

    name: str
    meaning: str
    columns: tuple[Column, ...]

    @property
    def schema(self) -> pl.Schema:
        return pl.Schema({c.name: c.dtype for c in self.columns})

    def empty(self) -> pl.DataFrame:
        return pl.DataFrame(schema=self.schema)

    def frame(self, rows: Sequence[Mapping[str, object]]) -> pl.DataFrame:
        """A frame of this table from a list of row dicts; columns absent from a row are null."""
        return pl.DataFrame(rows, schema=self.schema, orient="row") if rows else self.empty()

    def check(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Return `frame` unchanged, or raise TableError naming every column that differs."""
        have, want = frame.schema, self.schema
        faults = [f"column {n!r} is missing" for n in want if n not in have]
        faults += [f"column {n!r} is not part of the table" for n in have if n not in want]
        faults += [
            f"column {n!r} is {have[n]}, not {dtype}" for n, dtype in want.items() if n in have and not _same(have[n], dtype)
        ]
        if not faults:
            required = [c.name for c in self.columns if not c.nullable]
            nulls = frame.select(pl.col(required).null_count())
            faults = [f"column {n!r} has {nulls[n][0]} nulls" for n in required if nulls[n][0]]
        if faults:
            raise TableError(f"table {self.name}: " + "; ".join(faults))
        return frame


def _same(have: pl.DataType, want: pl.DataType) -> bool:
    if isinstance(want, pl.Array) and isinstance(have, pl.Array):
        return have.inner == want.inner
    return have == want


def with_key(frame: pl.DataFrame, table: Table, **key: str | int | None) -> pl.DataFrame:
    """`frame` with the constant columns `key` added, in the table's order."""
    columns = [pl.lit(value, table.schema[name]).alias(name) for name, value in key.items()]
    return table.check(frame.with_columns(columns).select(table.schema.names()))


TURN = pl.Struct({"role": pl.String(), "content": pl.String()})
EMBEDDING = pl.Array(pl.Float32(), 0)  # 0 stands for "whatever the encoder gives"

_PROMPT_ID = Column("prompt_id", pl.String(), "first 16 hex digits of the MD5 of the prompt's UTF-8 bytes")
_CLUSTER = Column(
    "cluster", pl.String(), "near-duplicates share it: first 16 hex digits of the MD5 of the founding prompt's normalised text"
)
_SPLIT = Column("split", pl.String(), "train, validation, test or judge; a cluster is in exactly one")
_SEED = Column("seed", pl.Int64(), "replicate of the experiment")

_DECILE = Column("decile", pl.Int64(), "density decile of the prompt, cut on the training prompts: 1 the rarest tenth")
_QUARTILE = Column("quartile", pl.Int64(), "density quartile of the prompt, cut on the training prompts: 1 the rarest quarter")

_PRECISION = Column("precision", pl.String(), "fp32 or bf16, in which the row's models were trained; null of a baseline", True)

_PAIR_COLUMNS = (
    Column("pair_id", pl.String(), "uuid5 of context, chosen and rejected: the same content has the same id"),
    _PROMPT_ID,
    Column("prompt", pl.String(), "first human turn: the text whose density counts"),
    Column("context", pl.List(TURN), "turns both replies answer, oldest first; the last one is the user's"),
    Column("chosen", pl.String(), "the preferred reply"),
    Column("rejected", pl.String(), "the other reply"),
    Column("score_chosen", pl.Float32(), "the source's score of the preferred reply, in the source's units", nullable=True),
    Column("score_rejected", pl.Float32(), "the source's score of the other reply", nullable=True),
    Column("src", pl.String(), "hh, ultrafeedback, stack_exchange, or what a nanochat row says"),
    Column("origin", pl.String(), "file and row (1-based) that the pair was read from"),
)

SOURCE_PAIRS = Table(
    "source_pairs",
    "canonical preference pairs of one source",
    (
        *_PAIR_COLUMNS,
        Column("comparison", pl.UInt64(), "64-bit BLAKE2 hash of the context and both replies in either order"),
    ),
)

REJECTS = Table(
    "rejects",
    "what could not become a pair, and why",
    (
        Column("src", pl.String(), "source the row belongs to"),
        Column("origin", pl.String(), "file and row (1-based)"),
        Column("reason", pl.String(), "one word of the list in densityrm_core.sources.rows"),
        Column("detail", pl.String(), "what exactly was wrong"),
        Column("pairs", pl.Int64(), "how many candidate pairs this line stands for"),
        Column("raw", pl.String(), "the row as it was read"),
    ),
)

PREFERENCE_PAIRS = Table(
    "preference_pairs",
    "the union of all sources: deduplicated, split by prompt",
    (*_PAIR_COLUMNS, Column("prompt_index", pl.UInt32(), "row of the prompt in the table of prompts"), _CLUSTER, _SPLIT),
)

PROMPTS = Table(
    "prompts",
    "every unique prompt, in order of first appearance",
    (
        _PROMPT_ID,
        Column("prompt", pl.String(), "the text"),
        _CLUSTER,
        _SPLIT,
        Column("pairs", pl.Int64(), "preference pairs with this prompt"),
        Column("sources", pl.List(pl.String()), "sources the prompt occurs in, sorted"),
    ),
)

PROMPT_EMBEDDINGS = Table(
    "prompt_embeddings",
    "a unit vector for every prompt",
    (
        _PROMPT_ID,
        _SPLIT,
        Column("truncated", pl.Boolean(), "whether the encoder saw only the beginning of the prompt"),
        Column("embedding", EMBEDDING, "embedding of unit Euclidean length, rounded to half precision"),
    ),
)

CACHED_VECTORS = Table(
    "cached_vectors",
    "vectors of prompts, kept from run to run",
    tuple(column for column in PROMPT_EMBEDDINGS.columns if column is not _SPLIT),
)

DENSITY_WEIGHTS = Table(
    "density_weights",
    "how lonely every prompt is, and how often it is sampled",
    (
        _PROMPT_ID,
        _SPLIT,
        Column("pairs", pl.Int64(), "preference pairs with this prompt"),
        Column("group", pl.String(), "prompt_id of the representative of its near-duplicates (itself if it has none)"),
        Column("log_density", pl.Float64(), "natural log of the density among the training prompts, as density.definition says"),
        Column("density", pl.Float64(), "exp(log_density)"),
        _DECILE,
        _QUARTILE,
        Column(
            "weight",
            pl.Float64(),
            "sampling probability of the prompt; null outside the training split, which is never drawn",
            True,
        ),
    ),
)

PAIR_WEIGHTS = Table(
    "pair_weights",
    "the density stratum of every pair, and how often it is sampled; rows as in preference_pairs",
    (
        Column("pair_id", pl.String(), "the pair"),
        _PROMPT_ID,
        _SPLIT,
        _DECILE,
        _QUARTILE,
        Column("weight", pl.Float64(), "sampling probability of the pair; null outside the training split", True),
    ),
)

RM_EVALUATION = Table(
    "rm_evaluation",
    "what each reward model, and each baseline, thinks of every test pair and of every pair of the further sets",
    (
        _SEED,
        Column("model", pl.String(), "rm_uniform, rm_density, or a baseline: longer_reply, shorter_reply, bag_of_words"),
        Column("set", pl.String(), "test, or the name of a set of evaluation.sets"),
        Column("pair_id", pl.String(), "the pair"),
        _PROMPT_ID,
        Column("src", pl.String(), "source of the pair; in a set of evaluation.sets its subset"),
        replace(_DECILE, nullable=True),
        replace(_QUARTILE, nullable=True),
        Column("reward_chosen", pl.Float64(), "reward of the preferred reply"),
        Column("reward_rejected", pl.Float64(), "reward of the other reply"),
        Column("correct", pl.Float64(), "1 if chosen scores higher, 0 if lower, 0.5 if equal"),
        Column("chars_chosen", pl.Int64(), "length of the preferred reply in characters"),
        Column("chars_rejected", pl.Int64(), "length of the other reply in characters"),
        _PRECISION,
        Column("fingerprint", pl.String(), "hash of the experiment that made this row"),
    ),
)

_FINGERPRINT = Column("fingerprint", pl.String(), "hash of the experiment that made this row")
_POLICY_KL = Column("kl", pl.Float64(), "log pi(y|x) - log pi_base(y|x), summed over the reply, in nats")
_TOKENS = Column("tokens", pl.Int64(), "length of the reply in tokens, end-of-sequence included")

POLICY_EVALUATION = Table(
    "policy_evaluation",
    "what each policy writes for every held-out prompt, and what the judge and both reward models say of it",
    (
        _SEED,
        Column(
            "policy", pl.String(), "base, a, b, c or d, or best_of_<n>_uniform, best_of_<n>_density: picked by a reward model"
        ),
        _PROMPT_ID,
        _DECILE,
        _QUARTILE,
        Column("sample", pl.Int64(), "number of the completion; 0 is the greedy one"),
        Column("completion", pl.String(), "the reply"),
        Column("judge_reward", pl.Float64(), "reward by the judge, in the judge's units"),
        Column(
            "own_reward",
            pl.Float64(),
            "standardised reward by the reward model the policy was trained on or picked by; null for the base policy",
            True,
        ),
        Column("rm_uniform_reward", pl.Float64(), "reward by rm_uniform, in standard deviations of its validation rewards"),
        Column("rm_density_reward", pl.Float64(), "reward by rm_density, in standard deviations of its validation rewards"),
        replace(_POLICY_KL, meaning=_POLICY_KL.meaning + ", before top-k and top-p; of a best-of-n row its upper bound"),
        Column(
            "entropy", pl.Float64(), "mean entropy of the distributions its tokens were drawn from, before top-k and top-p, nats"
        ),
        _TOKENS,
        _PRECISION,
        _FINGERPRINT,
    ),
)

POLICY_COMPLETIONS = Table(
    "policy_completions",
    "what a policy answers to the same held-out prompts while it is trained",
    (
        Column("step", pl.Int64(), "optimizer step after which it was asked; 0 is the base policy"),
        Column("completions_seen", pl.Int64(), "completions that the policy had been trained on"),
        _PROMPT_ID,
        Column("prompt", pl.String(), "the prompt"),
        replace(_DECILE, nullable=True),
        replace(_QUARTILE, nullable=True),
        Column("completion", pl.String(), "the sampled reply"),
        Column("own_reward", pl.Float64(), "standardised reward by the reward model that the arm is trained on"),
        _POLICY_KL,
        _TOKENS,
    ),
)

POLICY_CURVES = Table(
    "policy_curves",
    "how far each policy had gone from the base policy at each step of its training, and what the judge says of it there",
    (
        _SEED,
        Column("policy", pl.String(), "a, b, c or d"),
        Column("step", pl.Int64(), "optimizer step; 0 is before training"),
        _PROMPT_ID,
        replace(_DECILE, nullable=True),
        replace(_QUARTILE, nullable=True),
        _POLICY_KL,
        Column("own_reward", pl.Float64(), "standardised reward by the reward model the policy is trained on"),
        Column("judge_reward", pl.Float64(), "reward by the judge, in the judge's units; no training saw it"),
        _TOKENS,
        _FINGERPRINT,
    ),
)

POLICY_DIVERSITY = Table(
    "policy_diversity",
    "how different a policy's sampled replies are, within a prompt and across prompts",
    (
        _SEED,
        Column("policy", pl.String(), "base, a, b, c or d"),
        _PROMPT_ID,
        _DECILE,
        _QUARTILE,
        Column("distinct_1", pl.Float64(), "different words / words, over the prompt's replies; null without words", True),
        Column("distinct_2", pl.Float64(), "different pairs of adjacent words / pairs; null without pairs", True),
        Column("self_bleu", pl.Float64(), "mean BLEU-4 of a reply against its siblings, 1 if all are equal; null for one", True),
        Column("spread", pl.Float64(), "mean cosine distance between two replies to the prompt; null for one reply", True),
        Column("spread_across", pl.Float64(), "mean cosine distance to the policy's replies to other prompts", True),
        Column("entropy", pl.Float64(), "mean entropy of the distributions the replies' tokens were drawn from, nats"),
        _FINGERPRINT,
    ),
)

METRICS = Table(
    "metrics",
    "the curve of one training run, one row a step and metric",
    (
        Column(
            "step", pl.Int64(), "x axis: pairs seen (reward models), completions seen (policies), sequences seen (base model)"
        ),
        Column("metric", pl.String(), "name, as in MLflow"),
        Column("value", pl.Float64(), "value"),
    ),
)
