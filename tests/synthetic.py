"""Scenes with known truth: rooms whose images and depths are traced exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.scenes.collection import BevClass, SceneCollection
from nfldm_ns.scenes.views import Views, camera_rays, make_cameras
from nfldm_ns.scenes.writing import write_collection, write_scene

AABB = ((-3.0, -3.0, -2.0), (3.0, 3.0, 2.0))
NEAR, FAR = 0.1, 10.0
BEV_CLASSES = (BevClass(0, "void", (0, 0, 0)), BevClass(1, "floor", (160, 160, 160)))
BEV_SIZE = 16


@dataclass
class BoxRoom:
    """An empty room seen from inside: six planes, each with its own colour and a smooth pattern.

    Attributes:
        corners: `[2, 3]`, minimum and maximum corner in metres.
        colors: `[2, 3, 3]`, RGB in [0, 1] of the face at the minimum and the maximum of x, y, z.
    """

    corners: Float[Tensor, "2 3"]
    colors: Float[Tensor, "2 3 3"]

    @staticmethod
    def random(generator: torch.Generator) -> BoxRoom:
        """A room inside `AABB` with its floor below and its ceiling above the origin."""
        size = torch.rand(2, 3, generator=generator)
        low = torch.tensor([-2.8, -2.8, -1.8]) + size[0] * torch.tensor([1.0, 1.0, 0.4])
        high = torch.tensor([2.8, 2.8, 1.8]) - size[1] * torch.tensor([1.0, 1.0, 0.8])
        return BoxRoom(torch.stack([low, high]), 0.3 + 0.6 * torch.rand(2, 3, 3, generator=generator))

    def trace(
        self, origins: Float[Tensor, "*batch 3"], directions: Float[Tensor, "*batch 3"]
    ) -> tuple[Float[Tensor, "*batch 3"], Float[Tensor, "*batch"]]:
        """Colour and distance, in lengths of `directions`, at which rays from inside the room meet it."""
        wall = torch.where(directions > 0, self.corners[1], self.corners[0])
        distance, axis = ((wall - origins) / directions).nan_to_num(nan=math.inf).min(dim=-1)
        side = (directions.gather(-1, axis[..., None])[..., 0] > 0).long()
        return self.color(origins + distance[..., None] * directions, side, axis), distance

    def color(
        self, points: Float[Tensor, "*batch 3"], side: Float[Tensor, "*batch"], axis: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch 3"]:
        """Colour of points on the face `side` (0 minimum, 1 maximum) of `axis`; varies slowly along the face."""
        waves = torch.cos(points * (2 * math.pi / 3.0)).scatter(-1, axis[..., None], 1.0)
        return self.colors[side, axis] * (0.85 + 0.15 * waves.prod(dim=-1, keepdim=True))

    def render(self, cameras: Cameras) -> Views:
        """Exact images and planar depths at the centres of the cameras' pixels."""
        height, width = int(cameras.height.reshape(-1)[0]), int(cameras.width.reshape(-1)[0])
        origins, directions = camera_rays(cameras, height, width)
        rgb, depth = self.trace(origins[..., None, None, :].expand_as(directions), directions)
        return Views(cameras, rgb.movedim(-1, -3), depth.unsqueeze(-3))

    def bev(self) -> np.ndarray:
        """`[h, w]` class ids, north up: floor inside the walls."""
        low, high = (np.array(corner) for corner in AABB)
        x = low[0] + (np.arange(BEV_SIZE) + 0.5) / BEV_SIZE * (high[0] - low[0])
        y = high[1] - (np.arange(BEV_SIZE) + 0.5) / BEV_SIZE * (high[1] - low[1])
        (x0, y0, _), (x1, y1, _) = self.corners.tolist()
        return (((y > y0) & (y < y1))[:, None] & ((x > x0) & (x < x1))[None]).astype(np.uint8)


def level_cameras(
    positions: Float[Tensor, "n 3"], yaws: Float[Tensor, " n"], image_size: int, field_of_view: float = math.pi / 2
) -> Cameras:
    """Upright cameras with square images; yaw in radians, counter-clockwise from x."""
    cos, sin, zero, one = yaws.cos(), yaws.sin(), torch.zeros_like(yaws), torch.ones_like(yaws)
    right, up, back = (torch.stack(axis, dim=-1) for axis in ((sin, -cos, zero), (zero, zero, one), (-cos, -sin, zero)))
    focal = torch.full_like(yaws, image_size / 2 / math.tan(field_of_view / 2))
    centre = torch.full_like(yaws, image_size / 2)
    camera_to_worlds = torch.stack([right, up, back, positions], dim=-1)
    return make_cameras(camera_to_worlds, focal, focal, centre, centre, image_size, image_size)


def surround_cameras(num_views: int, image_size: int, generator: torch.Generator, spread: float = 0.3) -> Cameras:
    """Cameras near the origin looking outward at evenly spaced yaws from a random first one."""
    positions = (2 * torch.rand(num_views, 3, generator=generator) - 1) * torch.tensor([spread, spread, 0.1])
    yaws = (torch.arange(num_views) / num_views + torch.rand(1, generator=generator)) * 2 * math.pi
    return level_cameras(positions, yaws, image_size)


def make_box_room_collection(
    root: Path,
    num_train: int = 3,
    num_test: int = 2,
    image_size: int = 32,
    seed: int = 0,
    *,
    num_val: int = 1,
    num_source: int = 8,
    num_target: int = 4,
    with_depth: bool = True,
) -> SceneCollection:
    """Writes a scene collection of random box rooms, exact in colour and depth up to the file formats.

    Args:
        root: folder to write.
        num_train, num_test, num_val: scenes per split.
        image_size: width and height of all images in pixels (90 degrees of view).
        seed: the same seed gives the same files.
        num_source, num_target: views per scene; sources look around, targets stand elsewhere.
        with_depth: False leaves out the depth maps.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = [f"room_{i:03d}" for i in range(num_train + num_val + num_test)]
    for scene_id in ids:
        room = BoxRoom.random(generator)
        source = room.render(surround_cameras(num_source, image_size, generator))
        target = room.render(surround_cameras(num_target, image_size, generator, spread=0.6))
        if not with_depth:
            source.depths = target.depths = None
        write_scene(root / "scenes" / scene_id, source, target, room.bev(), BEV_CLASSES)
    write_collection(
        root,
        name="box-rooms",
        licence="CC0-1.0",
        aabb=AABB,
        near=NEAR,
        far=FAR,
        image_size=(image_size, image_size),
        splits={
            "train": ids[:num_train],
            "val": ids[num_train : num_train + num_val],
            "test": ids[num_train + num_val :],
        },
        places={scene_id: {"map": "rooms", "origin": [20.0 * i, 0.0, 0.0]} for i, scene_id in enumerate(ids)},
        bev_classes=BEV_CLASSES,
        made_by={"command": "make_box_room_collection", "seed": seed},
    )
    return SceneCollection.open(root)
