"""MiniWorld's houses: depth is exact, houses stay within their splits, and the same options give the same files."""

from __future__ import annotations

import hashlib
import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from nfldm_ns.collect.checking import check_collection
from nfldm_ns.collect.level_cameras import level_poses
from nfldm_ns.collect.miniworld_collection import MiniworldOptions, collect_miniworld, open_renderer
from nfldm_ns.collect.resuming import numbered_splits
from nfldm_ns.commands.collect import main
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import SceneCollection

SIZE = 32


@pytest.fixture(scope="module")
def renderer():
    try:
        return open_renderer(SIZE)
    except UserInputError as error:
        pytest.skip(str(error))


def files(root: Path) -> dict[str, str]:
    found = [path for path in root.rglob("*") if path.is_file() and path.name != "contact_sheet.png"]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_depth_is_that_of_the_walls_and_the_floor(renderer) -> None:
    """Rays cast against the ends of walls, wherever nothing stands between; planar, not along the ray."""
    from nfldm_ns.collect.miniworld_houses import EYE_HEIGHT, WALL_HEIGHT

    renderer.open(5)
    room = renderer.rooms[0]
    grid = np.stack(np.meshgrid(np.linspace(room[0], room[2], 12), np.linspace(room[1], room[3], 12)), -1).reshape(
        -1, 2
    )
    eye = np.array([*grid[renderer.clearance(grid).argmax()], EYE_HEIGHT])
    angle = 37.0
    _, depth = renderer.render(eye, angle)
    across = (np.arange(SIZE) + 0.5) / SIZE * 2 - 1
    pose = level_poses(eye[None], np.array([angle]))[0]
    local = np.stack(np.broadcast_arrays(across, -across[:, None], -1.0), axis=-1)
    rays = local @ pose[:, :3].T
    walls = renderer.walls
    along = walls[:, 1] - walls[:, 0]
    to_wall = walls[:, 0] - eye[:2]
    cross = rays[..., None, 0] * along[:, 1] - rays[..., None, 1] * along[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (to_wall[:, 0] * along[:, 1] - to_wall[:, 1] * along[:, 0]) / cross
        share = (to_wall[:, 0] * rays[..., None, 1] - to_wall[:, 1] * rays[..., None, 0]) / cross
        t = np.where((t > 0) & (share >= 0) & (share <= 1), t, np.inf).min(axis=-1)
        flat = np.where(rays[..., 2] > 0, WALL_HEIGHT - EYE_HEIGHT, -EYE_HEIGHT) / rays[..., 2]
    expected = np.minimum(t, flat)
    agree = np.abs(depth - expected) < 0.01 + 0.002 * expected
    assert agree.mean() > 0.8  # the rest are things, and the walls above doorways
    assert (depth < expected + 0.02 + 0.01 * expected).mean() > 0.98  # which only stand before what was cast


def test_views_of_one_point_agree_and_the_check_finds_nothing(tmp_path: Path, renderer, capsys) -> None:
    root = tmp_path / "a"
    with pytest.raises(SystemExit) as end:
        main(["miniworld", str(root), "--num-scenes", "6", "--image-size", str(SIZE), "--places", "3"])
    assert not end.value.code
    collection = SceneCollection.open(root)
    assert {name: len(ids) for name, ids in collection.splits.items()} == {"train": 3, "val": 0, "test": 3}
    report = check_collection(collection)
    assert report.ok, report.all_problems
    assert np.median([s.reprojection.median_error for s in report.scenes]) < 0.02
    houses = {split: {i.split("-")[0] for i in ids} for split, ids in collection.splits.items()}
    assert not houses["train"] & houses["test"]
    scene = collection.load_scene(collection.splits["train"][0])
    centre = scene.bev[28:36, 28:36]
    assert (centre == 1).mean() > 0.5  # cameras stand on the floor
    assert "contact_sheet.png" in capsys.readouterr().out and (root / "contact_sheet.png").exists()


def test_an_interrupted_run_goes_on_to_the_same_files(tmp_path: Path, renderer, monkeypatch) -> None:
    from nfldm_ns.collect import miniworld_collection as module

    options = MiniworldOptions(num_scenes=5, image_size=16, places=2)
    collect_miniworld(tmp_path / "whole", options)
    with monkeypatch.context() as context:
        write, calls = module._write, []

        def fail(*args) -> None:
            calls.append(args)
            if len(calls) == 4:
                raise KeyboardInterrupt
            write(*args)

        context.setattr(module, "_write", fail)
        with pytest.raises(KeyboardInterrupt):
            collect_miniworld(tmp_path / "again", options)
    assert not (tmp_path / "again" / "collection.json").exists()
    collect_miniworld(tmp_path / "again", options)
    assert files(tmp_path / "again") == files(tmp_path / "whole")
    more = MiniworldOptions(num_scenes=8, image_size=16, places=2)
    collect_miniworld(tmp_path / "again", more)
    collect_miniworld(tmp_path / "more", more)
    assert files(tmp_path / "again") == files(tmp_path / "more")
    assert collect_miniworld(tmp_path / "more", more).new_frames == 0


def test_houses_are_for_the_same_whatever_is_asked_for() -> None:
    splits = [split for _, split in islice(numbered_splits({"test": 0.1, "val": 0.05}), 400)]
    assert splits[:3] == ["train", "test", "val"]
    assert splits.count("test") == 40 and splits.count("val") == 20
    assert set(islice((s for _, s in numbered_splits({"test": 0.0, "val": 0.0})), 50)) == {"train"}


def test_what_cannot_be_collected_is_one_sentence(tmp_path: Path, renderer, monkeypatch) -> None:
    def refused(message: str, **options) -> None:
        with pytest.raises(UserInputError, match=message):
            collect_miniworld(tmp_path / "out", MiniworldOptions(**{"num_scenes": 2, "image_size": 16, **options}))

    refused("1 scenes cannot be collected", num_scenes=1)
    refused("must add up to less than one", fractions={"test": 1.0})
    refused("leave none for test: ask for more", places=4)
    refused("was begun with other options \\(seed\\)", seed=1)
    (tmp_path / "out" / "collecting.json").write_text(json.dumps([]))
    refused("was begun with other options")
    monkeypatch.setattr("nfldm_ns.collect.miniworld_collection._LARGEST_DROUGHT", 1)
    with pytest.raises(UserInputError, match="No place of 1 houses passed"):
        collect_miniworld(tmp_path / "dark", MiniworldOptions(num_scenes=2, image_size=16, min_depth=90.0))


def test_without_the_package_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "nfldm_ns.collect.miniworld_houses", None)
    monkeypatch.delitem(sys.modules, "nfldm_ns.collect.miniworld_houses")
    monkeypatch.setitem(sys.modules, "pyglet", None)
    with pytest.raises(UserInputError, match="The package pyglet is not installed: 'pip install miniworld'"):
        open_renderer(8)


def test_without_opengl_it_says_what_to_install(monkeypatch) -> None:
    module = pytest.importorskip("nfldm_ns.collect.miniworld_houses")

    def fail(*_):
        raise ImportError('Library "EGL" not found.')

    monkeypatch.setattr(module, "HouseRenderer", fail)
    with pytest.raises(UserInputError, match="cannot draw here .*EGL.*sudo apt install libegl1"):
        open_renderer(8)
