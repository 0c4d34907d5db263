"""Voxels from a floor plan of local codes: GSN's and GIRAFFE's idea."""

from __future__ import annotations

from diffusers import ModelMixin  # noqa: F401 (diffusers looks for it where a class is from)
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor

from nfldm_ns.baselines.scene_generator import SceneGenerator
from nfldm_ns.baselines.synthesis import MapSynthesis

Corner = tuple[float, float, float]


class VoxelGenerator(SceneGenerator):
    """A latent to a map from above, of which every cell holds a column of voxels.

    GSN (DeVries et al., ICCV 2021) makes a floor plan of local latents, each of which conditions a radiance field; here
    a cell's code is the column of V itself, as everywhere in this package.

    Args:
        channels: widths of the map's layers, coarsest first.
    """

    @register_to_config
    def __init__(
        self,
        grid_shape: tuple[int, int, int] = (12, 32, 32),
        feature_channels: int = 16,
        background_channels: int = 8,
        aabb: tuple[Corner, Corner] = ((-10, -10, -2.5), (10, 10, 4)),
        latent_dim: int = 128,
        width: int = 128,
        channels: tuple[int, ...] = (128, 64, 48),
    ) -> None:
        super().__init__()
        self.build_shared(width)
        z, y, x = grid_shape
        self.synthesis = MapSynthesis(width, (y, x), tuple(channels), (1 + feature_channels) * z)

    def voxels(
        self, style: Float[Tensor, "batch width"]
    ) -> tuple[Float[Tensor, "batch 1 z y x"], Float[Tensor, "batch channels z y x"]]:
        columns = self.synthesis(style).unflatten(1, (1 + self.config.feature_channels, self.grid_shape[0]))
        return columns[:, :1], columns[:, 1:]
