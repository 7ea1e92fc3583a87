"""How good reward models are, how sure they are, and whether they reward length: numbers with intervals, by stratum.

Everything is computed alike for reward models and baselines, from rows of RM_EVALUATION. A tied reward counts as half right;
where lengths matter, pairs of equal lengths are left out. A pair that occurs twice for a seed and model is refused. Intervals are
95 % bootstrap intervals over prompts and, where there are several, seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from densityrm_core.arrays import Doubles
from densityrm_core.measurement.bootstrap import Bootstrap, Interval, Statistic, bootstrap_statistic
from densityrm_core.measurement.frames import ends, flat, table

NAMES = {  # in the order in which they are shown
    "rm_uniform": "uniform RM",
    "rm_density": "density RM",
    "bag_of_words": "bag of words",
    "longer_reply": "longer reply",
    "shorter_reply": "shorter reply",
}

TEST_SPLIT = "test"  # the set that evaluations of reward models are about, unless said otherwise

RM_METRICS = (
    "accuracy",
    "log_loss",
    "margin",
    "ece",
    "accuracy_shorter_better",
    "accuracy_longer_better",
    "reward_length",
    "margin_length",
)
STRATIFIED_BY = ("all", "quartile", "src", "decile")

_HALF = 5  # bins of the predicted probability in [1/2, 1]; as many mirror them in [0, 1/2]
_MEASURED = {**dict.fromkeys(("by", "stratum", "model", "metric"), pl.String()), "pairs": pl.Int64()}


def measure(rows: pl.DataFrame, resamples: int, strata: Sequence[str] = STRATIFIED_BY, name: str = TEST_SPLIT) -> pl.DataFrame:
    """Every metric of every model on the set `name`, over all pairs and by `strata`, columns of RM_EVALUATION.

    With the margin m = reward_chosen - reward_rejected and the Bradley-Terry probability p = sigmoid(m) that chosen is preferred:

    - accuracy: share of pairs with m > 0, a tie counting one half; `accuracy_shorter_better` and `accuracy_longer_better` are
      the same where the preferred reply is the shorter, or the longer one.
    - log_loss: mean of -log p = softplus(-m), in nats; a coin scores log 2 = 0.693.
    - margin: mean of m, in reward units.
    - ece: expected calibration error, sum_b n_b/n |accuracy_b - confidence_b| over equal-width bins [Guo et al. 2017, eq. 5].
      Which reply is called chosen is no outcome, so each pair counts in both orders: the prediction p with outcome 1 and 1 - p
      with outcome 0. Ten bins of [0, 1] then mirror each other, and five of max(p, 1 - p) give the same error. A bin holds its
      end that lies nearer one half.
    - reward_length: Spearman's correlation of reward and length in characters over replies.
    - margin_length: Spearman's correlation of m and the difference of lengths over pairs, in both orders as above, so that it
      does not matter which reply people prefer: what a model rewards within a pair, 1 for `longer_reply`.

    Resamples reuse the ranks of all rows rather than rank anew.

    Returns:
        columns by (one of `strata`), stratum (its value as text; "all"), model, metric, pairs, mean, low, high; what is
        undefined, such as a correlation with lengths that are all equal, is null.

    Raises:
        RowsError: a pair occurs twice for a model and seed.
    """
    test = of_set(rows, name)
    found: list[dict[str, object]] = []
    for by in strata:
        groups = [("all", test)] if by == "all" else [(str(k[0]), f) for k, f in test.partition_by(by, as_dict=True).items()]
        for stratum, frame in sorted(groups, key=lambda group: (len(group[0]), group[0])):
            if frame.height:
                found += [{"by": by, "stratum": stratum, **row} for row in _measured(frame, resamples)]
    return table(found, _MEASURED)


def reliability(rows: pl.DataFrame, resamples: int, name: str = TEST_SPLIT) -> pl.DataFrame:
    """The reliability diagram on the set `name`, in the ten bins of `measure`: how often what is predicted with p comes true.

    Returns:
        columns model, bin (1 to 10), share (of the predictions, both orders), predicted (mean p), mean (share that came true),
        low, high; bins without predictions are left out.
    """
    test = of_set(rows, name)
    found: list[dict[str, object]] = []
    if test.height:
        models, slots = model_slots(test)
        drawn = resample(test, _binned(test), _came_true, resamples, slots, len(models))
        for i, model in enumerate(models):
            bins, confidence = _confidence(_margins(test.filter(pl.col("model") == model)))
            held = {b: bins == b for b in range(_HALF) if (bins == b).any()}
            sure = {b: float(confidence[those].mean()) for b, those in held.items()}
            true = {b: drawn.interval(i * _HALF + b) for b in held}
            halves = [(_HALF - b, b, 1 - sure[b], _mirrored(true[b])) for b in reversed(held)]
            halves += [(_HALF + 1 + b, b, sure[b], true[b]) for b in held]
            for number, b, predicted, interval in halves:
                share = float(held[b].mean()) / 2
                found.append({"model": model, "bin": number, "share": share, "predicted": predicted, **ends(interval)})
    columns = {"model": pl.String(), "bin": pl.Int64(), "share": pl.Float64(), "predicted": pl.Float64()}
    return table(found, columns)


def _measured(frame: pl.DataFrame, resamples: int) -> list[dict[str, object]]:
    """All metrics of all models on the rows of one stratum."""
    models, slots = model_slots(frame)
    drawn = resample(frame, _columns(frame), _metrics, resamples, slots, len(models))
    found: list[dict[str, object]] = []
    for i, model in enumerate(models):
        pairs = frame.filter(pl.col("model") == model)["pair_id"].n_unique()
        for j, metric in enumerate(RM_METRICS):
            m = i * len(RM_METRICS) + j
            interval = drawn.distance_interval(m) if metric == "ece" else drawn.interval(m)
            found.append({"model": model, "metric": metric, "pairs": pairs, **ends(interval)})
    return found


def _columns(frame: pl.DataFrame) -> Doubles:
    """What `_metrics` needs the sums of, (rows, K)."""
    margin, correct = _margins(frame), frame["correct"].to_numpy()
    longer = np.sign(frame["chars_chosen"].to_numpy() - frame["chars_rejected"].to_numpy())
    shorter_better, longer_better = (longer < 0).astype(float), (longer > 0).astype(float)
    simple = [np.ones_like(margin), correct, np.logaddexp(0, -margin), margin]
    by_length = [shorter_better, shorter_better * correct, longer_better, longer_better * correct]
    gap = _binned(frame)[:, _HALF : 2 * _HALF] - _binned(frame)[:, 2 * _HALF :]
    replies, pairs = _rank_products(frame)
    return np.concatenate([np.stack([*simple, *by_length], axis=-1), gap, replies, pairs], axis=-1)


def _metrics(sums: Doubles) -> Doubles:
    """RM_METRICS of each model from the sums of `_columns`, (..., models, K) to (..., models * RM_METRICS)."""
    n, correct, loss, margin, n_short, short, n_long, long = np.moveaxis(sums[..., :8], -1, 0)
    ece = np.abs(sums[..., 8 : 8 + _HALF]).sum(-1) / n
    x, y, xx, yy, xy, aa, bb, ab = np.moveaxis(sums[..., 8 + _HALF :], -1, 0)
    replies = (2 * n * xy - x * y) / np.sqrt((2 * n * xx - x * x) * (2 * n * yy - y * y))
    values = [correct / n, loss / n, margin / n, ece, short / n_short, long / n_long, replies, ab / np.sqrt(aa * bb)]
    return flat(np.stack(values, axis=-1), 2)


def _rank_products(frame: pl.DataFrame) -> tuple[Doubles, Doubles]:
    """Ranks within a seed and model and their products: of both replies (rows, 5), of a pair in both orders (rows, 3)."""
    from scipy.stats import rankdata

    replies, pairs = np.zeros((frame.height, 5)), np.zeros((frame.height, 3))
    groups = frame.select(pl.struct("seed", "model").rank("dense")).to_series().to_numpy()
    rewards = frame.select("reward_chosen", "reward_rejected").to_numpy()
    lengths = frame.select("chars_chosen", "chars_rejected").to_numpy()
    for group in np.unique(groups):
        own = groups == group
        n = int(own.sum())
        x, y = (_centered(rankdata(v[own].ravel())).reshape(n, 2) for v in (rewards, lengths))
        replies[own] = np.stack([x.sum(1), y.sum(1), (x * x).sum(1), (y * y).sum(1), (x * y).sum(1)], axis=-1)
        margin, longer = (np.subtract(*v[own].T) for v in (rewards, lengths))
        a, b = (_centered(rankdata(np.concatenate([v, -v])))[:n] for v in (margin, longer))
        pairs[own] = np.stack([a * a, b * b, a * b], axis=-1)
    return replies, pairs


def _centered(ranks: Doubles) -> Doubles:
    """Ranks about zero, within one half."""
    return (ranks - (len(ranks) + 1) / 2) / len(ranks)


def _binned(frame: pl.DataFrame) -> Doubles:
    """Number, right ones and confidence of a pair, each in the column of its bin, (rows, 3 * _HALF)."""
    bins, confidence = _confidence(_margins(frame))
    own = np.eye(_HALF)[bins]
    return np.concatenate([own, own * frame["correct"].to_numpy()[:, None], own * confidence[:, None]], axis=-1)


def _mirrored(interval: Interval) -> Interval:
    return Interval(1 - interval.mean, 1 - interval.high, 1 - interval.low)


def _came_true(sums: Doubles) -> Doubles:
    return flat(sums[..., _HALF : 2 * _HALF] / sums[..., :_HALF], 2)


def _confidence(margin: Doubles) -> tuple[NDArray[np.int64], Doubles]:
    """Bin, 0 to _HALF - 1, and value of max(p, 1 - p)."""
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    return np.minimum(((confidence - 0.5) * 2 * _HALF).astype(np.int64), _HALF - 1), confidence


def _margins(frame: pl.DataFrame) -> Doubles:
    return (frame["reward_chosen"] - frame["reward_rejected"]).to_numpy()


class RowsError(ValueError):
    """Rows of an evaluation contradict each other; the message names the pair."""


def of_set(rows: pl.DataFrame, name: str = TEST_SPLIT) -> pl.DataFrame:
    """The rows of one set, the test split if not said otherwise, `checked`."""
    return checked(rows.filter(pl.col("set") == name))


def checked(rows: pl.DataFrame) -> pl.DataFrame:
    """`rows` in an order that depends on nothing but their content: float sums depend on it, and results must not.

    Raises:
        RowsError: a pair occurs twice for a seed, model and subset.
    """
    key = ("seed", "model", "set", "src", "pair_id")
    twice = rows.filter(pl.struct(key).is_duplicated())
    if len(twice):
        first = twice.row(0, named=True)
        raise RowsError(
            f"pair {first['pair_id']} occurs more than once for {first['model']}, seed {first['seed']}, set {first['set']}; "
            "count it once: pass the rows of one evaluation"
        )
    return rows.sort(key)


def models_of(rows: pl.DataFrame) -> list[str]:
    """The models of `rows`, in the order of NAMES."""
    order = list(NAMES)
    return sorted(set(rows["model"]), key=lambda model: (order.index(model) if model in order else len(order), model))


def model_slots(rows: pl.DataFrame) -> tuple[list[str], NDArray[np.int64]]:
    """The models of `rows`, and which of them each row belongs to, (rows,)."""
    models = models_of(rows)
    return models, rows["model"].replace_strict(models, range(len(models)), return_dtype=pl.Int64).to_numpy()


def resample(
    rows: pl.DataFrame,
    columns: Doubles,
    statistic: Statistic,
    resamples: int,
    slots: NDArray[np.int64] | int = 0,
    n_slots: int = 1,
) -> Bootstrap:
    """`bootstrap_statistic` over the seeds and prompts of `rows`."""
    prompts = rows["prompt_id"].rank("dense")
    return bootstrap_statistic(
        columns, rows["seed"], prompts, statistic, resamples, 0, np.broadcast_to(slots, len(rows)), n_slots
    )
