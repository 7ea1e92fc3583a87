"""Losses of pairwise preference learning, as functions of rewards."""

from __future__ import annotations

import torch
from torch import Tensor


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Negative log-likelihood that `chosen` beats `rejected` under the Bradley-Terry model.

    -log sigmoid(r_chosen - r_rejected), averaged over the batch [Bradley & Terry 1952; Ouyang et al. 2022, eq. 1].

    Args:
        chosen, rejected: scalar rewards, shape (pairs,), any float dtype; computed in float32.

    Raises:
        ValueError: the shapes differ.
    """
    if chosen.shape != rejected.shape:
        raise ValueError(f"chosen has shape {tuple(chosen.shape)}, rejected {tuple(rejected.shape)}")
    return torch.nn.functional.softplus(rejected.float() - chosen.float()).mean()


def correctness(margin: Tensor) -> Tensor:
    """1 where chosen scores higher, 0 where lower, 0.5 where equal."""
    return (margin > 0).float() + 0.5 * (margin == 0).float()
