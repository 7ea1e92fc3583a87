"""Losses of pairwise preference learning, as functions of rewards."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus


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
