"""A large canvas of latents seen through overlapping windows of the size that the denoisers were trained for.

Cells are those of c. Windows stand on a product lattice: each start along y with each along x. Where they overlap they
are blended by weights that sum to one and are exactly zero at a window's edge, where V of a scene has surfaces that lie
beyond its box.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

IDLE_SHARE = 1 / 6  # of an overlap, at the edge of each window, in which it has no say
Span = tuple[int, int]


def window_starts(low: int, high: int, size: int, stride: int) -> list[int]:
    """Starts of windows that cover the cells from `low` to `high`, evenly spread, at most `stride` apart.

    Raises:
        ValueError: if there is no room for one window, or the stride leaves gaps.
    """
    if high - low < size or not 1 <= stride <= size:
        raise ValueError(f"windows of {size} cells, {stride} apart, do not cover {high - low} cells")
    steps = -(-(high - low - size) // stride)
    return [low + round(i * (high - low - size) / max(steps, 1)) for i in range(steps + 1)]


def axis_weights(starts: list[int], size: int, scale: int = 1) -> Float[Tensor, "windows length"]:
    """Weights of windows along one axis: zero outside of them, a smooth step in overlaps, and one in sum.

    Args:
        starts: in cells, ascending.
        size: of a window in cells.
        scale: places per cell; the axis goes from the first window's start to the last one's end.
    """
    low, high = starts[0], starts[-1] + size
    places = (torch.arange((high - low) * scale, dtype=torch.float64) + 0.5) / scale + low
    weights = []
    for i, start in enumerate(starts):
        rises = torch.ones_like(places) if i == 0 else _step(places - start, starts[i - 1] + size - start)
        falls = torch.ones_like(places)
        if i + 1 < len(starts):
            falls = _step(start + size - places, start + size - starts[i + 1])
        weights.append(torch.where((places > start) & (places < start + size), rises * falls, 0))
    stacked = torch.stack(weights)
    return (stacked / stacked.sum(0)).float()


def _step(distance: Tensor, overlap: int) -> Tensor:
    """From 0 to 1 over the middle of an overlap, by the distance from a window's edge."""
    if overlap <= 0:
        return torch.ones_like(distance)
    t = ((distance - IDLE_SHARE * overlap) / ((1 - 2 * IDLE_SHARE) * overlap)).clamp(0, 1)
    return t * t * (3 - 2 * t)


@dataclass(frozen=True)
class WindowGrid:
    """Windows over a canvas.

    Attributes:
        y_starts, x_starts: in cells, ascending; the canvas goes from the first to the end of the last window.
        size: (rows, columns) of a window in cells.
    """

    y_starts: list[int]
    x_starts: list[int]
    size: tuple[int, int]

    @property
    def y(self) -> Span:
        """First row of the canvas and the one after its last, in cells."""
        return self.y_starts[0], self.y_starts[-1] + self.size[0]

    @property
    def x(self) -> Span:
        """First column of the canvas and the one after its last, in cells."""
        return self.x_starts[0], self.x_starts[-1] + self.size[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the canvas in cells."""
        return self.y[1] - self.y[0], self.x[1] - self.x[0]

    @property
    def windows(self) -> list[tuple[int, int]]:
        """Starts (y, x) of all windows, row by row."""
        return list(product(self.y_starts, self.x_starts))

    def weights(self, scale: int = 1) -> Float[Tensor, "rows columns y x"]:
        """Weights of every window at every place of the canvas, `scale` places per cell and axis."""
        down, across = self.axes(scale)
        return down[:, None, :, None] * across[None, :, None, :]

    def axes(self, scale: int = 1) -> tuple[Float[Tensor, "rows y"], Float[Tensor, "columns x"]]:
        """The factors of `weights` along y and x."""
        return axis_weights(self.y_starts, self.size[0], scale), axis_weights(self.x_starts, self.size[1], scale)

    def place(self, window: tuple[int, int], scale: int = 1) -> tuple[slice, slice]:
        """Where a window lies on the canvas."""
        (y, x), (rows, columns) = window, self.size
        top, left = (y - self.y[0]) * scale, (x - self.x[0]) * scale
        return slice(top, top + rows * scale), slice(left, left + columns * scale)

    def touching(self, y: Span, x: Span) -> list[tuple[int, int]]:
        """Windows that share cells with a part of the canvas."""
        rows, columns = self.size
        return [w for w in self.windows if y[0] < w[0] + rows and w[0] < y[1] and x[0] < w[1] + columns and w[1] < x[1]]


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Spherical interpolation (Shoemake 1985) of two tensors seen as vectors; their ends are exact."""
    if share in (0.0, 1.0):
        return first if share == 0 else second
    a, b = first.double().flatten(), second.double().flatten()
    cosine = torch.dot(a, b) / (a.norm() * b.norm()).clamp(min=1e-12)
    angle = torch.acos(cosine.clamp(-1, 1))
    if float(torch.sin(angle)) < 1e-6:  # in one line: no arc, or infinitely many
        return torch.lerp(first, second, share)
    weights = torch.sin((1 - share) * angle), torch.sin(share * angle)
    mixed = (weights[0] * a + weights[1] * b) / torch.sin(angle)
    return mixed.view(first.shape).to(first.dtype)


def seed_of_place(seed: int, *place: int) -> int:
    """A seed that belongs to a place of a world; that of the place of zeros is the world's own."""
    if not any(place):
        return seed
    numbers = [seed, *(2 * n if n >= 0 else -2 * n - 1 for n in place)]
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
