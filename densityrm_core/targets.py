"""What the loss asks of every training pair, where it asks for more than that the chosen reply wins."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from densityrm_core.arrays import Ints
from densityrm_core.settings import RewardModelSettings


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
