"""Where cameras stand and which places each split may use."""

from __future__ import annotations

import numpy as np
import pytest

from nfldm_ns.collect.doom_collection import choose_maps, known_maps, share_out, split_maps
from nfldm_ns.collect.doom_geometry import EYE_HEIGHT, UNITS_PER_METRE, DoomGeometry
from nfldm_ns.collect.doom_places import (
    NUM_SOURCE_VIEWS,
    RigOptions,
    can_stand,
    candidate_spots,
    eyes_at,
    hold_out_regions,
    in_split,
    plan_rig,
)
from nfldm_ns.errors import UserInputError
from tests.doom_maps import box_room, freedoom, two_rooms


def test_players_stand_on_the_highest_floor_they_touch() -> None:
    geometry = DoomGeometry(two_rooms(step=16))
    points = np.array([[-100.0, 0], [-10, 0], [100, 0]])
    np.testing.assert_array_equal(eyes_at(geometry, points)[:, 2], [EYE_HEIGHT, EYE_HEIGHT + 16, EYE_HEIGHT + 16])
    outside = np.array([[-250.0, 0], [300, 0], [-100, 0]])
    assert can_stand(geometry, outside).tolist() == [False, False, True]


def test_candidates_keep_their_distance() -> None:
    doom_map = box_room(half=512)
    geometry = DoomGeometry(doom_map)
    spots = candidate_spots(doom_map, geometry, [0], 1.5)
    gaps = np.hypot(*(spots[:, None] - spots).transpose(2, 0, 1)) + 1e9 * np.eye(len(spots))
    assert gaps.min() > 1.5 * UNITS_PER_METRE - 1e-6
    area = np.pi * (6 * UNITS_PER_METRE) ** 2
    assert len(spots) > 0.9 * area / (1.5 * UNITS_PER_METRE) ** 2
    np.testing.assert_array_equal(spots, candidate_spots(doom_map, geometry, [0], 1.5))
    assert not np.array_equal(spots[:5], candidate_spots(doom_map, geometry, [1], 1.5)[:5])


def test_candidates_snap_to_the_centres_of_squares() -> None:
    doom_map = box_room(half=1024)
    spots = candidate_spots(doom_map, DoomGeometry(doom_map), [0], 2.5, snap=2.5)
    assert len(spots) > 10
    assert np.array_equal(spots % 64, np.full_like(spots, 32))
    assert len(np.unique(spots, axis=0)) == len(spots)


def test_rigs_look_around_and_keep_the_place_in_sight() -> None:
    doom_map = freedoom().read_map("MAP08")
    geometry = DoomGeometry(doom_map)
    options = RigOptions()
    spots = candidate_spots(doom_map, geometry, [0], 4.0)[:40]
    rigs = [(s, plan_rig(geometry, s, np.random.default_rng(i), options)) for i, s in enumerate(spots)]
    planned = [(spot, rig) for spot, rig in rigs if rig is not None]
    assert len(planned) >= 5
    for spot, rig in planned:
        assert rig.eyes.shape == (12, 3)
        place = eyes_at(geometry, spot[None])[0]
        assert geometry.sees(place, rig.eyes).all()
        assert can_stand(geometry, rig.eyes[:, :2]).all()
        distance = np.hypot(*(rig.eyes[:, :2] - spot).T) / UNITS_PER_METRE
        assert distance[:NUM_SOURCE_VIEWS].max() <= options.source_jitter
        assert options.min_target_distance <= distance[NUM_SOURCE_VIEWS:].min()
        assert distance.max() <= options.target_distance
        turns = np.diff(rig.angles[:NUM_SOURCE_VIEWS]) % 360
        assert (np.abs(turns - 45) <= 2 * options.yaw_jitter).all()


def test_no_rig_where_nobody_can_stand() -> None:
    geometry = DoomGeometry(two_rooms())
    assert plan_rig(geometry, np.array([400.0, 0]), np.random.default_rng(0), RigOptions()) is None


def test_held_out_places_are_further_than_the_box_from_all_others() -> None:
    spots = np.random.default_rng(0).uniform(-2000, 2000, (1500, 2)) * [1, 0.4]
    gap = 500.0
    regions = hold_out_regions(spots, {"test": 0.1, "val": 0.05}, gap)
    members = {split: spots[in_split(spots, split, regions, gap)] for split in ("train", "val", "test")}
    assert len(members["test"]) == pytest.approx(150, abs=2)
    assert len(members["val"]) == pytest.approx(75, abs=2)
    assert len(members["train"]) > 600
    for a, b in (("train", "test"), ("train", "val"), ("val", "test")):
        assert np.abs(members[a][:, None] - members[b]).max(axis=-1).min() > gap


def test_quotas_add_up_and_respect_what_there_is() -> None:
    inf = float("inf")
    assert share_out(10, [inf, inf, inf]) == [4, 3, 3]
    assert share_out(10, [1, inf, inf]) == [1, 5, 4]
    assert share_out(10, [2, 3]) == [2, 3]
    assert share_out(3, []) == []


def test_whole_maps_are_held_out() -> None:
    maps = [f"m{i}" for i in range(20)]
    split = split_maps(maps, [], {"test": 0.1, "val": 0.05}, seed=0)
    assert [list(split.values()).count(name) for name in ("train", "val", "test")] == [17, 1, 2]
    assert split == split_maps(maps, [], {"test": 0.1, "val": 0.05}, seed=0)
    assert split != split_maps(maps, [], {"test": 0.1, "val": 0.05}, seed=1)
    chosen = split_maps(maps, ["m3"], {"test": 0.1}, seed=0)
    assert [name for name, which in chosen.items() if which == "test"] == ["m3"]


def test_maps_are_chosen_by_name_or_glob() -> None:
    known = known_maps(["*"])
    assert len(known) == 68
    assert choose_maps(["mazes/MAZE000[01]"], known_maps(["mazes/MAZE000[01]"])) == ["mazes/MAZE0000", "mazes/MAZE0001"]
    assert choose_maps(["freedoom2/MAP01", "freedoom1/E1M[12]"], known) == [
        "freedoom1/E1M1",
        "freedoom1/E1M2",
        "freedoom2/MAP01",
    ]
    with pytest.raises(UserInputError, match="No map matches 'doom2/MAP01'"):
        choose_maps(["doom2/MAP01"], known)
