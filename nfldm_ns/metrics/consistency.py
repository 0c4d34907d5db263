"""Whether views of a scene agree: colours of one, moved into another by depth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.scenes.views import Views, camera_rays, project_points

DEPTH_TOLERANCE = 0.05  # relative; what differs by more is another surface


def reproject(
    views: Views, cameras: Cameras, depths: Float[Tensor, "views 1 height width"]
) -> tuple[Float[Tensor, "views 3 height width"], Bool[Tensor, "views 1 height width"]]:
    """What other cameras should see of the surfaces that views show.

    Every pixel of `cameras` is moved to its depth and from there into the view, whose colour there it takes
    (bilinear).

    Args:
        views: with depths, batch shape `[N]`.
        cameras: one for each of them, batch shape `[N]`, of the same image size.
        depths: planar depths in metres that these see; 0 is unknown.

    Returns:
        the colours, and the pixels that the view sees, too: inside of its image, and at the depth at which its own
        surface is, up to `DEPTH_TOLERANCE`. Pixels beside depth edges are left out with the hidden ones.

    Raises:
        ValueError: if the views have no depths.
    """
    if views.depths is None:
        raise ValueError("views without depths cannot be moved")
    height, width = views.image_size
    origins, directions = camera_rays(cameras, height, width)
    points = origins[:, None, None] + depths[:, 0, ..., None] * directions
    seen = project_points(views.cameras, points.flatten(1, 2))
    column, row, distance = (values.unflatten(1, (height, width)) for values in seen)
    place = torch.stack([2 * column / width - 1, 2 * row / height - 1], dim=-1)
    colours = F.grid_sample(views.images, place, align_corners=False)
    # The inverse of depth is linear in the pixels of a plane.
    known = views.depths > 0
    inverse = torch.where(known, 1 / views.depths.clamp(min=1e-6), torch.inf)
    there = 1 / F.grid_sample(inverse, place, align_corners=False)[:, 0]
    inside = (column >= 0.5) & (column <= width - 0.5) & (row >= 0.5) & (row <= height - 0.5)
    agrees = (there - distance).abs() <= DEPTH_TOLERANCE * distance
    visible = inside & agrees & (distance > 1e-6) & (depths[:, 0] > 0)
    return colours, visible[:, None]


def reprojection_error(path: Views) -> dict[str, float]:
    """How much the colours of neighbours on a closed path differ where both see the same surface.

    Args:
        path: views with depths along the path, batch shape `[N]`; the first is the last one's neighbour.

    Returns:
        `l1`: mean absolute difference in [0, 1] after one of the two was moved into the other; `unmoved_l1`: of the
        same pixels without moving it, which is how much there is to explain; `visible`: share of pixels that both see.
        Both are NaN if there are none.
    """
    count = path.shape[0]
    neighbours = path[torch.arange(1, count + 1) % count]
    assert neighbours.depths is not None
    colours, visible = reproject(path, neighbours.cameras, neighbours.depths)

    def difference(images: Tensor) -> float:
        error = (images.clamp(0, 1) - neighbours.images.clamp(0, 1)).abs()
        return float(error[visible.expand_as(error)].double().mean())

    return {
        "l1": difference(colours),
        "unmoved_l1": difference(path.images),
        "visible": float(visible.double().mean()),
    }
