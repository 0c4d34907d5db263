"""V in the units the latent auto-encoder works in, and the best linear code of its columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.scenes.voxel_grid import VoxelGrid

DensityTransform = Literal["none", "log", "alpha"]
MAX_ALPHA = 0.999
FULL_PCA = 1024  # larger problems are solved by a randomised method


class VoxelCode(nn.Module):
    """Maps V to normalised voxels with z folded into channels, and back.

    Density is compressed (`log`: `log(1 + sigma / s)`; `alpha`: `1 - exp(-sigma s')` with s' a voxel's height) and
    scaled to unit root mean square. Features are shifted to zero mean over occupied voxels and multiplied by the gate
    `alpha / (alpha + gate_alpha)`: a voxel that stops no light carries no features. One scale for all channels then
    gives them unit root mean square too; channels keep their proportions, because they are strongly correlated and a
    decoder that was trained on them expects the large ones to matter.

    Statistics are buffers; `fit` computes them from training voxels.

    Args:
        feature_channels: C.
        grid_shape: (Z, Y, X).
        aabb: corners of the box in metres.
        transform: of the density.
        log_scale: s in 1/m.
        gate_alpha: opacity of a voxel at which half of its features count; 0 keeps all.
    """

    density_scale: Tensor
    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(
        self,
        feature_channels: int,
        grid_shape: tuple[int, int, int],
        aabb: tuple[tuple[float, float, float], tuple[float, float, float]],
        transform: DensityTransform = "log",
        log_scale: float = 0.5,
        gate_alpha: float = 0.02,
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
        self.register_buffer("feature_scale", torch.ones(1))

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

    def gate(self, density: Tensor, dilate: bool = False) -> Tensor:
        """How much of a voxel's features counts, in [0, 1].

        Args:
            dilate: take the largest opacity among the voxel and its 26 neighbours: trilinear interpolation near a
                surface reads the features of empty voxels too.
        """
        if self.gate_alpha <= 0:
            return torch.ones_like(density)
        alpha = self.alpha(density)
        if dilate:
            alpha = F.max_pool3d(alpha, 3, stride=1, padding=1)
        return alpha / (alpha + self.gate_alpha)

    def normalise(self, grid: VoxelGrid, dilate: bool = False) -> Float[Tensor, "batch folded y x"]:
        """Normalised voxels, `[B, (1 + C) * Z, Y, X]`, density first; `dilate` as in `gate`."""
        density = self.compress(grid.density) / self.density_scale
        features = (grid.features - self.feature_mean.view(1, -1, 1, 1, 1)) / self.feature_scale
        return torch.cat([density, features * self.gate(grid.density, dilate)], dim=1).flatten(1, 2)

    def denormalise(self, folded: Float[Tensor, "batch folded y x"], aabb: Float[Tensor, "2 3"]) -> VoxelGrid:
        """Voxels of normalised ones; the inverse of `normalise` wherever the gate is open."""
        voxels = folded.unflatten(1, (-1, self.num_z))
        density = self.expand(voxels[:, :1] * self.density_scale)
        return VoxelGrid(density, voxels[:, 1:] * self.feature_scale + self.feature_mean.view(1, -1, 1, 1, 1), aabb)

    @torch.no_grad()
    def fit(self, grids: Iterable[VoxelGrid]) -> None:
        """Sets the statistics from training voxels."""
        sums = [self._sums(grid) for grid in grids]
        count, density_square, weight, gate_square, *features = (
            torch.stack(sums).sum(0).split([1, 1, 1, 1, *[len(self.feature_mean)] * 3])
        )
        weighted, gated, gated_square = features
        mean = weighted / weight.clamp(min=1e-12)
        feature_square = (gated_square - 2 * mean * gated + mean.square() * gate_square).mean() / count
        self.density_scale.copy_((density_square / count).sqrt().clamp(min=1e-6))
        self.feature_mean.copy_(mean)
        self.feature_scale.copy_(feature_square.clamp(min=1e-12).sqrt())

    def _sums(self, grid: VoxelGrid) -> Float[Tensor, " sums"]:
        """What the statistics of one batch add up from."""
        density, features = grid.density.double(), grid.features.double()
        alpha, gate = self.alpha(density), self.gate(density)
        scalars = [density.new_tensor(density.numel()), self.compress(density).square().sum(), alpha.sum()]
        axes = (0, 2, 3, 4)
        channels = [
            (features * alpha).sum(axes),
            (features * gate.square()).sum(axes),
            (features * gate).square().sum(axes),
        ]
        return torch.cat([torch.stack([*scalars, gate.square().sum()]), *channels]).cpu()


@torch.no_grad()
def linear_code(
    inputs: Float[Tensor, "samples size"],
    targets: Float[Tensor, "samples size"],
    num_components: int,
    weights: Float[Tensor, " size"],
) -> tuple[Float[Tensor, "components size"], Float[Tensor, "size components"], Tensor, Tensor]:
    """The linear code with the least weighted squared error, and how to read it.

    The encoder is a weighted PCA of the inputs; the decoder is the least-squares estimate of the targets from the code.
    The components are rotated so that all carry nearly equal variance: quantisation and diffusion, which treat all
    channels alike, then spread their errors evenly over the voxels.

    Args:
        inputs, targets: paired samples, more than components.
        weights: of each entry's squared error.

    Returns:
        encoder, decoder, mean input and mean target: `code = encoder @ (x - mean)`, `target ~ decoder @ code + mean`;
        codes have unit variance on average.
    """
    mean_input, mean_target = inputs.mean(0), targets.mean(0)
    root = weights.to(inputs).sqrt()
    centred = inputs - mean_input
    basis = _principal_directions(centred * root, num_components)
    projected = (centred * root) @ basis
    scale = projected.square().mean().clamp(min=1e-12).sqrt()
    rotation = _equalising_rotation(num_components).to(basis)
    encoder = rotation @ (basis * root[:, None]).T / scale
    codes = projected @ rotation.T / scale
    covariance = (codes.T @ codes).double()
    covariance += 1e-6 * covariance.diagonal().mean() * torch.eye(num_components).to(covariance)
    cross = (codes.T @ (targets - mean_target)).double()
    decoder = torch.linalg.solve(covariance, cross).T
    return encoder.float(), decoder.float(), mean_input, mean_target


def _principal_directions(samples: Float[Tensor, "samples size"], count: int) -> Float[Tensor, "size count"]:
    size = samples.shape[1]
    if size <= FULL_PCA:
        return torch.linalg.eigh((samples.T @ samples).double())[1].flip(1)[:, :count].to(samples.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.svd_lowrank(samples, q=min(count + 16, *samples.shape), niter=3)[2][:, :count]


def _equalising_rotation(size: int) -> Float[Tensor, "size size"]:
    """An orthogonal matrix whose entries have nearly equal magnitudes: the discrete Hartley transform."""
    angle = 2 * torch.pi * torch.outer(torch.arange(size), torch.arange(size)).double() / size
    return (angle.cos() + angle.sin()) / size**0.5
