"""Colours of one view moved into another."""

from __future__ import annotations

import math

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.generated.cameras import look_along
from nfldm_ns.metrics.consistency import reproject, reprojection_error
from nfldm_ns.scenes.views import Views, camera_rays, make_cameras

SIZE = 24


def cameras_at(positions: list[list[float]], yaws: list[float]) -> Cameras:
    """Level cameras that look along x at yaw 0."""
    poses = look_along(torch.tensor(positions), torch.tensor(yaws), torch.zeros(len(yaws)))
    return make_cameras(poses, 20.0, 20.0, SIZE / 2, SIZE / 2, SIZE, SIZE)


def wall_views(cameras: Cameras, frequency: float = 0.0) -> Views:
    """The wall x = 3: colours rise linearly with y and z, or wave."""
    origins, directions = camera_rays(cameras, SIZE, SIZE)
    depth = (3 - origins[:, None, None, 0]) / directions[..., 0]
    points = origins[:, None, None] + depth[..., None] * directions
    y, z = points[..., 1], points[..., 2]
    texture = torch.stack([y, z, y + z], dim=1) / 20
    if frequency:
        texture = torch.stack([torch.sin(frequency * y), torch.sin(frequency * z), torch.cos(frequency * y)], 1) / 4
    return Views(cameras, 0.5 + texture, depth[:, None])


def test_a_wall_seen_from_the_front_is_moved_exactly() -> None:
    """Shifts and coming closer map pixels to pixels linearly, so that bilinear sampling of a ramp is exact."""
    views = wall_views(cameras_at([[0.0, 0.3, 0.0], [0.5, 0.0, 0.2]], [0.0, 0.0]))
    others = wall_views(cameras_at([[0.0, 0.0, 0.0], [1.0, 0.1, 0.0]], [0.0, 0.0]))
    colours, visible = reproject(views, others.cameras, others.depths)
    seen = visible.expand_as(colours)
    assert torch.allclose(colours[seen], others.images[seen], atol=1e-5)
    assert visible[1].all(), "who comes closer sees a part of what was seen"
    columns = visible[0, 0].all(0)  # a shift by 0.3 m at 3 m is one of 2 pixels
    assert columns.sum() == SIZE - 2 and not columns[-2:].any()


def test_an_oblique_wall_is_moved_up_to_interpolation() -> None:
    views, others = (
        wall_views(cameras_at([[0.0, 0.0, 0.0]], [0.5]), 1.0),
        wall_views(cameras_at([[0.2] * 3], [0.3]), 1.0),
    )
    colours, visible = reproject(views, others.cameras, others.depths)
    assert visible.float().mean() > 0.5
    assert float((colours - others.images).abs()[visible.expand_as(colours)].max()) < 0.01


def test_hidden_and_unknown_surfaces_are_left_out() -> None:
    """A board before the wall hides more of it from one camera; the other must not take the board's colour for it."""
    cameras = cameras_at([[0.0, 0.0, 0.0], [0.0, 0.6, 0.0]], [0.0, 0.0])
    wall = wall_views(cameras)
    origins, directions = camera_rays(cameras, SIZE, SIZE)
    y = origins[:, None, None, 1] + 1.5 * directions[..., 1]
    board = (y.abs() < 0.3)[:, None]
    views = Views(
        cameras,
        torch.where(board, 1.0, wall.images),
        torch.where(board, 1.5 * torch.ones_like(wall.depths), wall.depths),
    )
    first, second = views[torch.tensor([0])], views[torch.tensor([1])]
    colours, visible = reproject(first, second.cameras, second.depths)
    seen = visible.expand_as(colours)
    assert torch.allclose(colours[seen], second.images[seen], atol=1e-5)
    assert (visible & (second.depths > 2)).any() and (visible & (second.depths < 2)).any()
    assert not visible.all()
    assert not reproject(first, second.cameras, torch.zeros_like(second.depths))[1].any()
    unknown = Views(first.cameras, first.images, torch.zeros_like(first.depths))
    assert not reproject(unknown, second.cameras, second.depths)[1].any()
    with pytest.raises(ValueError, match="depths"):
        reproject(Views(first.cameras, first.images), second.cameras, second.depths)


def test_the_error_is_what_views_disagree_by() -> None:
    path = wall_views(cameras_at([[0.0, 0.0, 0.0], [0.0, 0.3, 0.0], [0.0, 0.15, 0.1]], [0.0] * 3))
    clean = reprojection_error(path)
    assert clean["l1"] == pytest.approx(0, abs=1e-5) and clean["unmoved_l1"] > 0.003
    assert 0.85 < clean["visible"] < 1
    brighter: Tensor = path.images.clone()
    brighter[1] += 0.1  # of three pairs of neighbours two have this view
    assert reprojection_error(Views(path.cameras, brighter, path.depths))["l1"] == pytest.approx(0.2 / 3, rel=0.05)
    nothing = reprojection_error(Views(path.cameras, path.images, torch.zeros_like(path.depths)))
    assert nothing["visible"] == 0 and math.isnan(nothing["l1"])
