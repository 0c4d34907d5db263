"""What `nfldm-collect check` finds, and what it accepts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nfldm_ns.collect.checking import check_collection, reprojection_agreement
from nfldm_ns.commands.collect import main
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.writing import write_depth
from tests.synthetic import make_box_room_collection


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_box_room_collection(tmp_path_factory.mktemp("check") / "good", num_train=2, num_val=0, num_test=1).root


@pytest.fixture
def root(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "rooms"))


def check(root: Path) -> int:
    with pytest.raises(SystemExit) as end:
        main(["check", str(root)])
    return int(end.value.code or 0)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_frames(root: Path, change: Callable[[dict], None]) -> None:
    def all_frames(content: dict) -> None:
        for frame in content["frames"]:
            change(frame)

    edit(root / "scenes" / "room_000" / "transforms.json", all_frames)


def change_depths(root: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for path in (root / "scenes" / "room_000" / "depths").iterdir():
        write_depth(path, change(np.asarray(Image.open(path)) / 1000))


def turn_to_opencv(frame: dict) -> None:
    pose = np.array(frame["transform_matrix"])
    pose[:3, 1:3] *= -1
    frame["transform_matrix"] = pose.tolist()


def to_distance(depth: np.ndarray) -> np.ndarray:
    """Distance along the ray instead of planar depth, at 90 degrees of view."""
    size = len(depth)
    across = (np.arange(size) + 0.5) / size * 2 - 1
    return depth * np.sqrt(1 + across**2 + across[:, None] ** 2)


def move(frame: dict) -> None:
    frame["transform_matrix"][0][3] += 40


def test_good_collections_pass(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(good) == 0
    output = capsys.readouterr().out
    assert "is a good collection" in output and "room_000" in output


def test_exact_depths_agree(good: Path) -> None:
    scene = SceneCollection.open(good).load_scene("room_000")
    agreement = reprojection_agreement(scene.source)
    assert agreement.num_pixels > 1000 and agreement.median_error < 0.03 and agreement.consistent > 0.6


BROKEN = {
    "OpenCV poses": (lambda root: edit_frames(root, turn_to_opencv), "contradict each other"),
    "distance along the ray": (lambda root: change_depths(root, to_distance), "contradict each other"),
    "depth in another unit": (lambda root: change_depths(root, lambda depth: 3 * depth), "lie inside the box"),
    "unknown depths": (lambda root: change_depths(root, np.zeros_like), "all depths are unknown"),
    "poses far away": (lambda root: edit_frames(root, move), "outside of the box"),
    "wrong focal length": (lambda root: edit_frames(root, lambda f: f.update(fl_x=9000.0)), "field of view"),
    "wrong centre": (lambda root: edit_frames(root, lambda f: f.update(cx=-4.0)), "principal point"),
    "missing image": (
        lambda root: next((root / "scenes" / "room_001" / "images").iterdir()).unlink(),
        "is missing",
    ),
    "shared place": (
        lambda root: edit(root / "collection.json", lambda c: c["scenes"]["room_002"].update(origin=[1.0, 2.0, 0.0])),
        "train and test share places of rooms: room_000 and room_002 are 2.0 m apart",
    ),
    "no test split": (
        lambda root: edit(root / "collection.json", lambda c: c["splits"].update(test=[])),
        "has no test split",
    ),
    "fewer views": (
        lambda root: edit(root / "scenes" / "room_000" / "transforms.json", lambda c: c["train_filenames"].pop()),
        "different numbers of source + target views",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_named(case: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = BROKEN[case]
    damage(root)
    assert check(root) == 1
    output = capsys.readouterr().out
    assert message in output and "problem" in output


def test_one_broken_scene_does_not_hide_the_others(root: Path) -> None:
    (root / "scenes" / "room_000" / "transforms.json").write_text("{")
    report = check_collection(SceneCollection.open(root))
    assert [bool(scene.problems) for scene in report.scenes] == [True, False, False]
    assert not report.problems


def test_collections_without_depth_can_be_good(tmp_path: Path) -> None:
    collection = make_box_room_collection(tmp_path / "rgb", num_train=1, num_val=0, num_test=1, with_depth=False)
    assert check_collection(collection).ok


def test_unusable_input_is_exit_code_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path / "nowhere") == 2
    (tmp_path / "empty").mkdir()
    assert check(tmp_path / "empty") == 2
    assert capsys.readouterr().err.count("error: ") == 2
