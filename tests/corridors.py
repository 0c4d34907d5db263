"""Captures that walk through corridors, whose images and depths are traced exactly."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.scenes.views import Views, camera_rays
from nfldm_ns.scenes.writing import write_scene
from tests.synthetic import level_cameras

EYE = 1.5
CEILING = 2.8


@dataclass
class Corridors:
    """What is inside of any of some rectangles, between a floor at z = 0 and a ceiling.

    Attributes:
        rectangles: `[R, 2, 2]`, minimum and maximum corner in x and y, in metres.
    """

    rectangles: Float[Tensor, "rectangles 2 2"]

    def distance(
        self, origins: Float[Tensor, "*batch 3"], directions: Float[Tensor, "*batch 3"]
    ) -> Float[Tensor, "*batch"]:
        """Where rays from inside leave, in lengths of `directions`."""
        flat = directions[..., None, :2].double()
        flat = torch.where(flat.abs() < 1e-9, 1e-9, flat)
        ends = (self.rectangles.double() - origins[..., None, None, :2]) / flat[..., None, :]
        begin, end = ends.amin(dim=-2).amax(dim=-1), ends.amax(dim=-2).amin(dim=-1)
        reached = torch.zeros_like(begin[..., 0])
        for _ in self.rectangles:
            inside = (begin <= reached[..., None] + 1e-6) & (end >= reached[..., None])
            reached = torch.where(inside, end, 0).amax(dim=-1).maximum(reached)
        z, slope = origins[..., 2].double(), directions[..., 2].double()
        slope = torch.where(slope.abs() < 1e-9, 1e-9, slope)
        across = torch.where(slope < 0, -z / slope, (CEILING - z) / slope)
        return reached.minimum(across).float()

    def render(self, cameras: Cameras) -> Views:
        """Images whose colours are smooth in the world, and planar depths, at the centres of pixels."""
        height, width = int(cameras.height.reshape(-1)[0]), int(cameras.width.reshape(-1)[0])
        origins, directions = camera_rays(cameras, height, width)
        origins = origins[..., None, None, :].expand_as(directions)
        depth = self.distance(origins, directions)
        points = origins + depth[..., None] * directions
        rgb = 0.5 + 0.4 * torch.sin(points * torch.tensor([1.1, 1.7, 2.3]) + torch.tensor([0.0, 1.0, 2.0]))
        return Views(cameras, rgb.movedim(-1, -3), depth.unsqueeze(-3))


L_SHAPED = Corridors(torch.tensor([[[0.0, 0.0], [14.0, 3.0]], [[11.0, 0.0], [14.0, 14.0]]]))
L_CORNERS = ((1.0, 1.5), (12.5, 1.5), (12.5, 13.0))
PARALLEL = Corridors(torch.tensor([[[0.0, 0.0], [10.0, 2.0]], [[0.0, 2.4], [10.0, 4.4]], [[8.0, 0.0], [10.0, 4.4]]]))
PARALLEL_CORNERS = ((1.0, 1.0), (9.0, 1.0), (9.0, 3.4), (1.0, 3.4))


def walk(corners: tuple[tuple[float, float], ...], step: float, image_size: int, swing: float = 1.9) -> Cameras:
    """Level cameras along straight ways between corners, looking to both sides as they go (radians)."""
    positions, headings = [], []
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        count = round(math.hypot(x1 - x0, y1 - y0) / step)
        for i in range(count):
            positions.append((x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count, EYE))
            headings.append(math.atan2(y1 - y0, x1 - x0))
    yaws = torch.tensor(headings) + swing * torch.sin(torch.arange(len(headings)) * 2 * math.pi / 11)
    return level_cameras(torch.tensor(positions), yaws, image_size)


def write_capture(folder: Path, views: Views) -> Path:
    """As another tool leaves it: all frames alike, none split off."""
    write_scene(folder, views, views[:0])
    path = folder / "transforms.json"
    content = json.loads(path.read_text())
    for split in ("train", "val", "test"):
        del content[f"{split}_filenames"]
    path.write_text(json.dumps(content))
    return folder
