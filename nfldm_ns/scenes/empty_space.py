"""Where nothing is: how far each place of a scene is from its density, so that rays need not look there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Made = TypeVar("Made")
FARTHEST = 32
"""Cells up to which distances are told apart."""


@dataclass
class EmptySpace:
    """The cells of one scene in which trilinear interpolation finds next to no density.

    A cell lies between the centres of eight neighbouring voxels, those beyond the box being empty. The density within
    it is at most the largest of the eight. Cell (k, j, i) lies between voxels (k - 1, j - 1, i - 1) and (k, j, i).

    Attributes:
        distance: `[Z + 1, Y + 1, X + 1]`: 0 in cells that hold more density than `threshold`; elsewhere the number of
            cells to the nearest such one along the axis in which it is furthest (Chebyshev), at most `FARTHEST`.
        threshold: density in 1/m.
    """

    distance: UInt8[Tensor, "z y x"]
    threshold: float

    @property
    def occupied(self) -> Bool[Tensor, "z y x"]:
        """Cells that hold density."""
        return self.distance == 0


def cell_maximum(density: Float[Tensor, "z y x"]) -> Float[Tensor, "cells_z cells_y cells_x"]:
    """The largest density that trilinear interpolation can find in each cell."""
    return F.max_pool3d(F.pad(density[None, None], (1,) * 6), 2, stride=1)[0, 0]


def find_empty_space(density: Float[Tensor, "z y x"], threshold: float) -> EmptySpace:
    """The empty space of one scene's density (1/m)."""
    near = cell_maximum(density.detach().float()) > threshold
    distance = torch.full(near.shape, FARTHEST, dtype=torch.uint8, device=density.device)
    for cells in range(FARTHEST):
        distance[near & (distance == FARTHEST)] = cells
        near = _dilate(near)
    return EmptySpace(distance, threshold)


def _dilate(cells: Bool[Tensor, "z y x"]) -> Bool[Tensor, "z y x"]:
    """Cells and all their 26 neighbours."""
    for axis in range(3):
        wider = cells.clone()
        size = cells.shape[axis]
        wider.narrow(axis, 1, size - 1).logical_or_(cells.narrow(axis, 0, size - 1))
        wider.narrow(axis, 0, size - 1).logical_or_(cells.narrow(axis, 1, size - 1))
        cells = wider
    return cells


class TensorCache:
    """What was made of tensors, for as long as they live and nobody writes into them.

    A tensor has changed when PyTorch's version counter says so: assignments, optimisers and `load_state_dict` count,
    writing to `.data` does not. Tensors of inference mode have no counter, and nothing is kept for them.
    """

    def __init__(self) -> None:
        self._made = WeakIdKeyDictionary()

    def get(self, tensor: Tensor, key: object, make: Callable[[], Made]) -> Made:
        """What `make()` gave for this tensor and key, made again if either is another."""
        if tensor.is_inference():
            return make()
        state = (tensor._version, tensor.data_ptr(), key)
        found = self._made.get(tensor)
        if found is None or found[0] != state:
            found = (state, make())
            self._made[tensor] = found
        return found[1]
