"""Scenes from above: free floor and walls in V and in maps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nfldm_ns.errors import UserInputError
from nfldm_ns.metrics.layout import Layout, LayoutSettings, agreement, map_layout, voxel_layout
from nfldm_ns.scenes.collection import BevClass
from nfldm_ns.scenes.voxel_grid import VoxelGrid, voxel_centres

BOX = torch.tensor([[-8.0, -8.0, -2.5], [8.0, 8.0, 4.0]])
SHAPE = (16, 48, 48)
CLASSES = [BevClass(i, name, (i, i, i)) for i, name in enumerate(("void", "floor", "step up", "closed"))]
SETTINGS = LayoutSettings()


def cells(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of a map's cells in metres, north up."""
    along = (np.arange(size) + 0.5) / size * 16 - 8
    return np.broadcast_to(along, (size, size)), np.broadcast_to(-along[:, None], (size, size))


def room_map(size: int = 96) -> np.ndarray:
    """A room that is longer to the north, with a niche in the east and a pillar in the south-west."""
    x, y = cells(size)
    room = (x > -3) & (x < 2) & (y > -4) & (y < 5)
    niche = (x >= 2) & (x < 5) & (y > -1) & (y < 1)
    pillar = (x > -2.4) & (x < -1) & (y > -2.4) & (y < -1)
    return ((room | niche) & ~pillar).astype(np.uint8)


def voxels_of(bev: np.ndarray, density: float = 8.0) -> VoxelGrid:
    """V with walls where a map has void, over a floor and under a ceiling."""
    points = voxel_centres(SHAPE, BOX)
    size = bev.shape[0]
    column = ((points[..., 0] + 8) / 16 * size).long()
    row = ((8 - points[..., 1]) / 16 * size).long()
    solid = torch.from_numpy(bev)[row, column] != 1
    solid |= (points[..., 2] < -1.6) | (points[..., 2] > 1.5)
    return VoxelGrid(density * solid.float()[None, None], torch.zeros(1, 1, *SHAPE), BOX)


def layout_of(bev: np.ndarray, settings: LayoutSettings = SETTINGS) -> Layout:
    return map_layout(bev[None], CLASSES, SHAPE[1:], BOX, settings)


def test_a_scene_agrees_with_its_map_and_with_no_turned_or_mirrored_one():
    bev = room_map()
    found = voxel_layout(voxels_of(bev))
    own = agreement(found, layout_of(bev))
    assert own["floor"].item() > 0.95 and own["wall"].item() > 0.75
    for other in (np.flipud(bev), np.fliplr(bev), np.rot90(bev)):
        scores = agreement(found, layout_of(np.ascontiguousarray(other)))
        assert scores["floor"].item() < 0.85 and scores["wall"].item() < 0.5
    assert agreement(found, found) == {"floor": 1, "wall": 1}


def test_floor_is_what_is_seen_and_walls_are_where_rays_end():
    layout = layout_of(room_map())
    points = voxel_centres((1, *SHAPE[1:]), BOX)[0, :, :, :2]

    def at(x: float, y: float) -> tuple[bool, bool, bool]:
        index = (points - torch.tensor([x, y])).norm(dim=-1).flatten().argmin()
        return tuple(bool(mask.flatten()[index]) for mask in (layout.floor, layout.wall, layout.judged))  # type: ignore

    assert at(0.2, 4.5) == (True, False, True), "north, as rows of voxels have it"
    assert at(4.5, 0.2) == (True, False, True), "the niche in the east"
    assert at(-3.2, 0.2) == (False, True, True), "the wall in the west"
    assert at(-5.0, 0.2) == (False, False, True), "behind it"
    assert at(-2.5, -2.7) == (False, False, True), "floor in the pillar's shadow"
    assert at(0.2, 7.0) == (False, False, False), "too far away"


def test_a_circular_room_has_the_area_of_a_disc_and_walls_of_a_ring():
    x, y = cells(320)
    layout = layout_of((np.hypot(x, y) < 4).astype(np.uint8))
    column = float(16 / 48) ** 2
    assert float(layout.floor.sum()) * column == pytest.approx(np.pi * 16, rel=0.05)
    assert float(layout.wall.sum()) * column == pytest.approx(np.pi * (4.7**2 - 4**2), rel=0.1)


def test_what_lies_behind_walls_does_not_matter():
    grid = voxels_of(room_map())
    found = voxel_layout(grid)
    points = voxel_centres(SHAPE, BOX)
    hidden = (points[..., 0] < -4.0) | (points[..., 1] < -5.0)
    hollow = torch.where(hidden, torch.rand(SHAPE) * 20, grid.density[0, 0])[None, None]
    other = voxel_layout(replace(grid, density=hollow))
    assert torch.equal(found.floor, other.floor) and torch.equal(found.wall, other.wall)


def test_low_and_high_things_and_haze_stop_no_ray():
    bev = room_map()
    grid = voxels_of(bev)
    heights = voxel_centres(SHAPE, BOX)[..., 2]
    low = torch.where((heights < -1.3) | (heights > 0.5), 10.0, grid.density[0, 0])[None, None]
    hazy = (grid.density + 0.05).clamp(max=8.0)
    for density in (low, hazy):
        scores = agreement(voxel_layout(replace(grid, density=density)), layout_of(bev))
        assert scores["floor"].item() > 0.95


def test_rays_over_steps_are_not_judged():
    bev = room_map()
    x, _ = cells(96)
    bev[(x > 1) & (bev == 1)] = 2
    layout, plain = layout_of(bev), layout_of(room_map())
    points = voxel_centres((1, *SHAPE[1:]), BOX)[0, :, :, :2]
    beyond = (points[..., 0] > 1.2) & (points[..., 1].abs() < 0.9) & plain.judged[0]
    assert beyond.any() and not layout.judged[0][beyond].any()
    west = (points[..., 0] < 0) & plain.judged[0]
    assert layout.judged[0][west].all()
    assert agreement(voxel_layout(voxels_of(room_map())), layout)["floor"].item() > 0.95
    bev[bev == 2] = 3  # closed: solid
    closed = layout_of(bev)
    assert closed.judged[0][beyond].all() and not closed.floor[0][beyond].any()


def test_layouts_are_selected_joined_and_drawn_north_up():
    bev = room_map()
    layouts = map_layout(np.stack([bev, np.flipud(bev)]), CLASSES, SHAPE[1:], BOX)
    assert torch.equal(Layout.cat([layouts[1], layouts[0]]).floor, layouts.rolled(1).floor)
    assert len(layouts) == 2 and torch.equal(layouts[-1].wall, layouts[1].wall)
    picture = layouts[0].picture(0)
    light = picture.amin(dim=0) > 0.8
    assert torch.equal(light, layouts.floor[0].flip(0)) and light[:24].sum() > light[24:].sum()


def test_nothing_in_common_is_no_number():
    closed = layout_of(np.zeros((64, 64), np.uint8))
    scores = agreement(closed, closed)
    assert scores["floor"].isnan().all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"solid": ("brick",)}, "No class of the maps is brick"),
        ({"band_m": (0.0, 0.01)}, "give a wider band"),
    ],
)
def test_bad_settings_are_said(change: dict, said: str):
    settings = replace(SETTINGS, **change)
    with pytest.raises(UserInputError, match=said):
        layout_of(room_map(), settings)
        voxel_layout(voxels_of(room_map()), settings)


def test_the_origin_must_lie_in_the_box():
    grid = voxels_of(room_map())
    with pytest.raises(UserInputError, match="outside the box"):
        voxel_layout(replace(grid, aabb=BOX + torch.tensor([9.0, 0.0, 0.0])))
