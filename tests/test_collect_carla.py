"""Recording from CARLA: its numbers as ours, and the whole recording over a server that is made up."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nfldm_ns.collect.carla_collection import CarlaOptions, collect_carla, plan_rig
from nfldm_ns.collect.carla_geometry import (
    depth_of_bgra,
    focal_length,
    pose_of_transform,
    rgb_of_bgra,
    unreal_yaw,
)
from nfldm_ns.collect.checking import check_collection
from nfldm_ns.collect.level_cameras import level_poses
from nfldm_ns.commands.collect import main
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import SceneCollection
from tests.fake_carla import Location, Rotation, Transform, World, server
from tests.synthetic import AABB, BoxRoom

SIZE = 32
BOX = [str(value) for corner in AABB for value in corner]
SMALL = {"image_size": (SIZE, SIZE), "target_distance": 0.5, "place_jitter": 0.1, "height": 0.0, "aabb": AABB}
SMALL |= {"near": 0.1, "far": 10.0, "vehicles": 4, "weathers": ("ClearNoon", "WetSunset"), "warm_up": 2}


def worlds() -> dict[str, World]:
    """Two towns of a room each, whose spots lie close together; right in Unreal is minus y here."""
    found = {}
    for seed, town in enumerate(("Town01", "Town02")):
        generator = torch.Generator().manual_seed(seed)
        room = BoxRoom.random(generator)
        spots = [Transform(Location(0.05 * i, -0.03 * i, 0.1), Rotation(yaw=40.0 * i)) for i in range(6)]
        found[town] = World(town, room, spots)
    return found


def options(**changes) -> CarlaOptions:
    return CarlaOptions(
        **{"num_scenes": 4, "towns": ("Town01", "Town02"), "test_towns": ("Town02",), **SMALL, **changes}
    )


def files(root: Path) -> dict[str, str]:
    found = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_depth_is_24_bits_of_a_kilometre() -> None:
    """The example of CARLA's documentation: normalized = (R + G * 256 + B * 256 * 256) / (256^3 - 1), times 1000 m."""
    pixels = np.zeros((1, 4, 4), np.uint8)
    pixels[0, :, 3] = 255
    pixels[0, 0, :3] = (0, 0, 255)  # blue, green, red
    pixels[0, 1, :3] = (1, 2, 3)
    pixels[0, 2, :3] = (255, 255, 255)
    pixels[0, 3, :3] = (128, 0, 0)
    unit = 1000 / (256**3 - 1)
    expected = [255 * unit, (3 + 2 * 256 + 65536) * unit, 0, 128 * 65536 * unit]
    np.testing.assert_allclose(depth_of_bgra(pixels)[0], expected)
    assert rgb_of_bgra(pixels)[0, 1].tolist() == [3, 2, 1]


@pytest.mark.parametrize(("fov", "width", "focal"), [(90, 128, 64.0), (60, 100, 86.60254), (120, 100, 28.867513)])
def test_focal_length_of_a_horizontal_angle(fov: float, width: int, focal: float) -> None:
    assert focal_length(fov, width) == pytest.approx(focal)


def test_level_cameras_look_along_minus_their_yaw() -> None:
    for yaw in (0.0, 30.0, 90.0, 200.0):
        matrix = np.array(Transform(Location(1, 2, 3), Rotation(yaw=yaw)).get_matrix())
        expected = level_poses(np.array([[1.0, -2, 3]]), np.array([-yaw]))[0]
        np.testing.assert_allclose(pose_of_transform(matrix), expected, atol=1e-12)
        assert unreal_yaw(-yaw) == yaw


def test_pitch_lifts_the_nose_and_roll_leans_to_the_right() -> None:
    up = pose_of_transform(np.array(Transform(rotation=Rotation(pitch=30)).get_matrix()))
    np.testing.assert_allclose(-up[:, 2], [np.sqrt(0.75), 0, 0.5], atol=1e-12)
    leaning = pose_of_transform(np.array(Transform(rotation=Rotation(roll=10)).get_matrix()))
    assert leaning[1, 1] < 0 < leaning[2, 1]  # looking along x, our right is -y, and up leans there
    for rotation in (Rotation(20, 130, -40), Rotation(-70, -10, 170)):
        pose = pose_of_transform(np.array(Transform(rotation=rotation).get_matrix()))
        np.testing.assert_allclose(pose[:, :3] @ pose[:, :3].T, np.eye(3), atol=1e-12)
        assert np.linalg.det(pose[:, :3]) == pytest.approx(1)


def test_the_rig_looks_to_all_sides_from_one_spot_on_the_lane() -> None:
    rig = np.array(plan_rig(np.array([10.0, 20, 0.5]), 90.0, np.random.default_rng(0), options(height=1.8)))
    assert np.ptp(rig[:6, :3], axis=0).max() == 0 and rig[0, 2] == pytest.approx(2.3)
    np.testing.assert_allclose(np.sort(np.diff(np.sort(rig[:6, 3] % 360))), 60)
    np.testing.assert_allclose(rig[:, 0], 10, atol=1e-9)  # yaw 90 is along y
    assert np.abs(rig[6:, 1] - rig[0, 1]).min() >= 0.1 and np.abs(rig[6:, 1] - rig[0, 1]).max() <= 0.5


