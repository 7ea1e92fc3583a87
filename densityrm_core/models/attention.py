"""Attention over packed rows, for unmodified Hugging Face decoders: registered with transformers under a name of its own.

All tokens of a batch stand in one row, and one rule says who sees whom: a token sees the prompt of its group and its own branch,
up to itself. On CPUs neighbouring groups form spans of some hundred tokens, each one call of PyTorch's attention under the rule's
mask, so linear layers run on the distinct tokens and nothing else, and attention is quadratic in a span, not in the batch. Of a
large group each branch is a span of its own, which also sees the prompt in the span of the first branch. In the group p p c c r
(x: sees):

        p p c c r
    p   x . . . .
    p   x x . . .
    c   x x x . .
    c   x x x x .
    r   x x . . x      a branch sees the prompt and itself, never its sibling

On CUDA the rule is the mask of FlexAttention [Dong et al. 2024], compiled, which skips blocks that nobody sees.
`attention_kernel` takes either on any device, and FlexAttention as PyTorch computes it without compiling, which has a backward
pass on CPUs too.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from densityrm_core.choices import take

Kernel = Literal["spans", "flex", "flex_eager"]

NAME = "densityrm_packed"
_VARIANTS = 64  # of compiled attention in one process
# Else few queries would be computed by the kernel for decoding, and a row's last bits would depend on how many there are
_ONE_KERNEL = {"FORCE_USE_FLEX_ATTENTION": True}
_SPAN = 128  # tokens of neighbouring groups that share one call; a larger group has a call of its own
_ATTENTION = ("self_attn", "attn")
# What a decoder layer computes of every token by itself, but for keys and values: Llama's, Qwen's and NanoChat's names, GPT-2's
_TOKENWISE = ("mlp", "self_attn.q_proj", "self_attn.o_proj", "attn.c_proj")
# What runs so by choice needs no such advice; it says that gradients may be wrong, and the tests hold them to the spans'
warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
_wanted: ContextVar[Literal["auto", Kernel]] = ContextVar("attention kernel", default="auto")


class AttentionError(ValueError):
    """The kernel that was asked for cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Narrow:
    """The rows whose output is wanted of one layer, in ascending order."""

    attention: nn.Module  # of the layer
    rows: Tensor  # (k,) int64
    sizes: tuple[int, ...]  # of them in each span
    masks: tuple[Tensor, ...]  # (of them, n) of each span
    blocks: BlockMask | None


@dataclass(frozen=True)
class Prompt:
    """The first `tokens` tokens of a span."""

    span: int
    tokens: int


@dataclass(frozen=True)
class Layout:
    """Spans of a packed row of T tokens: `sizes`, their tokens n; `masks`, 0 where a token may look, or -inf, float32.

    A mask is (n, n), or (n, p + n) where the p tokens of the prompt stand in another span. With `blocks`, the same for
    FlexAttention, which is `compiled` or not, the spans are not used. `narrow`: of the last layer, these rows only.
    """

    sizes: tuple[int, ...]
    masks: tuple[Tensor, ...]
    prompts: tuple[Prompt | None, ...]  # of each span, if it is in another one
    group: Tensor  # (T,) int64
    branch: Tensor  # (T,) int64, 0 in a prompt, from 1 in the branches
    blocks: BlockMask | None = None
    compiled: bool = True
    narrow: Narrow | None = None


def resolve_kernel(device: str) -> Kernel:
    """What `attention_kernel` asks for on a device; where it asks for nothing, FlexAttention on CUDA, and spans elsewhere."""
    wanted = _wanted.get()
    if wanted != "auto":
        return take("attention", wanted)
    return take("attention", "flex" if device.startswith("cuda") else "spans")


def use_kernel(wanted: Literal["auto", Kernel]) -> None:
    """From now on rows that are laid out attend so, in this process; see `attention_kernel`."""
    _wanted.set(wanted)


@contextlib.contextmanager
def attention_kernel(wanted: Literal["auto", Kernel]) -> Generator[None]:
    """Within, rows that are laid out attend so: `spans`; `flex`, FlexAttention compiled, whose backward pass needs a GPU;
    `flex_eager`, the same without compiling; or `auto`, as the device of the rows suggests."""
    before = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(before)


