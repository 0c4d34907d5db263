"""Where a scene is looked at while it is refined."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.cameras import look_along
from nfldm_ns.scenes.views import make_cameras, resize_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid

TRIES = 16  # positions drawn per view until one is in free space


@dataclass
class ViewSamplingConfig:
    """Cameras drawn anew in every step, uniformly over positions and directions."""

    views_per_step: int = 4
    """Renders that a step learns from."""
    region: Literal["square", "disc"] = "square"
    """Around the scene's origin, at the height of its own cameras."""
    area: float = 6.0
    """Of the region in square metres; the paper's is 6."""
    pitch: float = 0.0
    """Cameras look up or down by at most this many degrees."""
    free_density: float = 1.0
    """Cameras stand only where the scene began with less density than this (1/m), not inside of walls."""

    def check(self) -> None:
        """Raises `UserInputError` for values that make no sense."""
        if self.views_per_step < 1 or not self.area > 0 or not 0 <= self.pitch < 90:
            raise UserInputError(
                "Views need at least 1 per step, an area above 0 and a pitch from 0 to 90 degrees: change these "
                "options."
            )


class ViewSampler:
    """Draws cameras with the intrinsics of a scene's own ones, cut to the square in their middle.

    Args:
        config: how.
        grid: the scene as it began.
        cameras: its own, batch shape `[N]`.

    Raises:
        UserInputError: if the region is larger than the scene's box.
    """

    def __init__(self, config: ViewSamplingConfig, grid: VoxelGrid, cameras: Cameras) -> None:
        config.check()
        self.config, self.grid = config, grid
        self.own_positions = cameras.camera_to_worlds[:, :, 3].float().cpu()
        self.height = self.own_positions[:, 2].mean()
        height, width = (int(size.reshape(-1)[0]) for size in (cameras.height, cameras.width))
        fx, fy, cx, cy = (float(getattr(cameras, name).reshape(-1)[0]) for name in ("fx", "fy", "cx", "cy"))
        self.side = min(height, width)
        self.intrinsics = (fx, fy, cx - (width - self.side) // 2, cy - (height - self.side) // 2)
        reach = self.reach
        low, high = grid.aabb[:, :2].cpu()
        if bool((low > -reach).any() or (high < reach).any()):
            raise UserInputError(
                f"Views up to {reach:.2f} m from the origin would stand outside of the scene's box: give a smaller "
                "--area."
            )

    @property
    def reach(self) -> float:
        """Half the side of the square, or the radius of the disc, in metres."""
        return math.sqrt(self.config.area / (4 if self.config.region == "square" else math.pi))

    def positions(self, count: int, generator: torch.Generator) -> Float[Tensor, "count 3"]:
        """Uniform in the free part of the region; one of the scene's own cameras where no free place was found."""
        drawn = torch.rand(count, TRIES, 2, generator=generator)
        if self.config.region == "square":
            offsets = self.reach * (2 * drawn - 1)
        else:
            radius, angle = self.reach * drawn[..., 0].sqrt(), 2 * math.pi * drawn[..., 1]
            offsets = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
        places = torch.cat([offsets, self.height.expand(count, TRIES, 1)], dim=-1)
        density, _ = self.grid.sample(places.reshape(1, -1, 3).to(self.grid.device))
        free = (density.reshape(count, TRIES) < self.config.free_density).cpu()
        first = free.float().argmax(1)
        own = self.own_positions[torch.randint(len(self.own_positions), (count,), generator=generator)]
        return torch.where(free.any(1, keepdim=True), places[torch.arange(count), first], own)

    def __call__(self, count: int, generator: torch.Generator) -> Cameras:
        """Cameras of batch shape `[1, count]` on the scene's device.

        Args:
            generator: on the CPU.
        """
        positions = self.positions(count, generator)
        yaw = 2 * math.pi * torch.rand(count, generator=generator)
        pitch = math.radians(self.config.pitch) * (2 * torch.rand(count, generator=generator) - 1)
        poses = look_along(positions, yaw, pitch)[None]
        return make_cameras(poses, *self.intrinsics, self.side, self.side).to(self.grid.device)


def judged_cameras(cameras: Cameras, renderer: SceneAutoencoder, image_size: int) -> Cameras:
    """Cameras with images of the size before the renderer's upsampler, unless a prior looks at more.

    Args:
        image_size: side of the images that the prior looks at.
    """
    height, width = (int(size.reshape(-1)[0]) for size in (cameras.height, cameras.width))
    size = (height // renderer.upsampling, width // renderer.upsampling)
    if height <= renderer.encoded_size[0] or image_size > min(size):
        return cameras
    return resize_cameras(cameras, *size)
