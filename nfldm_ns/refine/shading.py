"""Renders lit by a lamp: what shows geometry that textures hide (DreamFusion, Poole et al. 2023, Section 3.1).

A render x with normals n at the places p that its rays meet, lit by a point lamp at l, is

    x (ambient + (1 - ambient) max(0, n . (l - p) / |l - p|)),

and a textureless one has white in the place of x, so that nothing but geometry can answer to the prior.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.autoencoder.renderer import render_feature_maps
from nfldm_ns.autoencoder.scene_autoencoder import RenderedViews
from nfldm_ns.refine.settings import ShadingConfig
from nfldm_ns.scenes.views import camera_rays
from nfldm_ns.scenes.voxel_grid import VoxelGrid

LEAST_LENGTH = 1e-6


def density_normals(grid: VoxelGrid) -> Float[Tensor, "batch 3 z y x"]:
    """-grad density (1/m^2) at the voxels' centres by central differences: it points out of what is dense.

    At the box's border densities count as going on.
    """
    padded = F.pad(grid.density, (1,) * 6, mode="replicate")
    middle = slice(1, -1)
    along_x = padded[..., middle, middle, 2:] - padded[..., middle, middle, :-2]
    along_y = padded[..., middle, 2:, middle] - padded[..., middle, :-2, middle]
    along_z = padded[..., 2:, middle, middle] - padded[..., :-2, middle, middle]
    return -torch.cat([along_x, along_y, along_z], dim=1) / (2 * grid.voxel_size.view(1, 3, 1, 1, 1))


def seen_normals(
    grid: VoxelGrid, cameras: Cameras, rows: int, columns: int, near: float, num_samples: int
) -> Float[Tensor, "batch views 3 rows columns"]:
    """Unit normals of what `rows` x `columns` rays meet, as the direction of the mean of -grad density along each."""
    normals = VoxelGrid(grid.density, density_normals(grid), grid.aabb)
    maps = render_feature_maps(normals, cameras, rows, columns, near, num_samples, skipping=False)
    return F.normalize(maps.features, dim=2, eps=LEAST_LENGTH)


def lambertian(
    normals: Float[Tensor, "*batch 3 rows columns"],
    points: Float[Tensor, "*batch 3 rows columns"],
    lamps: Float[Tensor, "*batch 3"],
    ambient: float,
) -> Float[Tensor, "*batch 1 rows columns"]:
    """How much light comes back from points, in [ambient, 1]; lamps shine alike at all distances."""
    towards = F.normalize(lamps[..., None, None] - points, dim=-3, eps=LEAST_LENGTH)
    return ambient + (1 - ambient) * (normals * towards).sum(-3, keepdim=True).clamp(min=0)


class Shading:
    """Which views of a step are lit, by which lamps, and which of these have no texture.

    Args:
        lit, textureless: `[N]`; the latter are lit, too.
        lamps: `[N, 3]`, from the cameras to the lamps in metres.
        ambient: see `ShadingConfig`.
    """

    def __init__(
        self, lit: Bool[Tensor, " views"], textureless: Bool[Tensor, " views"], lamps: Tensor, ambient: float
    ) -> None:
        self.lit, self.textureless, self.lamps, self.ambient = lit, textureless, lamps, ambient

    @staticmethod
    def draw(config: ShadingConfig, count: int, generator: torch.Generator) -> Shading | None:
        """For the views of a step; None, and nothing is drawn, if none is ever lit.

        Lamps are normally distributed around the cameras.
        """
        if not config.shaded_share + config.textureless_share:
            return None
        choice = torch.rand(count, generator=generator)
        textureless = choice < config.textureless_share
        lit = choice < config.textureless_share + config.shaded_share
        lamps = config.lamp_distance * torch.randn(count, 3, generator=generator)
        return Shading(lit, textureless, lamps, config.ambient)

    def __call__(
        self, rendered: RenderedViews, grid: VoxelGrid, cameras: Cameras, near: float, num_samples: int
    ) -> Float[Tensor, "views 3 height width"]:
        """Views of one scene, those that are lit in their light; gradients reach the density through its normals too.

        Args:
            rendered: of cameras `[1, N]`.
            near, num_samples: of the rays that normals are looked at along.
        """
        rgb = rendered.rgb[0]
        if not bool(self.lit.any()):
            return rgb
        rows, columns = rendered.maps.depth.shape[-2:]
        normals = seen_normals(grid, cameras, rows, columns, near, num_samples)[0]
        origins, directions = camera_rays(cameras, rows, columns)
        points = origins[0, :, :, None, None] + rendered.maps.depth[0] * directions[0].movedim(-1, 1)
        light = lambertian(normals, points, origins[0] + self.lamps.to(origins), self.ambient)
        light = 1 + rendered.maps.accumulation[0] * (light - 1)  # nothing lights what lies beyond the box
        light = F.interpolate(light, rgb.shape[-2:], mode="bilinear", align_corners=False)
        lit, textureless = (which.to(rgb.device).view(-1, 1, 1, 1) for which in (self.lit, self.textureless))
        surface = torch.where(textureless, torch.ones_like(rgb), rgb)
        return torch.where(lit, surface * light, rgb)
