"""Voxels from three planes: EG3D's generator."""

from __future__ import annotations

import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401 (diffusers looks for it where a class is from)
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.baselines.scene_generator import SceneGenerator
from nfldm_ns.baselines.synthesis import MapSynthesis
from nfldm_ns.baselines.voxel_generator import Corner


class TriplaneGenerator(SceneGenerator):
    """A latent to three planes of features, and a small network that makes voxels of what they hold (EG3D).

    A point's features are the sum of those that the planes (x, y), (x, z) and (y, z) hold at its projections (Chan et
    al., CVPR 2022, Sec. 4.1). They are read at the centres of voxels, so that V is rendered as every other.

    Args:
        plane_size: cells of each plane's sides.
        plane_channels: of each plane.
        channels: widths of the planes' layers, coarsest first.
        hidden: width of the small network.
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
        plane_size: int = 32,
        plane_channels: int = 16,
        hidden: int = 32,
    ) -> None:
        super().__init__()
        self.build_shared(width)
        self.synthesis = MapSynthesis(width, (plane_size, plane_size), tuple(channels), 3 * plane_channels)
        self.head = nn.Sequential(
            nn.Conv3d(plane_channels, hidden, 1), nn.Softplus(), nn.Conv3d(hidden, 1 + feature_channels, 1)
        )

    def voxels(
        self, style: Float[Tensor, "batch width"]
    ) -> tuple[Float[Tensor, "batch 1 z y x"], Float[Tensor, "batch channels z y x"]]:
        planes = self.synthesis(style).unflatten(1, (3, -1))
        values = self.head(look_up_planes(planes, self.grid_shape))
        return values[:, :1], values[:, 1:]


def look_up_planes(
    planes: Float[Tensor, "batch 3 channels rows columns"], grid_shape: tuple[int, int, int]
) -> Float[Tensor, "batch channels z y x"]:
    """Sums of what three planes hold at the projections of the centres of voxels, bilinear; borders go on outside.

    Args:
        planes: (x, y), (x, z) and (y, z), the first axis of each along its columns.
        grid_shape: (Z, Y, X).
    """
    z, y, x = grid_shape

    def resized(plane: int, rows: int, columns: int) -> Tensor:
        return F.interpolate(planes[:, plane], size=(rows, columns), mode="bilinear", align_corners=False)

    return resized(0, y, x)[:, :, None] + resized(1, z, x)[:, :, :, None] + resized(2, z, y)[..., None]
