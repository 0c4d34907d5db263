"""What the generators of the baselines have in common: a latent vector to the voxels of a scene."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.autoencoder.background import BACKGROUND_MOMENTS
from nfldm_ns.scenes.voxel_grid import VoxelGrid

DENSITY_BIAS = -3.0  # before softplus: scenes begin nearly empty, as those of stage 1


class SceneGenerator(ModelMixin, ConfigMixin):
    """Latents to V. Subclasses say how by `voxels`; a new one is a file and a line in `registry.py`.

    All have these arguments, and may have others.

    Args:
        grid_shape: voxels (Z, Y, X).
        feature_channels: C of the voxels.
        background_channels: K of the code of what lies beyond the box.
        aabb: corners of the box in metres.
        latent_dim: of the latents of scenes.
        width: of the vector that all layers see.
    """

    config_name = "config.json"

    def build_shared(self, width: int) -> None:
        """What all generators need; to be called after `super().__init__()`."""
        config = self.config
        self.register_buffer("box", torch.tensor(config.aabb, dtype=torch.float32), persistent=False)
        self.mapping = nn.Sequential(
            nn.Linear(config.latent_dim, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)
        )
        self.background = nn.Linear(width, config.background_channels * BACKGROUND_MOMENTS)

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        """(Z, Y, X)."""
        return tuple(self.config.grid_shape)

    @property
    def latent_dim(self) -> int:
        return self.config.latent_dim

    @abstractmethod
    def voxels(
        self, style: Float[Tensor, "batch width"]
    ) -> tuple[Float[Tensor, "batch 1 z y x"], Float[Tensor, "batch channels z y x"]]:
        """Density before softplus, and features."""

    def forward(self, latents: Float[Tensor, "batch dim"]) -> VoxelGrid:
        """One scene per latent vector; standard normal ones in training and sampling, unless a prior gives them."""
        style = self.mapping(F.normalize(latents, dim=-1) * latents.shape[-1] ** 0.5)
        density, features = self.voxels(style)
        code = self.background(style).unflatten(1, (self.config.background_channels, BACKGROUND_MOMENTS))
        return VoxelGrid(F.softplus(density.float() + DENSITY_BIAS), features.float(), self.box, code.float())


def first_size(size: int, levels: int) -> int:
    """Cells of a side before it is doubled `levels - 1` times.

    Raises:
        ValueError: if the size cannot be halved so often.
    """
    factor = 2 ** (levels - 1)
    if size % factor:
        raise ValueError(f"{size} cells cannot be halved {levels - 1} times")
    return size // factor