def lay_out(groups: Sequence[tuple[int, Sequence[int]]], device: torch.device | str = "cpu") -> Layout:
    """The layout of groups given as (tokens of the prompt, tokens of each branch), in order, for the kernel of the device."""
    kernel = resolve_kernel(str(device))
    runs = [(number, place, size) for number, (p, bs) in enumerate(groups) for place, size in enumerate((p, *bs))]
    group, branch, lengths = torch.tensor(runs, dtype=torch.long).reshape(-1, 3).T
    group, branch = group.repeat_interleave(lengths), branch.repeat_interleave(lengths)
    sizes, prompts = _spans(groups)
    if kernel != "spans":
        layout = Layout(sizes, (), prompts, group.to(device), branch.to(device), compiled=kernel == "flex")
        return replace(layout, blocks=_blocks(layout))
    parts = list(zip(group.split(sizes), branch.split(sizes), strict=True))
    masks = [
        (_mask(*ids) if prompt is None else _mask_behind(prompt.tokens, len(ids[0]))).to(device)
        for ids, prompt in zip(parts, prompts, strict=True)
    ]
    return Layout(sizes, tuple(masks), prompts, group.to(device), branch.to(device))


def _spans(groups: Sequence[tuple[int, Sequence[int]]]) -> tuple[tuple[int, ...], tuple[Prompt | None, ...]]:
    """Sizes of the spans, and where the prompts of those are that have none themselves."""
    sizes: list[int] = []
    prompts: list[Prompt | None] = []
    room = 0
    for prompt, branches in groups:
        size = prompt + sum(branches)
        if _apart(prompt, branches):
            first = Prompt(len(sizes), prompt)
            sizes += [prompt + branches[0], *branches[1:]]
            prompts += [None, *[first] * (len(branches) - 1)]
            room = 0
            continue
        if not sizes or size > room:
            sizes.append(0)
            prompts.append(None)
            room = _SPAN
        sizes[-1] += size
        room -= size
    return tuple(sizes), tuple(prompts)


def _apart(prompt: int, branches: Sequence[int]) -> bool:
    """Whether a call for each branch multiplies less than half of what one call for the group does."""
    whole = (prompt + sum(branches)) ** 2
    return len(branches) > 2 and whole > 2 * (prompt**2 + sum(branch * (prompt + branch) for branch in branches))


@contextlib.contextmanager
def packed_attention(*modules: Any, name: str = NAME) -> Generator[None]:
    """Within, the modules attend by the layout that their forward pass is given as `layout`, or as the function `name` does."""
    configs = [module.config for module in modules]
    names = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, former in zip(configs, names, strict=True):
            config._attn_implementation = former


