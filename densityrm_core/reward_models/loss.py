"""The Bradley-Terry loss of preference pairs, and what it asks of each pair: margins, labels and weights, from scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor
from torch.nn.functional import softplus

from densityrm_core.arrays import Ints
from densityrm_core.settings import RewardModelSettings


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    label: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the preference under the Bradley-Terry model, averaged over the batch.

    With d = r_chosen - r_rejected - margin and y the probability that chosen is the better one, the mean of

        weight * -(y log sigmoid(d) + (1 - y) log sigmoid(-d)).

    Without the options it is -log sigmoid(r_chosen - r_rejected) [Bradley & Terry 1952; Ouyang et al. 2022, eq. 1]. The margin
    is Touvron et al. 2023, eq. 2; y = 1 - epsilon is label smoothing [Mitchell 2023, eq. 3].

    Args:
        chosen, rejected: scalar rewards, shape (pairs,), any float dtype; computed in float32.
        margin: by how much chosen should win, in reward units; 0 if not given.
        label: y, in [0, 1]; 1 if not given.
        weight: of every pair in the mean; 1 if not given. All three have shape (pairs,).

    Raises:
        ValueError: the shapes differ.
    """
    for name, other in {"rejected": rejected, "margin": margin, "label": label, "weight": weight}.items():
        if other is not None and other.shape != chosen.shape:
            raise ValueError(f"chosen has shape {tuple(chosen.shape)}, {name} {tuple(other.shape)}")
    lead = chosen.float() - rejected.float()
    if margin is not None:
        lead = lead - margin
    losses = softplus(-lead)
    if label is not None:
        losses = losses + (1 - label) * lead  # y softplus(-d) + (1 - y) softplus(d), as softplus(d) = softplus(-d) + d
    return (losses if weight is None else weight * losses).mean()


def centering_penalty(chosen: Tensor, rejected: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of weight * (r_chosen + r_rejected)^2: keeps rewards around zero, whose offset no comparison fixes.

    [Eisenstein et al. 2023, section 4.1]. Rewards of shape (pairs,), computed in float32; the weight is 1 if not given.
    """
    squares = (chosen.float() + rejected.float()) ** 2
    return (squares if weight is None else weight * squares).mean()


def correctness(margin: Tensor) -> Tensor:
    """1 where chosen scores higher, 0 where lower, 0.5 where equal."""
    return (margin > 0).float() + 0.5 * (margin == 0).float()


@dataclass(frozen=True)
class Targets:
    """Margin in reward units, P(chosen is the better one), and weight in the mean, each (pairs,) float32."""

    margin: Tensor
    label: Tensor
    weight: Tensor

    def of(self, pairs: Ints, device: torch.device) -> dict[str, Tensor]:
        """Those of some pairs, as `bradley_terry_loss` takes them."""
        return {name: getattr(self, name)[pairs].to(device) for name in ("margin", "label", "weight")}


def targets_of(pairs: pl.DataFrame, weights: npt.NDArray[np.float64], settings: RewardModelSettings) -> Targets:
    """The targets that the settings ask for.

    With importance correction the weight of a pair is 1/(n p), p its probability to be drawn: the expected gradient of a draw is
    then that of a uniform draw, whatever p is [importance sampling; Katharopoulos & Fleuret 2018, eq. 4].

    Args:
        pairs: tables.PREFERENCE_PAIRS, the training split.
        weights: sampling weight of every pair, (pairs,), any scale.
    """
    n = pairs.height
    margin, label, weight = torch.zeros(n), torch.full((n,), 1 - settings.label_smoothing), torch.ones(n)
    if settings.score_margin or settings.soft_labels:
        lead = torch.from_numpy(relative_lead(pairs))
        margin = settings.score_margin * lead.nan_to_num(0.0)
        if settings.soft_labels:
            label = torch.sigmoid(settings.soft_labels * lead).nan_to_num(1.0)
    if settings.importance_correction:
        p = weights / weights.sum()
        weight = torch.from_numpy(1 / (n * np.maximum(p, np.finfo(np.float64).tiny))).float()
    return Targets(margin, label, weight)


def relative_lead(pairs: pl.DataFrame) -> npt.NDArray[np.float32]:
    """The chosen reply's lead in score, in units of its source's mean lead, (pairs,) float32; NaN where there are no scores."""
    lead = (pl.col("score_chosen") - pl.col("score_rejected")).cast(pl.Float32)
    relative = (lead / lead.mean().over("src")).fill_null(float("nan"))
    return pairs.select(relative.alias("lead"))["lead"].to_numpy(writable=True)
