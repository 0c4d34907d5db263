"""V in the units the latent auto-encoder works in, and the best linear code of its columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.scenes.voxel_grid import VoxelGrid

DensityTransform = Literal["none", "log", "alpha"]
MAX_ALPHA = 0.999


class VoxelCode(nn.Module):
    """Maps V to normalised voxels with z folded into channels, and back.

    Density is compressed (`log`: `log(1 + sigma / s)`; `alpha`: `1 - exp(-sigma s')` with s' a voxel's height) and scaled
    to unit root mean square. Features are shifted and scaled per channel to zero mean and unit variance over occupied
    voxels, times the gate `alpha / (alpha + gate_alpha)`: a voxel that stops no light carries no features.

    Statistics are buffers; `fit` computes them from training voxels.

    Args:
        feature_channels: C.
        grid_shape: (Z, Y, X).
        aabb: corners of the box in metres.
        transform: of the density.
        log_scale: s in 1/m.
        gate_alpha: opacity of a voxel at which half of its features count; 0 keeps all.
    """

    def __init__(
        self,
        feature_channels: int,
        grid_shape: tuple[int, int, int],
        aabb: tuple[tuple[float, float, float], tuple[float, float, float]],
        transform: DensityTransform = "log",
        log_scale: float = 0.5,
        gate_alpha: float = 0.05,
    ) -> None:
        super().__init__()
        if transform not in ("none", "log", "alpha"):
            raise ValueError(f"density_transform must be 'none', 'log' or 'alpha', not {transform!r}")
        self.num_z = grid_shape[0]
        self.transform = transform
        self.log_scale = log_scale
        self.gate_alpha = gate_alpha
        self.voxel_height = (aabb[1][2] - aabb[0][2]) / grid_shape[0]
        self.register_buffer("density_scale", torch.ones(1))
        self.register_buffer("feature_mean", torch.zeros(feature_channels))
        self.register_buffer("feature_std", torch.ones(feature_channels))

    def alpha(self, density: Tensor) -> Tensor:
        """Opacity of a voxel, `1 - exp(-sigma * height)`."""
        return -torch.expm1(-density * self.voxel_height)

    def compress(self, density: Tensor) -> Tensor:
        """Density to its compressed domain, before scaling."""
        if self.transform == "log":
            return torch.log1p(density / self.log_scale)
        if self.transform == "alpha":
            return self.alpha(density)
        return density

    def expand(self, compressed: Tensor) -> Tensor:
        """The inverse of `compress`; negative values mean empty."""
        compressed = compressed.clamp(min=0)
        if self.transform == "log":
            return torch.expm1(compressed.clamp(max=12)) * self.log_scale
        if self.transform == "alpha":
            return -torch.log1p(-compressed.clamp(max=MAX_ALPHA)) / self.voxel_height
        return compressed

    def gate(self, density: Tensor) -> Tensor:
        """How much of a voxel's features counts, in [0, 1]."""
        if self.gate_alpha <= 0:
            return torch.ones_like(density)
        alpha = self.alpha(density)
        return alpha / (alpha + self.gate_alpha)

    def normalise(self, grid: VoxelGrid) -> Float[Tensor, "batch folded y x"]:
        """Normalised voxels, `[B, (1 + C) * Z, Y, X]`, density first."""
        density = self.compress(grid.density) / self.density_scale
        shape = (1, -1, 1, 1, 1)
        features = (grid.features - self.feature_mean.view(shape)) / self.feature_std.view(shape)
        return torch.cat([density, features * self.gate(grid.density)], dim=1).flatten(1, 2)

    def denormalise(self, folded: Float[Tensor, "batch folded y x"], aabb: Float[Tensor, "2 3"]) -> VoxelGrid:
        """Voxels of normalised ones; the inverse of `normalise` wherever the gate is open."""
        voxels = folded.unflatten(1, (-1, self.num_z))
        shape = (1, -1, 1, 1, 1)
        density = self.expand(voxels[:, :1] * self.density_scale)
        return VoxelGrid(density, voxels[:, 1:] * self.feature_std.view(shape) + self.feature_mean.view(shape), aabb)

    @torch.no_grad()
    def fit(self, grids: Iterable[VoxelGrid]) -> None:
        """Sets the statistics from training voxels."""
        sums: list[Tensor] = []
        for grid in grids:
            density, features = grid.density.double(), grid.features.double()
            weight = self.alpha(density)
            sums.append(
                torch.cat(
                    [
                        torch.stack([self.compress(density).square().sum(), weight.sum(), weight.new_tensor(density.numel())]),
                        (features * weight).sum(dim=(0, 2, 3, 4)),
                        (features.square() * weight).sum(dim=(0, 2, 3, 4)),
                    ]
                ).cpu()
            )
        total = torch.stack(sums).sum(0)
        density_square, weight, count = total[:3]
        mean, square = (total[3:] / weight.clamp(min=1e-12)).chunk(2)
        self.density_scale.copy_((density_square / count).sqrt().clamp(min=1e-6))
        self.feature_mean.copy_(mean)
        self.feature_std.copy_((square - mean.square()).clamp(min=1e-12).sqrt())


@torch.no_grad()
def linear_column_code(
    folded: Iterable[Float[Tensor, "batch folded y x"]], num_components: int, channel_weights: Float[Tensor, "folded"]
) -> tuple[Float[Tensor, "components folded"], Float[Tensor, "folded components"], Float[Tensor, "folded"]]:
    """The linear code of bird's-eye-view columns with the least weighted squared error: weighted PCA.

    The components are rotated so that all carry equal variance: quantisation and diffusion, which treat all channels
    alike, then spread their errors evenly over the voxels.

    Args:
        folded: batches of normalised voxels.
        num_components: at most the number of folded channels.
        channel_weights: weight of each channel's squared error.

    Returns:
        encoder, decoder and mean: `code = encoder @ (x - mean)`, `x ~ decoder @ code + mean`; codes have unit variance.
    """
    count, mean, square = 0, 0.0, 0.0
    for batch in folded:
        columns = batch.movedim(1, -1).flatten(0, 2).double()
        count, mean, square = count + len(columns), mean + columns.sum(0), square + columns.T @ columns
    mean = mean / count
    root = channel_weights.double().to(mean.device).sqrt()
    covariance = (square / count - mean[:, None] * mean) * root[:, None] * root
    variances, vectors = torch.linalg.eigh(covariance)
    basis = vectors.flip(1)[:, :num_components]
    variance = float(variances.flip(0)[:num_components].clamp(min=0).mean())
    scale = max(variance, 1e-12) ** 0.5
    rotation = _equalising_rotation(num_components).to(basis)
    encoder = rotation @ (basis * root[:, None]).T / scale
    decoder = (basis / root[:, None]) @ rotation.T * scale
    return encoder.float(), decoder.float(), mean.float()


def _equalising_rotation(size: int) -> Float[Tensor, "size size"]:
    """An orthogonal matrix whose entries have nearly equal magnitudes: the discrete Hartley transform."""
    angle = 2 * torch.pi * torch.outer(torch.arange(size), torch.arange(size)).double() / size
    return (angle.cos() + angle.sin()) / size**0.5
