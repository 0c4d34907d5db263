"""Learned refinement of V: a few steps in which a small 3D network turns gradients into an update of V.

An encoder that sees every image once does not find the V that voxels and decoder could hold. The gradient of the error
with which V shows the very images it was made of says where it is wrong; a network that has learned on many scenes what
to do about that needs a few steps where gradient descent needs a hundred (as G3R does for Gaussians, Chen et al., ECCV
2024, and Flynn et al., CVPR 2019, for multi-plane images).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.autoencoder.blocks import group_norm
from nfldm_ns.scenes.voxel_grid import VoxelGrid

SMALLEST_DENSITY = 1e-4  # 1/m; softplus has no inverse at 0
TINY = 1e-24


@dataclass
class RefinedGrid:
    """What is refined, step by step.

    Attributes:
        logits: `[B, 1, Z, Y, X]`, density before softplus.
        features: `[B, C, Z, Y, X]`.
        background: `[B, K, 4]`, the code of what lies beyond the box.
        memory: `[B, H, Z, Y, X]`, what the network keeps from step to step.
    """

    logits: Float[Tensor, "batch 1 z y x"]
    features: Float[Tensor, "batch channels z y x"]
    background: Float[Tensor, "batch codes 4"]
    memory: Float[Tensor, "batch memory z y x"]


def density_logits(density: Tensor) -> Tensor:
    """What softplus makes into these densities; those below `SMALLEST_DENSITY` count as that."""
    density = density.clamp(min=SMALLEST_DENSITY)
    return density + torch.log(-torch.expm1(-density))


def unit_gradients(gradient: Tensor) -> Tensor:
    """A scene's gradient over its root mean square where it is not zero, its large values compressed."""
    squares = gradient.square().flatten(1)
    mean = squares.sum(1) / (squares > 0).sum(1).clamp(min=1)
    scale = (mean + TINY).sqrt().reshape(-1, *[1] * (gradient.ndim - 1))
    return torch.asinh(gradient / scale)


class GridRefiner(nn.Module):
    """One step of refinement; all steps share these weights, so that their number is free.

    A step adds to density (before softplus) and features what the network makes of them and of their gradients, and
    moves them, and the background's code, a learned way down the gradient. Voxels without a gradient, which no ray of
    the given views reaches, are left alone.

    Args:
        feature_channels: C of the voxels.
        channels: width of the network.
        memory_channels: what it keeps for the next step.
    """

    def __init__(self, feature_channels: int, channels: int, memory_channels: int = 8) -> None:
        super().__init__()
        self.memory_channels = memory_channels
        values = 1 + feature_channels
        self.stem = nn.Conv3d(2 * values + memory_channels, channels, 1)
        self.near = nn.Sequential(
            group_norm(channels), nn.SiLU(), nn.Conv3d(channels, channels, 3, padding=1, padding_mode="replicate")
        )
        self.far = nn.Sequential(
            nn.AvgPool3d(2, ceil_mode=True),
            nn.Conv3d(channels, channels, 3, padding=1, padding_mode="replicate"),
            group_norm(channels),
            nn.SiLU(),
            nn.Conv3d(channels, channels, 3, padding=1, padding_mode="replicate"),
        )
        self.norm = group_norm(channels)
        self.out = nn.Conv3d(channels, values + memory_channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]
        self.density_rate = nn.Parameter(torch.tensor(0.05))
        self.feature_rate = nn.Parameter(torch.tensor(0.01))
        self.background_rate = nn.Parameter(torch.tensor(0.01))

    def forward(self, state: RefinedGrid, gradients: tuple[Tensor, Tensor, Tensor]) -> RefinedGrid:
        """The next state.

        Args:
            gradients: of the error with respect to logits, features and background, of the same shapes.
        """
        units = [unit_gradients(gradient) for gradient in gradients]
        reached = (gradients[1] != 0).any(1, keepdim=True)
        steps = self._steps(torch.cat([state.logits / 4, state.features, units[0], units[1], state.memory], dim=1))
        steps = torch.where(reached, steps.float(), 0.0)
        logits, features, memory = steps.split([1, state.features.shape[1], self.memory_channels], dim=1)
        return RefinedGrid(
            state.logits + 4 * logits - self.density_rate * units[0],
            state.features + features - self.feature_rate * units[1],
            state.background - self.background_rate * units[2],
            state.memory + memory,
        )

    def _steps(self, inputs: Float[Tensor, "batch inputs z y x"]) -> Float[Tensor, "batch outputs z y x"]:
        hidden = self.stem(inputs)
        far = F.interpolate(self.far(hidden), scale_factor=2.0, mode="nearest")
        z, y, x = hidden.shape[-3:]
        hidden = hidden + self.near(hidden) + far[..., :z, :y, :x]
        return self.out(F.silu(self.norm(hidden)))


def refine_grid(
    refiner: GridRefiner, grid: VoxelGrid, num_steps: int, error: Callable[[VoxelGrid], Tensor]
) -> VoxelGrid:
    """V after some steps.

    Gradients of the error are inputs like any other: nothing is learned through them, only by what is made of them.

    Args:
        grid: where it starts, with a background.
        error: of a V, as a scalar: the sum of every scene's own.
    """
    assert grid.background is not None
    memory = grid.density.new_zeros(grid.density.shape[0], refiner.memory_channels, *grid.density.shape[2:])
    start = density_logits(grid.density.float())
    state = RefinedGrid(start, grid.features.float(), grid.background.float(), memory)
    for _ in range(num_steps):
        state = refiner(state, _gradients(grid, state, error))
    refined = _grid(grid, state)
    # Where nothing ever changed, V is the encoder's to the bit: empty space stays empty.
    return replace(refined, density=torch.where(state.logits == start, grid.density.float(), refined.density))


def _gradients(
    grid: VoxelGrid, state: RefinedGrid, error: Callable[[VoxelGrid], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        leaves = [t.detach().clone().requires_grad_() for t in (state.logits, state.features, state.background)]
        here = RefinedGrid(leaves[0], leaves[1], leaves[2], state.memory)
        gradients = torch.autograd.grad(error(_grid(grid, here)), leaves, materialize_grads=True)
    return gradients[0], gradients[1], gradients[2]


def _grid(grid: VoxelGrid, state: RefinedGrid) -> VoxelGrid:
    """V with these tensors."""
    return replace(grid, density=F.softplus(state.logits), features=state.features, background=state.background)


def edge_error(images: Tensor, real: Tensor) -> Float[Tensor, ""]:
    """Absolute differences of colours, and of the steps from pixel to pixel, which edges and texture are made of.

    Args:
        images, real: `[*B, 3, H, W]` in [0, 1].
    """
    difference = images - real
    across, down = difference.diff(dim=-1), difference.diff(dim=-2)
    return difference.abs().mean() + across.abs().mean() + down.abs().mean()
