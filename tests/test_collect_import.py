"""One's own captures become scenes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nfldm_ns.collect.capture_import import choose_views
from nfldm_ns.collect.checking import check_collection
from nfldm_ns.commands.collect import main
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.writing import write_depth, write_scene
from tests.synthetic import AABB, BoxRoom, surround_cameras

BOX = [str(v) for corner in AABB for v in corner]
SIZE = 48


def run(root: Path, captures: list[Path], *options: str) -> int:
    command = ["import", str(root), "--scenes", *map(str, captures), "--image-size", "24", "24", "--box", *BOX]
    with pytest.raises(SystemExit) as end:
        main([*command, *options])
    return int(end.value.code or 0)


def make_captures(folder: Path, count: int = 3) -> list[Path]:
    """Captures as other tools leave them: all frames alike, none split off."""
    generator = torch.Generator().manual_seed(1)
    captures = []
    for i in range(count):
        views = BoxRoom.random(generator).render(surround_cameras(14, SIZE, generator))
        write_scene(folder / f"hall{i}", views, views[:0])
        path = folder / f"hall{i}" / "transforms.json"
        content = json.loads(path.read_text())
        for key in ("train_filenames", "val_filenames", "test_filenames"):
            del content[key]
        path.write_text(json.dumps(content))
        captures.append(folder / f"hall{i}")
    return captures


@pytest.fixture
def captures(tmp_path: Path) -> list[Path]:
    return make_captures(tmp_path / "captures")


def test_captures_come_before_the_collection_or_as_an_option(captures: list[Path], tmp_path: Path, capsys) -> None:
    names = list(map(str, captures))
    options = ["--image-size", "24", "24", "--box", *BOX]

    def collect(*args: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(["import", *args, *options])
        return int(end.value.code or 0), capsys.readouterr().err

    assert run(tmp_path / "option", captures) == 0
    assert collect(*names, str(tmp_path / "before"))[0] == 0
    before, option = (
        {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
        for root in (tmp_path / "before", tmp_path / "option")
    )
    assert before == option
    out = str(tmp_path / "out")
    for args, message in (
        ([names[0], out, "--scenes", names[1]], "both before OUT and with --scenes"),
        ([out], "Name the folders of the captures, and last the folder of the new collection"),
        (["--scenes", *names], "Name the folders of the captures"),
        ([out, *names], f"{names[-1]} is not empty: choose a new folder for the collection"),
    ):
        code, error = collect(*args)
        assert code == 2 and message in error, args
    assert not Path(out).exists()


def edit_frames(capture: Path, change) -> None:
    content = json.loads((capture / "transforms.json").read_text())
    for frame in content["frames"]:
        change(frame)
    (capture / "transforms.json").write_text(json.dumps(content))


def transform_poses(captures: list[Path], matrix: np.ndarray) -> None:
    def apply(frame: dict) -> None:
        frame["transform_matrix"] = (matrix @ np.array(frame["transform_matrix"])).tolist()

    for capture in captures:
        edit_frames(capture, apply)


def test_captures_become_a_good_collection(captures: list[Path], tmp_path: Path) -> None:
    root = tmp_path / "out"
    assert run(root, captures, "--name", "halls", "--licence", "CC0-1.0") == 0
    collection = SceneCollection.open(root)
    assert (collection.name, collection.licence, collection.image_size) == ("halls", "CC0-1.0", (24, 24))
    assert [len(ids) for ids in collection.splits.values()] == [2, 0, 1]
    report = check_collection(collection)
    assert report.ok, report.all_problems
    scene = collection.load_scene("hall0")
    assert scene.source.shape == (8,) and scene.target.shape == (4,)
    assert scene.source.cameras.camera_to_worlds[:, :, 3].mean(dim=0).abs().max() < 1e-5
    torch.testing.assert_close(scene.source.cameras.fx, torch.full((8, 1), 12.0))  # 90 degrees
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captures", "out"]


def test_images_are_cropped_and_intrinsics_follow(captures: list[Path], tmp_path: Path) -> None:
    root = tmp_path / "wide"
    assert run(root, captures, "--image-size", "24", "12") == 0
    cameras = SceneCollection.open(root).load_scene("hall1").source.cameras
    for name, value in (("fx", 12.0), ("fy", 12.0), ("cx", 12.0), ("cy", 6.0)):
        torch.testing.assert_close(getattr(cameras, name), torch.full((8, 1), value))
    assert check_collection(SceneCollection.open(root)).ok


def test_units_and_axes_are_those_of_the_options(captures: list[Path], tmp_path: Path) -> None:
    assert run(tmp_path / "plain", captures) == 0
    y_up = np.diag([100.0, 100, 100, 1]) @ np.array([[1.0, 0, 0, 5], [0, 0, 1, 6], [0, -1, 0, 7], [0, 0, 0, 1]])
    rotation = y_up[:3, :3] / 100

    def to_centimetres(frame: dict) -> None:
        pose = np.array(frame["transform_matrix"])
        pose[:3, :3] = rotation @ pose[:3, :3]
        pose[:3, 3] = y_up[:3, :3] @ pose[:3, 3] + y_up[:3, 3]
        frame["transform_matrix"] = pose.tolist()

    for capture in captures:
        edit_frames(capture, to_centimetres)
    assert run(tmp_path / "turned", captures, "--up", "y", "--metres-per-unit", "0.01") == 0
    before, after = (SceneCollection.open(tmp_path / name).load_scene("hall0") for name in ("plain", "turned"))
    torch.testing.assert_close(
        after.source.cameras.camera_to_worlds, before.source.cameras.camera_to_worlds, atol=1e-5, rtol=0
    )
    assert check_collection(SceneCollection.open(tmp_path / "turned")).ok


def test_depth_units_are_those_of_the_options(captures: list[Path], tmp_path: Path) -> None:
    for capture in captures:
        for path in (capture / "depths").iterdir():
            depth = np.asarray(Image.open(path)) / 1000
            write_depth(path, depth * 5)
    assert run(tmp_path / "out", captures, "--depth-unit-scale", "0.0002") == 0
    assert check_collection(SceneCollection.open(tmp_path / "out")).ok


def test_named_test_scenes_are_held_out(captures: list[Path], tmp_path: Path) -> None:
    assert run(tmp_path / "out", captures, "--test-scenes", "hall1") == 0
    assert SceneCollection.open(tmp_path / "out").splits == {"train": ["hall0", "hall2"], "val": [], "test": ["hall1"]}


def test_views_are_spread_evenly() -> None:
    sources, targets = choose_views(40, 8, 4, Path("capture"))
    assert len(set(sources) | set(targets)) == 12
    assert set(np.diff(sources)) == {5}
    assert max(np.diff(targets)) <= 12


def test_what_cannot_be_imported_is_one_sentence(
    captures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "out"
    partial = make_captures(tmp_path / "partial", 2)
    edit_frames(partial[1], lambda frame: frame["file_path"].endswith("3.png") and frame.pop("depth_file_path"))
    cases = {
        "Some frames": (partial, []),
        "too few": (captures, ["--num-source-views", "13"]),
        "--depth-unit-scale": (captures, ["--depth-unit-scale", "1"]),
        "no capture folder": ([*captures, tmp_path / "none"], []),
        "different folder names": ([captures[0], captures[0]], []),
        "not among the captures": (captures, ["--test-scenes", "hall9"]),
    }
    for message, (given, options) in cases.items():
        assert run(root, given, *options) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("error: ") == 1
        assert not root.exists() and not list(tmp_path.glob(".*"))
    root.mkdir()
    (root / "mine.txt").write_text("")
    assert run(root, captures) == 2
    assert "is not empty" in capsys.readouterr().err