def test_a_recording_is_true_to_its_server(tmp_path: Path, monkeypatch, capsys) -> None:
    towns = worlds()
    monkeypatch.setitem(sys.modules, "carla", server(towns))
    command = [
        "carla",
        str(tmp_path / "out"),
        "--num-scenes",
        "4",
        "--towns",
        "Town01",
        "Town02",
        "--test-towns",
        "Town02",
    ]
    command += ["--image-size", str(SIZE), str(SIZE), "--target-distance", "0.5", "--height", "0", "--box", *BOX]
    command += ["--place-jitter", "0.1"]
    with pytest.raises(SystemExit) as end:
        main([*command, "--near", "0.1", "--far", "10", "--warm-up", "1", "--weathers", "ClearNoon", "WetSunset"])
    assert not end.value.code and "2 train, 2 test scenes, 4 of them new" in capsys.readouterr().out
    collection = SceneCollection.open(tmp_path / "out")
    for split, town in (("train", "Town01"), ("test", "Town02")):
        for name in collection.splits[split]:
            scene = collection.load_scene(name)
            assert scene.source.shape == (6,) and name.startswith(town.lower())
            origin = torch.tensor(collection.places[name]["origin"])
            for views in (scene.source, scene.target):
                cameras = views.cameras
                cameras.camera_to_worlds[:, :, 3] += origin
                true = towns[town].room.render(cameras)
                assert float((views.images - true.images).abs().max()) < 0.02
                torch.testing.assert_close(views.depths, true.depths, atol=0.002, rtol=0)
    report = check_collection(collection)
    assert report.ok, report.all_problems
    for world in towns.values():
        assert not world.actors and not world.settings.synchronous_mode
        assert world.weathers and set(world.weathers) <= {"ClearNoon", "WetSunset"}


def test_it_continues_and_leaves_the_server_as_it_was(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "carla", server(worlds()))
    assert collect_carla(tmp_path / "whole", options()).new_scenes == 4
    towns = worlds()
    monkeypatch.setitem(sys.modules, "carla", server(towns))
    with monkeypatch.context() as context:
        context.setattr("nfldm_ns.collect.carla_collection._TIMEOUT_S", 0.05)
        towns["Town02"].silent = True
        with pytest.raises(UserInputError, match="CARLA sent no picture within 0 s"):
            collect_carla(tmp_path / "again", options())
    assert not any(world.actors or world.settings.synchronous_mode for world in towns.values())
    towns["Town02"].silent = False
    assert collect_carla(tmp_path / "again", options()).new_scenes == 2
    assert files(tmp_path / "again") == files(tmp_path / "whole")


def test_a_part_of_a_town_is_held_out_further_than_the_box(tmp_path: Path, monkeypatch) -> None:
    town = worlds()["Town01"]
    town.spots = [Transform(Location(0.0, 0.001 * i, 0.1)) for i in range(30)]
    town.spots += [Transform(Location(0.4, -1.0 + 0.01 * i, 0.1)) for i in range(6)]
    monkeypatch.setitem(sys.modules, "carla", server({"Town01": town}))
    small = ((-0.1, -0.1, -2.0), (0.1, 0.1, 2.0))
    report = collect_carla(
        tmp_path / "out", options(towns=(), test_towns=(), aabb=small, num_scenes=10, place_jitter=0.0)
    )
    assert report.num_scenes == {"train": 9, "val": 0, "test": 1}
    collection = SceneCollection.open(tmp_path / "out")
    where = {
        name: np.array(collection.places[name]["origin"][:2]) for ids in collection.splits.values() for name in ids
    }
    test = where[collection.splits["test"][0]]
    assert min(np.abs(where[name] - test).max() for name in collection.splits["train"]) >= 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_scenes": 1}, "Ask for at least 2 scenes"),
        ({"test_towns": ("Town03",)}, "test towns must be some of --towns"),
        ({"test_towns": ("Town01", "Town02")}, "not all of them"),
        ({"test_towns": (), "test_fraction": 0.0}, "Hold something out"),
        ({"towns": ("Town09", "Town02")}, "The server has no town Town09: choose of Town01, Town02"),
        ({"num_scenes": 40}, "Town01 has only 6 places for train, not 20"),
        ({"weathers": ("Hail",)}, "CARLA has no weather Hail"),
    ],
)
def test_what_cannot_be_recorded_is_one_sentence(changes, message, tmp_path: Path, monkeypatch) -> None:
    towns = worlds()
    monkeypatch.setitem(sys.modules, "carla", server(towns))
    with pytest.raises(UserInputError, match=message):
        collect_carla(tmp_path / "out", options(**changes))
    assert not any(world.actors or world.settings.synchronous_mode for world in towns.values())


def test_servers_that_are_not_there_or_of_another_version(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "carla", None)
    with pytest.raises(UserInputError, match="'pip install carla'"):
        collect_carla(tmp_path / "out", options())
    monkeypatch.setitem(sys.modules, "carla", server(worlds(), fails="time-out of 20000ms"))
    with pytest.raises(UserInputError, match="No CARLA server answers at nowhere:1 \\(time-out"):
        collect_carla(tmp_path / "out", options(), "nowhere", 1)
    monkeypatch.setitem(sys.modules, "carla", server(worlds(), versions=("0.9.15", "0.9.13")))
    with pytest.raises(UserInputError, match="of version 0.9.15, but the server of 0.9.13"):
        collect_carla(tmp_path / "out", options())
    assert not (tmp_path / "out").exists()
