"""Latents that turn, mirror and shrink with their scenes (EQ-VAE, Kouzelis et al. 2025, arXiv 2502.09509).

An auto-encoder need not give similar latents to a scene and to the same scene changed. With encoder E, decoder D and a
change tau of the bird's-eye-view plane, EQ-VAE adds the loss `|D(tau(E(V))) - tau(V)|`, and Skorokhodov et al. (2025,
arXiv 2502.14831) the same for smaller scales alone: latents then hold less of what a denoiser can hardly predict.

All of it changes places only. No channel of V, c or f holds a direction: V turns by moving its voxels
(`VoxelGrid.rotate90`), so it is also mirrored by moving them. What holds directions, the background's code, is in g,
which stays as it is and is not compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.training.draws import ItemDraws

SMALLER = 2  # how many times smaller planes become


@dataclass(frozen=True)
class PlaneChange:
    """A change of the bird's-eye-view plane, whose axes are the last two, y and x.

    Attributes:
        mirrored: whether x is mirrored, first of all.
        quarter_turns: counter-clockwise seen from above, as of `VoxelGrid.rotate90`.
        factor: how many times smaller it becomes, by the mean over squares of that many cells.
    """

    mirrored: bool = False
    quarter_turns: int = 0
    factor: int = 1

    def __call__(self, plane: Float[Tensor, "*axes y x"]) -> Float[Tensor, "*axes changed_y changed_x"]:
        """The changed plane."""
        plane = plane.flip(-1) if self.mirrored else plane
        plane = torch.rot90(plane, -self.quarter_turns, (-2, -1))
        if self.factor == 1:
            return plane
        cells = plane.unflatten(-1, (-1, self.factor)).unflatten(-3, (-1, self.factor))
        return cells.mean(dim=(-3, -1))


def draw_changes(draws: ItemDraws, square: bool = True) -> list[PlaneChange]:
    """A random change for each item: mirrored or not, turned, and half as large or not, all equally often.

    Args:
        square: whether planes may be turned by 90 degrees; others are turned by 180 degrees only.
    """
    mirrored, turns, smaller = draws.integers(2).tolist(), draws.integers(4).tolist(), draws.integers(2).tolist()
    return [
        PlaneChange(bool(mirror), turn if square else 2 * (turn % 2), SMALLER if small else 1)
        for mirror, turn, small in zip(mirrored, turns, smaller, strict=True)
    ]


def equal_sizes(changes: Sequence[PlaneChange]) -> list[list[int]]:
    """Places of the items whose planes become equally large, and so make one batch."""
    factors = sorted({change.factor for change in changes})
    return [[i for i, change in enumerate(changes) if change.factor == factor] for factor in factors]


def change_items(
    planes: Float[Tensor, "batch *axes y x"], changes: Sequence[PlaneChange], items: Sequence[int]
) -> Float[Tensor, "items *axes changed_y changed_x"]:
    """Some items of a batch, each changed in its own way to one size."""
    return torch.stack([changes[i](planes[i]) for i in items])


def change_grid(grid: VoxelGrid, changes: Sequence[PlaneChange], items: Sequence[int]) -> VoxelGrid:
    """Some scenes of a batch changed; without their background."""
    density, features = (change_items(part, changes, items) for part in (grid.density, grid.features))
    return VoxelGrid(density, features, grid.aabb)
