"""What a pass learns from, and its random numbers: functions of the seed and of places in the sequence of all items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def batch_positions(batch_size: int, number: int, rank: int = 0, world_size: int = 1) -> range:
    """Places of one process's items of one pass in the endless sequence of all items of all epochs.

    Passes and processes take turns, so that the items of a step are the same however they are split up.

    Args:
        number: of the pass, counted over all steps.
    """
    first = (number * world_size + rank) * batch_size
    return range(first, first + batch_size)


def batch_indices(
    num_items: int, batch_size: int, number: int, seed: int, rank: int = 0, world_size: int = 1
) -> list[int]:
    """Items of one pass: every item once per epoch, in an order that only the seed decides."""
    indices = []
    for position in batch_positions(batch_size, number, rank, world_size):
        epoch, index = divmod(position, num_items)
        indices.append(int(np.random.default_rng((seed, epoch)).permutation(num_items)[index]))
    return indices


@dataclass(frozen=True)
class BatchShare:
    """Which items of every step's joint batch one process works on, and what is drawn for them.

    Attributes:
        seed: of the order of all items and of what is drawn.
        batch_size: items per pass.
        joint_batch_size: items per step, over all its passes and processes.
        rank, world_size: this process, and how many there are.
    """

    seed: int
    batch_size: int
    joint_batch_size: int
    rank: int = 0
    world_size: int = 1

    def items(self, num_items: int, number: int) -> list[int]:
        """Items of a pass."""
        return batch_indices(num_items, self.batch_size, number, self.seed, self.rank, self.world_size)

    def draws(self, number: int, device: torch.device | str = "cpu") -> ItemDraws:
        """Random numbers of the items of a pass."""
        return ItemDraws(self.seed, batch_positions(self.batch_size, number, self.rank, self.world_size), device)

    def place(self, number: int) -> tuple[int, slice]:
        """The step that a pass belongs to, and where its items lie in the joint batch of that step."""
        first = batch_positions(self.batch_size, number, self.rank, self.world_size).start
        step, offset = divmod(first, self.joint_batch_size)
        return step, slice(offset, offset + self.batch_size)


class ItemDraws:
    """Random numbers of the items of a batch, which depend on their places in the sequence, not on the batch.

    Attributes:
        generators: one per item, on the device.
    """

    def __init__(self, seed: int, positions: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        seeds = [_mix(seed, position, 0, 1) for position in positions]
        self._on_cpu = [torch.Generator().manual_seed(value) for value in seeds]
        self.generators = self._on_cpu
        if self.device.type != "cpu":
            self.generators = [torch.Generator(self.device).manual_seed(value) for value in seeds]

    def normal(self, like: Float[Tensor, " batch *shape"]) -> Float[Tensor, " batch *shape"]:
        """Standard normal numbers of the shape of a tensor."""
        return randn_tensor(like.shape, generator=self.generators, device=self.device, dtype=like.dtype)

    def integers(self, high: int) -> Int[Tensor, " batch"]:
        """One number below `high` per item, on the CPU."""
        return torch.cat([torch.randint(high, (1,), generator=generator) for generator in self._on_cpu])

    def uniform(self) -> Float[Tensor, " batch"]:
        """One number in [0, 1) per item, on the CPU."""
        return torch.cat([torch.rand(1, generator=generator) for generator in self._on_cpu])

    def each(self, draw: Callable[[torch.Generator], Tensor]) -> Shaped[Tensor, " batch *shape"]:
        """What a function draws with each item's generator, on the CPU."""
        return torch.stack([draw(generator) for generator in self._on_cpu])

    def permutation(self, item: int, count: int) -> Int[Tensor, " count"]:
        """An order of an item's `count` parts, on the CPU."""
        return torch.randperm(count, generator=self._on_cpu[item])


def seed_step(seed: int, number: int, rank: int = 0) -> int:
    """Seeds torch for one pass, so that a resumed run draws what an uninterrupted one would; returns the seed used."""
    value = _mix(seed, number, rank)
    torch.manual_seed(value)
    return value


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
