"""What renders voxels that no image encoder made, in several ways; a generated scene names its own.

| name | images of V |
|---|---|
| features | volume rendering of features and a neural image decoder: that of stage 1 (GSN, GIRAFFE) |
| colours | volume rendering of colours alone: no network has a say in an image (PlatonicGAN, GRAF) |
| projection | features at all depths of a ray, joined by a network instead of by density (HoloGAN) |
"""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401 (diffusers looks for it where a class is from)
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor, nn

from nfldm_ns.autoencoder.lifting import box_exit_depth
from nfldm_ns.autoencoder.renderer import FeatureMaps
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.scenes.views import camera_rays
from nfldm_ns.scenes.voxel_grid import VoxelGrid, sample_voxels

COLOUR_CHANNELS = 3
PROJECTED_WIDTH = 64
PROJECTED_AT_ONCE = 2**19  # samples whose features are in memory together, where there are no gradients


class SceneRenderer(SceneAutoencoder):
    """The renderer of stage 1 without what encodes images; its arguments are the same.

    All its parameters take part in every rendering.
    """

    @wraps(SceneAutoencoder.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.encoder = self.refiner = None  # type: ignore[assignment]
        for name in ("density_bias", "density_head", "prior_surface", "prior_empty", "prior_unknown"):
            if hasattr(self, name):
                delattr(self, name)


class PlainColours(nn.Module):
    """Stands for an image decoder where voxels hold colours: what was rendered, `stride` times larger."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(
        self,
        features: Float[Tensor, "batch channels h w"],
        accumulation: Float[Tensor, "batch 1 h w"],
        height: int | None = None,
    ) -> Float[Tensor, "batch 3 height width"]:
        """Images with colours around [-1, 1] (not clamped)."""
        if self.stride == 1:
            return features
        return F.interpolate(features, scale_factor=self.stride, mode="bilinear", align_corners=False)


class ColourRenderer(SceneRenderer):
    """Absorption and emission of colours, PlatonicGAN's (Henzler et al., ICCV 2019) and NeRF's image formation.

    A ray of length L through a constant density s and colour c before the background b is
    `(1 - exp(-s L)) c + exp(-s L) b`.

    Raises:
        ValueError: unless V has the three channels of a colour, in [-1, 1].
    """

    @wraps(SceneAutoencoder.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.feature_channels != COLOUR_CHANNELS:
            raise ValueError(f"colours have {COLOUR_CHANNELS} channels, not {self.feature_channels}")
        self.decoder = PlainColours(self.config.feature_stride)  # type: ignore[assignment]


class ProjectionRenderer(SceneRenderer):
    """HoloGAN's learned projection (Nguyen-Phuoc et al., ICCV 2019): V in the frustum of a camera, its depth collapsed.

    The features and the density of all samples of a ray, near to far, are one vector, of which a small network makes
    the feature of the ray. Nothing says that near things hide far ones, so views of one scene need not agree. Depth and
    accumulation are those of the density, which images do not have to follow.
    """

    @wraps(SceneAutoencoder.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        inputs = self.config.num_samples * (1 + self.feature_channels)
        self.projection = nn.Sequential(
            nn.Linear(inputs, PROJECTED_WIDTH), nn.LeakyReLU(0.2), nn.Linear(PROJECTED_WIDTH, self.feature_channels)
        )

    def feature_maps(
        self,
        grid: VoxelGrid,
        cameras: Cameras,
        rows: int,
        columns: int,
        num_feature_samples: int | None,
        skipping: bool | None = None,
    ) -> FeatureMaps:
        """As `SceneAutoencoder.feature_maps`, with features by the learned projection, before the background."""
        maps = super().feature_maps(grid, cameras, rows, columns, num_feature_samples, skipping)
        assert maps.background is not None
        projected = self._project(grid, cameras, rows, columns).unflatten(1, (cameras.shape[1], rows, columns))
        return replace(maps, features=projected.permute(0, 1, 4, 2, 3) + maps.background)

    def _project(self, grid: VoxelGrid, cameras: Cameras, rows: int, columns: int) -> Float[Tensor, "batch rays c"]:
        points = self._frustum(grid, cameras, rows, columns)
        voxels = torch.cat([grid.density, grid.features], dim=1).contiguous(memory_format=torch.channels_last_3d)
        at_once = points.shape[1] if torch.is_grad_enabled() else max(1, PROJECTED_AT_ONCE // points.shape[2])
        parts = [self.projection(sample_voxels(voxels, part).flatten(2)) for part in points.split(at_once, dim=1)]
        return torch.cat(parts, dim=1)

    def _frustum(
        self, grid: VoxelGrid, cameras: Cameras, rows: int, columns: int
    ) -> Float[Tensor, "batch rays samples 3"]:
        """Where the rays have their samples, in normalised coordinates: the places of volume rendering."""
        origins, directions = camera_rays(cameras, rows, columns)
        origins = origins[:, :, None, None].expand_as(directions).flatten(1, 3)
        directions = directions.flatten(1, 3)
        enter, leave = box_exit_depth(origins, directions, grid.aabb)
        start = torch.minimum(enter.clamp(min=self.config.near), leave)
        num_samples = self.config.num_samples
        share = (torch.arange(num_samples, device=grid.device) + 0.5) / num_samples
        depth = start[..., None] + (leave - start)[..., None] * share
        return grid.normalise(origins[:, :, None] + directions[:, :, None] * depth[..., None])


RENDERERS: dict[str, type[SceneRenderer]] = {
    "features": SceneRenderer,
    "colours": ColourRenderer,
    "projection": ProjectionRenderer,
}


def renderer_class(config: Any) -> type[SceneAutoencoder]:
    """The class that a configuration on disk names; stage 1 itself for names that are not known."""
    name = config.get("_class_name") if isinstance(config, dict) else None
    return next((cls for cls in RENDERERS.values() if cls.__name__ == name), SceneAutoencoder)
