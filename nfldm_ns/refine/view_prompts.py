"""Words that say where a view looks, for priors that know words (DreamFusion, Poole et al. 2023, Section 3.3)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

DIRECTIONS = ("front", "side", "back", "overhead")
OVERHEAD = math.radians(60)  # below the horizon
QUARTER = math.pi / 4


def prompts_by_direction(text: str) -> list[str]:
    """What is said of views in each of `DIRECTIONS`."""
    return [f"{text}, {direction} view" for direction in DIRECTIONS]


def view_directions(cameras: Cameras, front: Float[Tensor, " 3"] | None = None) -> Int[Tensor, "*batch"]:
    """Which of `DIRECTIONS` cameras look in, by yaw and pitch.

    Overhead are cameras that look down by more than 60 degrees; others are of the front if their yaw differs from that
    of `front` by at most 45 degrees, of the back from 135 degrees on, else of the side.

    Args:
        cameras: of any batch shape.
        front: a world direction; by default x.
    """
    ahead = -cameras.camera_to_worlds[..., :3, 2].float()
    front = ahead.new_tensor([1.0, 0, 0]) if front is None else front.to(ahead)
    yaw = torch.atan2(ahead[..., 1], ahead[..., 0]) - torch.atan2(front[1], front[0])
    turned = torch.atan2(yaw.sin(), yaw.cos()).abs()
    side, back, overhead = (DIRECTIONS.index(name) for name in ("side", "back", "overhead"))
    found = torch.full_like(turned, side, dtype=torch.long)
    found = found.masked_fill(turned <= QUARTER, DIRECTIONS.index("front")).masked_fill(turned >= 3 * QUARTER, back)
    return found.masked_fill(-ahead[..., 2] > math.sin(OVERHEAD), overhead)
