"""Our stream of indices as torch's data loaders take it."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler as TorchBase

from densityrm_core.sampling import Sampler


class TorchSampler(TorchBase[list[int]]):
    """Batches of indices for `DataLoader(batch_sampler=…)`: the share of one rank in every global batch of `size`.

    It starts at `step`, which a loop sets when it resumes, and yields `steps` batches. A data loader that fetches ahead does no
    harm: the position is the loop's own step number, not what this object has given out.
    """

    def __init__(self, sampler: Sampler, size: int, steps: int, rank: int = 0, world: int = 1) -> None:
        self._sampler, self._size, self._steps = sampler, size, steps
        self._rank, self._world, self.step = rank, world, 0

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.step, self._steps):
            yield self._sampler.batch(step, self._size, self._rank, self._world).tolist()

    def __len__(self) -> int:
        return max(0, self._steps - self.step)
