"""Packed rows: a prompt once, its branches (chosen and rejected, or a group of completions) behind it, no padding anywhere.

A branch sees the prompt and itself, never its siblings, and its positions go on from the end of the prompt, so every branch is
computed exactly as if it stood alone behind its prompt, while the prompt is computed once. Models whose attention cannot be
steered so are computed on padded rows, one for each branch, with the same results.

Two groups in a row of T = 12 tokens, with p of a prompt, c and r of its branches:

    ids        p p p c c r | p p c r r r     (1, T)
    positions  0 1 2 3 4 3 | 0 1 2 2 3 4     (1, T)  a branch goes on where its prompt ended
    ends               4 5         8     11  (branches,)  the last token of each branch, where a reward is read
    sources          2 3 2       7 7 9 10    (tokens,)  whose output predicts each branch token
    targets          c c r       c r r r     (tokens,)  the branch tokens themselves
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from densityrm_core.models.attention import (
    AttentionError,
    Layout,
    attention_kernel,
    lay_out,
    narrowed,
    packed_attention,
    resolve_kernel,
)

Ids = Sequence[int]
Group = tuple[Ids, Sequence[Ids]]

_PROBE: list[Group] = [([3, 1, 2], [[2, 3], [1]]), ([1], [[3, 2, 1], [2, 2]])]
_PROBE_ERROR = 1e-3  # of the largest hidden state
_refused: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_narrows: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Packed:
    """A batch of T tokens in one row."""

    groups: Sequence[Group]
    ids: Tensor  # (1, T) int64
    positions: Tensor  # (1, T) int64
    layout: Layout
    ends: Tensor  # (branches,) position in the row of the last token of every branch
    sources: Tensor  # (tokens,) position whose output predicts each branch token
    targets: Tensor  # (tokens,) the branch tokens
    branch: Tensor  # (tokens,) number of the branch each target belongs to

    def totals(self, of_tokens: Tensor) -> Tensor:
        """Sums over the tokens of every branch, (..., tokens) -> (..., branches); in one order on every device."""
        lengths = self.branch.bincount(minlength=len(self.ends))
        return torch.segment_reduce(of_tokens.movedim(-1, 0).contiguous(), "sum", lengths=lengths).movedim(0, -1)


def pack(groups: Sequence[Group], device: torch.device | str = "cpu") -> Packed:
    """One row of (prompt ids, branches), in order; neither a prompt nor a branch may be empty."""
    ids: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    branch: list[int] = []
    for prompt, branches in groups:
        ids += prompt
        positions += range(len(prompt))
        last = len(ids) - 1
        for tokens in branches:
            start = len(ids)
            ids += tokens
            positions += range(len(prompt), len(prompt) + len(tokens))
            sources += [last, *range(start, len(ids) - 1)]
            targets += tokens
            branch += [len(ends)] * len(tokens)
            ends.append(len(ids) - 1)
    layout = lay_out([(len(prompt), [len(tokens) for tokens in branches]) for prompt, branches in groups], device)
    row, at, *lists = (torch.tensor(x, device=device) for x in (ids, positions, ends, sources, targets, branch))
    return Packed(groups, row[None], at[None], layout, *lists)


def tokens_of(group: Group) -> int:
    """Tokens that a group takes in a row."""
    prompt, branches = group
    return len(prompt) + sum(map(len, branches))


def split_by_tokens(groups: Sequence[Group], most: int) -> list[Sequence[int]]:
    """Numbers of the groups, in order, in parts of at most `most` tokens; a larger group is a part of its own."""
    parts: list[list[int]] = []
    room = 0
    for number, group in enumerate(groups):
        size = tokens_of(group)
        if not parts or size > room:
            parts.append([])
            room = most
        parts[-1].append(number)
        room -= size
    return list(parts)


def hidden_states(model: nn.Module, batch: Packed) -> Tensor:
    """Last hidden states of an unmodified Hugging Face decoder, (T, hidden)."""
    return _padded(model, batch) if why_padded(model) else _packed(model, batch)


def rewards(model: Any, batch: Packed) -> Tensor:
    """Scalar reward of every branch, read at its last token, (branches,), float32."""
    return model.score(states_at(model, batch, batch.ends)).squeeze(-1).float()


def why_padded(model: nn.Module) -> str:
    """Why this model is computed on padded rows; empty if it takes packed ones. Found once, on a few tokens.

    Raises:
        AttentionError: it takes them, but the kernel of this device fails or computes something else.
    """
    if model not in _refused:
        _refused[model] = _probe(model)
        if not _refused[model] and (kernel := resolve_kernel(str(next(model.parameters()).device))) != "spans":
            _check_kernel(model, kernel)
    return _refused[model]


def say_if_padded(model: nn.Module, say: Callable[[str], None]) -> None:
    """Tell that a model is computed on padded rows, which is exact and slower, and why."""
    if why := why_padded(model):
        say(f"rows are padded, which is slower: {why}")


def treat_alike(copied: nn.Module, original: nn.Module) -> None:
    """Compute a copy as its original is: in a coarser precision a probe could not tell rounding from a wrong layout."""
    _refused[copied], _narrows[copied] = why_padded(original), _takes_narrowing(original)


def states_at(model: nn.Module, batch: Packed, rows: Tensor) -> Tensor:
    """Last hidden states at some rows, (rows, hidden); the last layer is spared the others where it lets itself be narrowed."""
    if why_padded(model):
        return _padded(model, batch)[rows]
    narrow = 2 * len(rows) <= batch.ids.shape[1] and _takes_narrowing(model)
    return _packed(model, batch, rows if narrow else None)[rows]


def _takes_narrowing(model: nn.Module) -> bool:
    """Whether the last layer computes the same of some rows alone, found once, on a few tokens.

    Layers that are compiled, or computed again in the backward pass when the hooks are gone, stay whole.
    """
    layer = _last_layer(model)
    if layer is None or any(getattr(part, "_compiled_call_impl", None) for part in (layer, backbone_of(model))):
        return False
    if getattr(layer, "gradient_checkpointing", False):
        return False
    if model not in _narrows:
        _narrows[model] = _probe_narrowing(model)
    return _narrows[model]


def _probe_narrowing(model: Any) -> bool:
    training = model.training
    batch = _probe_batch(model)
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            whole, narrow = (_packed(model.eval(), batch, rows)[batch.ends] for rows in (None, batch.ends))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    finally:
        model.train(training)
    return bool((whole - narrow).abs().max() < _PROBE_ERROR * whole.abs().max())


def _probe(model: Any) -> str:
    name = f"{model.config.model_type} models"
    if getattr(model.config.get_text_config(), "sliding_window", None):
        return f"{name} attend within a sliding window here"
    training = model.training
    batch = _probe_batch(model)
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            padded, packed = _padded(model.eval(), batch), _packed(model, batch)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        return f"{name} do not take packed rows ({type(error).__name__}: {error})"
    finally:
        model.train(training)
    gap = float((padded - packed).abs().max() / padded.abs().max())
    return "" if gap < _PROBE_ERROR else f"{name} compute packed rows otherwise than padded ones (by {gap:.1g})"


def _probe_batch(model: Any) -> Packed:
    """What a model is probed with: by the kernel that runs everywhere, since it is the model that is asked about."""
    with attention_kernel("spans"):
        return pack(_PROBE, model.device)


def _check_kernel(model: Any, kernel: str) -> None:
    """Raise AttentionError unless a kernel computes what the spans do, of all rows and of the few that the last layer may be
    narrowed to: to go on with padded rows instead would be slow without a word."""
    training, spans, batch = model.training, _probe_batch(model), pack(_PROBE, model.device)
    rows = batch.ends if _takes_narrowing(model) else None
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            expected = _packed(model.eval(), spans)
            gaps = [(expected - _packed(model, batch))[batch.ends], (expected - _packed(model, batch, rows))[batch.ends]]
    except Exception as error:  # compilers raise many kinds; all mean that this kernel is not to be had
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise AttentionError(f"compute.attention: {kernel} fails on this device ({reason[0]}); set it to spans") from error
    finally:
        model.train(training)
    gap = float(torch.cat(gaps).abs().max() / expected.abs().max())
    if not gap < _PROBE_ERROR:
        raise AttentionError(f"compute.attention: {kernel} computes otherwise than spans here (by {gap:.1g}); set it to spans")


def backbone_of(model: Any) -> Any:
    """The decoder of a model with a head: what turns ids into hidden states."""
    return getattr(model, str(model.base_model_prefix))


def decoder_layers(model: Any) -> nn.ModuleList | None:
    """The decoder layers of a model, lowest first; None if they cannot be told."""
    stacks = [child for child in backbone_of(model).children() if isinstance(child, nn.ModuleList) and len(child)]
    return max(stacks, key=len) if stacks else None


def _last_layer(model: Any) -> nn.Module | None:
    layers = decoder_layers(model)
    return layers[-1] if layers else None


def _packed(model: nn.Module, batch: Packed, rows: Tensor | None = None) -> Tensor:
    """Last hidden states, (T, hidden), right at `rows` if these are given."""
    backbone = backbone_of(model)
    layer = _last_layer(model)
    narrow = contextlib.nullcontext(batch.layout) if rows is None or layer is None else narrowed(layer, batch.layout, rows)
    with packed_attention(model, backbone), narrow as layout:
        output = backbone(input_ids=batch.ids, position_ids=batch.positions, layout=layout, use_cache=False)
    return output.last_hidden_state[0]


def _padded(model: nn.Module, batch: Packed) -> Tensor:
    """Every branch behind its prompt in a row of its own, filled up on the right; results in the order of the packed row."""
    rows = [[*prompt, *tokens] for prompt, branches in batch.groups for tokens in branches]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    real = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
    output = backbone_of(model)(
        input_ids=ids.to(batch.ids.device), attention_mask=real.long().to(batch.ids.device), use_cache=False
    )
    place: list[int] = []
    number = 0
    for prompt, branches in batch.groups:
        place += range(number * width, number * width + len(prompt))
        for tokens in branches:
            place += range(number * width + len(prompt), number * width + len(prompt) + len(tokens))
            number += 1
    return output.last_hidden_state.flatten(0, 1)[torch.tensor(place, device=batch.ids.device)]