@contextlib.contextmanager
def narrowed(layer: nn.Module, layout: Layout, rows: Tensor) -> Generator[Layout]:
    """Within, the last layer, given the layout of here, computes these rows of its output only; the others are meaningless.

    Keys and values are computed of every token, queries, attention, output projection and MLP of the rows alone: exact, and of
    L layers it saves nearly one. The layer's modules are found by their names; what has another name is computed as ever.
    """
    modules = dict(layer.named_modules())
    rows = rows.unique()
    hooks: list[Any] = []

    def select(_module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return given[0].index_select(1, rows), *given[1:]

    def spread(_module: nn.Module, _given: Any, done: Any) -> Tensor:
        return _spread(done, rows, len(layout.group))

    try:
        for module in [modules[name] for name in _TOKENWISE if name in modules]:
            hooks += [module.register_forward_pre_hook(select), module.register_forward_hook(spread)]
        attention = next((modules[name] for name in _ATTENTION if name in modules), None)
        yield layout if attention is None else replace(layout, narrow=_narrow(attention, layout, rows))
    finally:
        for hook in hooks:
            hook.remove()


def _narrow(attention: nn.Module, layout: Layout, rows: Tensor) -> Narrow:
    if layout.blocks is not None:
        return Narrow(attention, rows, (), (), _blocks(layout, rows))
    ends = torch.tensor(layout.sizes, device=rows.device).cumsum(0)
    sizes = torch.searchsorted(ends, rows, right=True).bincount(minlength=len(ends)).tolist()
    starts = [0, *ends.tolist()]
    masks = [mask[part - start] for mask, part, start in zip(layout.masks, rows.split(sizes), starts, strict=False)]
    return Narrow(attention, rows, tuple(sizes), tuple(masks), None)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    layout: Layout,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls of a packed row: query (1, heads, T, d), key and value (1, kv heads, T, d) -> (1, T, heads, d)."""
    attend_row = _attend_spans if layout.blocks is None else _attend_blocks
    narrow = layout.narrow
    if narrow is None or narrow.attention is not module:
        return attend_row(query, key, value, layout, layout, scaling, dropout), None
    done = attend_row(query.index_select(2, narrow.rows), key, value, layout, narrow, scaling, dropout)
    return _spread(done, narrow.rows, len(layout.group)), None


def _attend_spans(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, asked: Layout | Narrow, scaling: float | None, dropout: float
) -> Tensor:
    """One split: slices cost a copy each, back."""
    grouped = query.shape[1] != key.shape[1]
    keys, values = key.split(layout.sizes, 2), value.split(layout.sizes, 2)
    done: list[Tensor] = []
    for number, (q, mask) in enumerate(zip(query.split(asked.sizes, 2), asked.masks, strict=True)):
        if not len(mask):
            continue
        k, v, prompt = keys[number], values[number], layout.prompts[number]
        if prompt is not None:
            k, v = (torch.cat([x[prompt.span][:, :, : prompt.tokens], own], 2) for x, own in ((keys, k), (values, v)))
        done.append(scaled_dot_product_attention(q, k, v, mask.to(q.dtype), dropout, scale=scaling, enable_gqa=grouped))
    return torch.cat([part.transpose(1, 2) for part in done], 1)


def _attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, asked: Layout | Narrow, scaling: float | None, dropout: float
) -> Tensor:
    """Autocast knows FlexAttention not: rotated queries and keys may be wider than the values."""
    if dropout:
        raise ValueError("packed rows have no attention dropout on this device: set the model's attention dropout to 0")
    query, key = query.to(value.dtype), key.to(value.dtype)
    grouped = query.shape[1] != key.shape[1]
    named: Any = {"block_mask": asked.blocks, "scale": scaling, "enable_gqa": grouped, "kernel_options": _ONE_KERNEL}
    if not layout.compiled:
        eager: Any = flex.flex_attention
        with _backward_on_any_device():
            return eager(query, key, value, **named).transpose(1, 2)
    if query.device.type == "cpu":
        if torch.is_grad_enabled() and (query.requires_grad or value.requires_grad):
            raise AttentionError(
                "compute.attention: flex has no backward pass on a processor, where PyTorch compiles none; set it to spans"
            )
        query, key, value = query.detach(), key.detach(), value.detach()  # what could be differentiated it refuses there
    return _compiled_flex(query.device.type == "cuda")(query, key, value, **named).transpose(1, 2)


@cache
def _compiled_flex(dynamic: bool) -> Any:
    """Compiled anew for every precision, with and without gradients, for whole and narrowed layers: more than Dynamo allows by
    default. Beyond its limit it would go on uncompiled without a word, holding all scores; `fullgraph` makes that an error.

    Sizes are dynamic on GPUs; for processors PyTorch 2.13 then writes C++ that does not compile where names of sizes are unlucky.
    """
    limits: Any = torch._dynamo.config  # pyright: ignore[reportPrivateUsage]  the place that its documentation names
    limits.recompile_limit = max(limits.recompile_limit, _VARIANTS)
    return torch.compile(flex.flex_attention, dynamic=dynamic, fullgraph=True)


@contextlib.contextmanager
def _backward_on_any_device() -> Generator[None]:
    """FlexAttention refuses a backward pass on CPUs, compiled or not, though only the compiled one is missing there."""
    refuse = "_validate_device"
    former = getattr(flex, refuse)
    setattr(flex, refuse, _accept)
    try:
        yield
    finally:
        setattr(flex, refuse, former)


def _accept(*_: Tensor) -> None: ...


def _blocks(layout: Layout, rows: Tensor | None = None) -> BlockMask:
    tokens = len(layout.group)
    at = torch.arange(tokens, device=layout.group.device) if rows is None else rows

    group, branch, of_group, of_branch = layout.group, layout.branch, layout.group[at], layout.branch[at]

    def allowed(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """As `_sees`, with what is known of the queries looked up once, not by every kernel."""
        related = (branch[key] == 0) | (branch[key] == of_branch[query])
        return (group[key] == of_group[query]) & related & (key <= at[query])

    return create_block_mask(allowed, None, None, len(at), tokens, device=layout.group.device)


def _mask(group: Tensor, branch: Tensor) -> Tensor:
    at = torch.arange(len(group))
    allowed = _sees(group, branch, at[:, None], at)
    return torch.zeros(len(group), len(group)).masked_fill(~allowed, float("-inf"))


@cache
def _mask_behind(prompt: int, tokens: int) -> Tensor:
    """Of a branch, (tokens, prompt + tokens): each sees the whole prompt, and its branch up to itself."""
    return torch.full((tokens, prompt + tokens), float("-inf")).triu(prompt + 1)


def _sees(group: Tensor, branch: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Whether the token at `query` sees the one at `key`: its group's prompt and its own branch, up to itself."""
    related = (branch[key] == 0) | (branch[key] == branch[query])
    return (group[key] == group[query]) & related & (key <= query)


def _spread(done: Tensor, rows: Tensor, tokens: int) -> Tensor:
    """(1, rows, ...) -> (1, tokens, ...), zero where nothing was computed."""
    return done.new_zeros(1, tokens, *done.shape[2:]).index_copy(1, rows, done)


AttentionInterface.register(NAME, torch.compiler.disable(attend))
