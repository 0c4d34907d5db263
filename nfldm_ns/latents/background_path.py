"""The way of a scene's background code through the global latent g."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.autoencoder.background import BACKGROUND_MOMENTS
from nfldm_ns.latents.blocks import start_at_zero
from nfldm_ns.scenes.voxel_grid import VoxelGrid

MIN_STD = 1e-3  # what varies less than this is not blown up
HIDDEN = 64
START_LOG_VARIANCE = -6.0


class BackgroundPath(nn.Module):
    """Adds the code of what lies beyond the box (`VoxelGrid.background`) to g and reads it from g.

    The code is normalised by statistics of the training scenes, which are buffers and the same whichever way scenes are
    turned about z: x and y have zero mean and share one standard deviation per channel. The path into g is linear and
    starts as the identity on g's first components; what reads them, a linear layer and a small network beside it,
    starts as its inverse.

    Without a g the code has no way through: every scene then has the mean background of the training scenes.

    Args:
        num_channels: K of the code.
        global_dim: size of g; 0 without one.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, num_channels: int, global_dim: int) -> None:
        super().__init__()
        self.num_channels = num_channels
        size = num_channels * BACKGROUND_MOMENTS
        self.reserved = min(size, global_dim)
        self.register_buffer("mean", torch.zeros(num_channels, BACKGROUND_MOMENTS))
        self.register_buffer("std", torch.ones(num_channels, BACKGROUND_MOMENTS))
        self.encoder = None
        if not global_dim:
            return
        self.encoder = nn.Linear(size, global_dim, bias=False)
        self.decoder = nn.Linear(global_dim, size)
        self.correction = nn.Sequential(nn.Linear(global_dim, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, size))
        nn.init.eye_(self.encoder.weight)
        nn.init.eye_(self.decoder.weight)
        nn.init.zeros_(self.decoder.bias)
        start_at_zero(self.correction[-1])

    @torch.no_grad()
    def reserve(self, last: nn.Conv2d) -> None:
        """Lets the components of g that the code starts in begin without anything else, and nearly without noise.

        Args:
            last: the layer that gives mean and log variance of g.
        """
        assert last.bias is not None
        mean, log_variance = (slice(first, first + self.reserved) for first in (0, last.out_channels // 2))
        for part, start in ((mean, 0.0), (log_variance, START_LOG_VARIANCE)):
            last.weight[part] = 0.0
            last.bias[part] = start

    def normalise(self, grid: VoxelGrid) -> Float[Tensor, "batch codes 4"]:
        """The normalised code; a grid without one has a code of zeros."""
        return (self._code(grid) - self.mean) / self.std

    def denormalise(self, code: Float[Tensor, "batch codes 4"]) -> Float[Tensor, "batch codes 4"]:
        """The inverse of `normalise`."""
        return code * self.std + self.mean

    def encode(self, code: Float[Tensor, "batch codes 4"]) -> Float[Tensor, "batch global_dim"]:
        """What a normalised code adds to the mean of g."""
        return code.new_zeros(len(code), 0) if self.encoder is None else self.encoder(code.flatten(1))

    def decode(self, global_latent: Float[Tensor, "batch global_dim"]) -> Float[Tensor, "batch codes 4"]:
        """The normalised code that g stands for; zeros, the mean code, without a g."""
        if self.encoder is None:
            return self.mean.new_zeros(len(global_latent), self.num_channels, BACKGROUND_MOMENTS)
        code = self.decoder(global_latent) + self.correction(global_latent)
        return code.unflatten(1, (self.num_channels, BACKGROUND_MOMENTS))

    @torch.no_grad()
    def fit(self, grids: Iterable[VoxelGrid]) -> None:
        """Sets the statistics from training scenes."""
        codes = torch.cat([self._code(grid).double() for grid in grids])
        horizontal = torch.tensor([False, True, True, False], device=codes.device)
        mean = torch.where(horizontal, 0.0, codes.mean(0))
        variance = (codes - mean).square().mean(0)
        variance = torch.where(horizontal, variance[:, 1:3].mean(1, keepdim=True), variance)
        self.mean.copy_(mean)
        self.std.copy_(variance.sqrt().clamp(min=MIN_STD))

    def _code(self, grid: VoxelGrid) -> Float[Tensor, "batch codes 4"]:
        shape = (self.num_channels, BACKGROUND_MOMENTS)
        if grid.background is None:
            return self.mean.new_zeros(grid.batch_size, *shape)
        if grid.background.shape[1:] != shape:
            raise ValueError(f"backgrounds must be {shape}, not {tuple(grid.background.shape[1:])}")
        return grid.background


def background_loss(
    reconstruction: Float[Tensor, "batch codes 4"], target: Float[Tensor, "batch codes 4"]
) -> Float[Tensor, ""]:
    """Mean absolute error of normalised codes; zero where they have no channels."""
    return F.l1_loss(reconstruction, target, reduction="sum") / max(1, target.numel())
