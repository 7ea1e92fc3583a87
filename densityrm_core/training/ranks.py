"""The processes of one training: each computes its share of every step, and what they compute together is one step.

A rank is only a number here. The sampler deals the pairs of a step to the ranks, losses are shares of the whole step's, so
gradients are summed: by one all-reduce where every rank holds all weights, by FSDP2 where weights are sharded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from densityrm_core.choices import take

_BUCKET = 2**24  # gradient elements that are summed at once, 64 MiB


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is, and the device it computes on."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this is the rank that reports and writes."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums of the ranks' values, on every rank."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return summed.tolist()

    def any(self, value: bool) -> bool:
        """Whether the value is true on some rank."""
        return self.total([float(value)])[0] > 0

    def most(self, value: int) -> int:
        """The largest of the ranks' values."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def wait(self) -> None:
        """Until every rank has come here."""
        if self.size > 1:
            dist.barrier()

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum over the ranks; sharded ones are summed already."""
        if self.size == 1:
            return
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, summed in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))


SOLO = Ranks()


def join(device: str) -> Ranks:
    """The rank of a process that torchrun started (gloo on CPU, nccl on CUDA); a rank of its own in any other process."""
    if not dist.is_torchelastic_launched():
        return Ranks(device=device)
    dist.init_process_group(take("ranks", backend_of(device)))
    return joined(device, dist.distributed_c10d.get_node_local_rank(0))


def backend_of(device: str) -> Literal["nccl", "gloo"]:
    """By which processes on this kind of device speak with one another."""
    return "nccl" if device.startswith("cuda") else "gloo"


def shard(backbone: torch.nn.Module, layers: Iterable[torch.nn.Module], ranks: Ranks) -> None:
    """Shard a decoder's weights over the ranks, layer by layer [FSDP2; Zhao et al. 2023]; its gradients become sums."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(torch.device(ranks.device).type, (ranks.size,))
    for module in (*layers, backbone):
        sharded: FSDPModule = fully_shard(module, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def clip_gradients(parameters: Sequence[Tensor], most: float) -> float:
    """Scale all gradients so that their joint norm is at most `most`; the norm before. Sharded and whole ones may mix."""
    parts = [part for part in divided(parameters) if part]
    norms = [torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]) for part in parts]
    norm = torch.linalg.vector_norm(torch.stack([whole(part) for part in norms])) if len(norms) > 1 else whole(norms[0])
    for part in parts:
        torch.nn.utils.clip_grads_with_norm_(part, most, norm)
    return float(norm)


def divided(parameters: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(whole, sharded) parameters: an optimizer computes on one kind at a time."""
    found = list(parameters)
    return [p for p in found if not isinstance(p, DTensor)], [p for p in found if isinstance(p, DTensor)]


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """This rank's shard of `tensor`, as `other` is sharded; the tensor itself where `other` is whole."""
    return distribute_tensor(tensor, other.device_mesh, other.placements) if isinstance(other, DTensor) else tensor


def joined(device: str, local_rank: int) -> Ranks:
    """This process of the process group that it has joined; it computes on the GPU of its number, where there are GPUs."""
    if device == "cuda":
        torch.cuda.set_device(local_rank)
        device = f"cuda:{local_rank}"
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(t.numel() for t in bucket) >= _BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
