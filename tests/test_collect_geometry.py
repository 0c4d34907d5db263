"""Geometry of Doom maps: ray casts, sight, sectors, maps from above, and WAD files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nfldm_ns.collect.doom_geometry import EYE_HEIGHT, DoomGeometry
from nfldm_ns.collect.doom_scenes import refine_depth
from nfldm_ns.collect.doom_wad import Wad, write_static_maps
from nfldm_ns.collect.level_cameras import level_poses, share_inside
from nfldm_ns.errors import UserInputError
from tests.doom_maps import box_room, freedoom, two_rooms
from tests.synthetic import BoxRoom, level_cameras

TANGENT = 0.625
FAR = 2000.0


@pytest.mark.parametrize("angle", [0.0, 37.0, 90.0, 200.5])
def test_ray_cast_of_a_box_room_is_exact(angle: float) -> None:
    eye = np.array([31.0, -57.0, EYE_HEIGHT])
    depth = DoomGeometry(box_room()).cast(eye[None], np.array([angle]), 24, TANGENT, FAR)[0]
    room = BoxRoom(torch.tensor([[-256.0, -256, 0], [256, 256, 128]]), torch.zeros(2, 3, 3))
    cameras = level_cameras(
        torch.tensor(eye[None], dtype=torch.float32),
        torch.tensor([math.radians(angle)]),
        24,
        field_of_view=2 * math.atan(TANGENT),
    )
    expected = room.render(cameras).depths
    assert expected is not None
    np.testing.assert_allclose(depth, expected[0, 0].numpy(), rtol=1e-4)


def test_each_view_of_a_batch_is_cast_from_its_own_eye() -> None:
    geometry = DoomGeometry(two_rooms())
    eyes = np.array([[-200.0, 30, EYE_HEIGHT], [100, -10, 16 + EYE_HEIGHT], [-10, 0, EYE_HEIGHT]])
    angles = np.array([10.0, 170.0, 300.0])
    together = geometry.cast(eyes, angles, 12, TANGENT, FAR)
    for i in range(3):
        np.testing.assert_array_equal(
            together[i], geometry.cast(eyes[i : i + 1], angles[i : i + 1], 12, TANGENT, FAR)[0]
        )


def middle_column(geometry: DoomGeometry, size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and depths of the view to the east from (-100, 0), from top to bottom."""
    depth = geometry.cast(np.array([[-100.0, 0, EYE_HEIGHT]]), np.zeros(1), size, TANGENT, FAR)[0]
    slopes = -((np.arange(size) + 0.5) / size * 2 - 1) * TANGENT
    return slopes, depth[:, size // 2]


def test_steps_and_lintels_are_walls() -> None:
    slopes, depth = middle_column(DoomGeometry(two_rooms(step=16, lintel=60)))
    height = EYE_HEIGHT + 100 * slopes
    step = (height > 0) & (height < 16)
    lintel = (height > 60) & (height < 128)
    assert step.any() and lintel.any()
    np.testing.assert_allclose(depth[step | lintel], 100)
    floor = height < 0
    np.testing.assert_allclose(depth[floor], -EYE_HEIGHT / slopes[floor])
    raised_floor = (height > 16) & (EYE_HEIGHT + 356 * slopes < 16)
    np.testing.assert_allclose(depth[raised_floor], (16 - EYE_HEIGHT) / slopes[raised_floor])
    np.testing.assert_allclose(depth[np.abs(slopes) < 0.01], 356)


def test_sky_is_infinitely_far_and_hides_no_wall_between_skies() -> None:
    slopes, depth = middle_column(DoomGeometry(two_rooms(0, 60, b"F_SKY1", b"F_SKY1")))
    assert np.isinf(depth[EYE_HEIGHT + 100 * slopes > 60]).all()
    slopes, depth = middle_column(DoomGeometry(two_rooms(0, 60, b"F_SKY1", b"CEIL1")))
    wall = (EYE_HEIGHT + 100 * slopes > 60) & (EYE_HEIGHT + 100 * slopes < 128)
    np.testing.assert_allclose(depth[wall], 100)


def test_sectors_of_points() -> None:
    geometry = DoomGeometry(two_rooms())
    points = np.array([[-100.0, 0], [100, 0], [0.5, 255], [300, 0], [0, 300], [-1000, 0]])
    assert geometry.sector_at(points).tolist() == [0, 1, 1, -1, -1, -1]
    assert geometry.sector_at(np.array([[-100.0, 256], [-100, -256]])).tolist()[1] == 0  # on a wall, nudged inside


def test_clearance_is_the_distance_to_what_cannot_be_crossed() -> None:
    points = np.array([[-30.0, 0], [-100, 236], [-226, 0]])
    np.testing.assert_allclose(DoomGeometry(two_rooms(step=16)).clearance(points), [64, 20, 30])
    np.testing.assert_allclose(DoomGeometry(two_rooms(step=32)).clearance(points), [30, 20, 30])
    np.testing.assert_allclose(DoomGeometry(two_rooms(step=16, lintel=60)).clearance(points), [30, 20, 30])


def test_line_of_sight_passes_through_openings_only() -> None:
    eye = np.array([-100.0, 0, EYE_HEIGHT])
    points = np.array([[100.0, 0, EYE_HEIGHT], [100, 0, 10], [-50, 40, 5], [400, 0, EYE_HEIGHT]])
    assert DoomGeometry(two_rooms(step=30)).sees(eye, points).tolist() == [True, False, True, False]


def test_maps_from_above_are_north_up_and_tell_steps_from_liquids() -> None:
    corners = np.array([[-256.0, -320], [256, 320]])
    centre = np.array([0.0, 0, EYE_HEIGHT])
    bev = DoomGeometry(two_rooms(step=16)).bev(centre, corners, 20)
    assert set(np.unique(bev[2:18, :10])) == {1} and set(np.unique(bev[2:18, 10:])) == {2}
    assert (bev[[0, 1, -2, -1]] == 0).all()
    assert (DoomGeometry(two_rooms(step=-16)).bev(centre, corners, 20)[10, 15]) == 3
    assert (DoomGeometry(two_rooms(liquid=True)).bev(centre, corners, 20)[10, 15]) == 4
    assert (DoomGeometry(two_rooms(near_flat=b"F_SKY1")).bev(centre, corners, 20)[10, 5]) == 5
    assert (DoomGeometry(two_rooms(step=100, lintel=100)).bev(centre, corners, 20)[10, 15]) == 6
    north = DoomGeometry(two_rooms()).bev(np.array([0.0, 100, EYE_HEIGHT]), corners, 20)
    assert north[4, 5] == 0 and north[19, 5] == 1


def test_depth_is_exact_where_the_buffer_agrees_and_the_buffers_elsewhere() -> None:
    exact = np.array([4.00, 4.00, np.inf, np.inf, 9.0])
    buffer = np.array([4.15, 2.00, 3.0, np.inf, np.inf])
    assert refine_depth(exact, buffer).tolist() == [4.0, 2.0, 3.0, np.inf, np.inf]


def test_poses_look_along_their_angle() -> None:
    pose = level_poses(np.array([[1.0, 2, 3]]), np.array([90.0]))[0]
    np.testing.assert_allclose(-pose[:, 2], [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(pose[:, 1], [0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(pose[:, :3]), 1)
    np.testing.assert_allclose(pose[:, 3], [1, 2, 3])


def test_share_of_surfaces_inside_the_box() -> None:
    poses = level_poses(np.zeros((1, 3)), np.zeros(1))
    box = np.array([[-1.0, -1, -1], [5, 1, 1]])
    depths = np.full((1, 2, 2), 1.0)
    assert share_inside(depths, poses, box) == 1
    depths[0, 0, 0] = np.inf
    depths[0, 0, 1] = 6
    assert share_inside(depths, poses, box) == 0.5


# WAD files


def test_static_maps_keep_the_geometry(tmp_path: Path) -> None:
    wad = freedoom()
    write_static_maps(wad, ["MAP01", "MAP02"], tmp_path / "static.wad", keep_sprites=False, min_light=200)
    static = Wad(tmp_path / "static.wad")
    assert static.map_names == ["MAP01", "MAP02"]
    before, after = wad.read_map("MAP02"), static.read_map("MAP02")
    for name in ("lines", "sides", "vertices"):
        assert getattr(before, name).tobytes() == getattr(after, name).tobytes()
    assert (before.sectors["floor"] == after.sectors["floor"]).all()
    assert after.sectors["light"].min() >= 200 > before.sectors["light"].min()
    assert set(after.things["type"]) <= {1, 2, 3, 4, 11, 14} and 1 in after.things["type"]
    assert not set(after.sectors["special"]) & {1, 2, 3, 4, 8, 12, 13, 17}


def test_sprites_can_stay(tmp_path: Path) -> None:
    wad = freedoom()
    write_static_maps(wad, ["MAP01"], tmp_path / "static.wad", keep_sprites=True, min_light=0)
    kept = Wad(tmp_path / "static.wad").read_map("MAP01")
    assert kept.things.tobytes() == wad.read_map("MAP01").things.tobytes()


def test_broken_wad_files_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "short.wad").write_bytes(b"IWAD")
    (tmp_path / "other.wad").write_bytes(b"ZIP!" + bytes(20))
    for name, message in (("none", "no WAD file"), ("short", "not a whole WAD"), ("other", "not a WAD")):
        with pytest.raises(UserInputError, match=message):
            Wad(tmp_path / f"{name}.wad")
