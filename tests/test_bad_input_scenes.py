"""Broken scene data: one sentence that names the file and the remedy, and exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nfldm_ns.errors import BAD_INPUT_EXIT_CODE, UserInputError, exit_on_bad_input
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import SceneBatch
from tests.synthetic import make_box_room_collection

SCENE = "scenes/room_000"
IMAGE = f"{SCENE}/images/source_00.png"
DEPTH = f"{SCENE}/depths/source_00.png"

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole") / "rooms"
    make_box_room_collection(root, num_train=1, num_test=1, num_val=0, image_size=8, num_source=2, num_target=1)
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "rooms"))


def use(root: Path) -> SceneBatch:
    """What every consumer of a collection does first."""
    collection = SceneCollection.open(root)
    collection.require_train_and_test()
    return collection.batch([collection.load_scene(scene_id) for scene_id in collection.scene_ids])


def cut(name: str, keep: float = 0.5) -> Damage:
    """Truncates a file."""

    def damage(root: Path) -> None:
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[: int(len(data) * keep)])

    return damage


def overwrite(name: str, data: bytes) -> Damage:
    return lambda root: (root / name).write_bytes(data) and None


def empty(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


def remove(name: str) -> Damage:
    def damage(root: Path) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Changes a JSON file."""

    def damage(root: Path) -> None:
        content = json.loads((root / name).read_text())
        change(content)
        (root / name).write_text(json.dumps(content))

    return damage


def describe(**values: Any) -> Damage:
    """Sets keys of `collection.json`."""
    return edit("collection.json", lambda content: content.update(values))


def frame(**values: Any) -> Damage:
    """Sets keys of the first frame of a scene."""
    return edit(f"{SCENE}/transforms.json", lambda content: content["frames"][0].update(values))


def pose(change: Callable[[np.ndarray], Any]) -> Damage:
    """Changes the camera-to-world matrix of the first frame."""

    def change_pose(content: dict[str, Any]) -> None:
        matrix = np.array(content["frames"][0]["transform_matrix"])
        change(matrix)
        content["frames"][0]["transform_matrix"] = matrix.tolist()

    return edit(f"{SCENE}/transforms.json", change_pose)


def depths(change: Callable[[np.ndarray], np.ndarray]) -> Damage:
    """Changes all depth maps of a scene."""

    def damage(root: Path) -> None:
        for path in (root / SCENE / "depths").iterdir():
            Image.fromarray(change(np.asarray(Image.open(path)))).save(path)

    return damage


def picture(name: str, image: Image.Image) -> Damage:
    return lambda root: image.save(root / name)


def scale_rotation(matrix: np.ndarray) -> None:
    matrix[:3, :3] *= 1.1


def mirror(matrix: np.ndarray) -> None:
    matrix[:3, 0] *= -1


def put_nan(matrix: np.ndarray) -> None:
    matrix[0, 3] = np.nan


def put_far_away(matrix: np.ndarray) -> None:
    matrix[0, 3] = 1e300


# name of the case: what breaks, what the sentence says, and the file it names
CASES: dict[str, tuple[Damage, str, str]] = {
    "missing folder": (shutil.rmtree, r"There is no data folder .*: make one with 'nfldm-collect", ""),
    "empty folder": (empty, "no collection.json.*: make one", ""),
    "truncated collection": (cut("collection.json"), "not valid JSON.*: restore it", "collection.json"),
    "binary collection": (overwrite("collection.json", b"\x89PNG\xff"), "not valid JSON.*: restore", "collection.json"),
    "JSON of another kind": (overwrite("collection.json", b"[1, 2]"), "does not say.*see docs", "collection.json"),
    "foreign format": (describe(format="other"), "does not say.*see docs/data.md", "collection.json"),
    "later version": (describe(version=99), "has version 99.*collect or import", "collection.json"),
    "no box": (edit("collection.json", lambda c: c.pop("aabb")), "lacks 'aabb': see docs", "collection.json"),
    "splits of a wrong kind": (describe(splits=["room_000"]), "wrong kind.*see docs/data.md", "collection.json"),
    "scenes of a wrong kind": (describe(scenes=5), "wrong kind.*see docs/data.md", "collection.json"),
    "range in words": (describe(near="close"), "wrong kind.*see docs/data.md", "collection.json"),
    "flipped box": (describe(aabb=[[1, 1, 1], [0, 0, 0]]), "minimum before maximum", "collection.json"),
    "infinite box": (describe(aabb=[[-np.inf] * 3, [np.inf] * 3]), "minimum before maximum", "collection.json"),
    "flat box": (describe(aabb=[0, 1]), "aabb in .* must be", "collection.json"),
    "NaN range": (describe(near=np.nan), "0 < near < far", "collection.json"),
    "no pixels": (describe(image_size=[0, 8]), "both positive", "collection.json"),
    "one scene": (describe(splits={"train": ["room_000"]}), "holds 1 scene, .*: collect or import more", ""),
    "no test split": (
        describe(splits={"train": ["room_000", "room_001"]}),
        "no test split: list at least one scene under splits.test in its collection.json",
        "",
    ),
    "no training split": (describe(splits={"test": ["room_000"]}), "no training scenes: list", "collection.json"),
    "shared scene": (
        describe(splits={"train": ["room_000"], "test": ["room_000", "room_001"]}),
        "room_000 more than once: splits must not share",
        "collection.json",
    ),
    "missing scene": (remove(SCENE), "is missing: restore it", f"{SCENE}/transforms.json"),
    "missing transforms": (remove(f"{SCENE}/transforms.json"), "is missing: restore", f"{SCENE}/transforms.json"),
    "truncated transforms": (cut(f"{SCENE}/transforms.json"), "not valid JSON.*: restore", f"{SCENE}/transforms.json"),
    "no frames": (overwrite(f"{SCENE}/transforms.json", b"{}"), "no frames: see docs", f"{SCENE}/transforms.json"),
    "frames of a wrong kind": (
        edit(f"{SCENE}/transforms.json", lambda content: content.update(frames=[1, 2])),
        "not a list of objects: see docs",
        f"{SCENE}/transforms.json",
    ),
    "view without frame": (
        edit(f"{SCENE}/transforms.json", lambda content: content["frames"].pop(0)),
        "has no frame of that name: add it or drop it",
        f"{SCENE}/transforms.json",
    ),
    "frame without focal length": (
        edit(f"{SCENE}/transforms.json", lambda content: content["frames"][0].pop("fl_x")),
        "lacks fl_x: see docs",
        f"{SCENE}/transforms.json",
    ),
    "other number of views": (
        edit(f"{SCENE}/transforms.json", lambda content: content["train_filenames"].pop()),
        "give all scenes the same numbers",
        "",
    ),
    "pose with NaN": (pose(put_nan), "contains NaN or infinity: remove the frame", f"{SCENE}/transforms.json"),
    "scaled pose": (pose(scale_rotation), "not orthonormal: remove scale", f"{SCENE}/transforms.json"),
    "mirrored pose": (pose(mirror), "mirrored .*: give a right-handed", f"{SCENE}/transforms.json"),
    "pose of a wrong shape": (frame(transform_matrix=[[1, 0], [0, 1]]), "not 4 x 4: give", f"{SCENE}/transforms.json"),
    "ragged pose": (frame(transform_matrix=[[1], [0, 1]]), "not numbers: repair", f"{SCENE}/transforms.json"),
    "zero focal length": (frame(fl_x=0), r"cannot be right \(0, .*: give fl_x", f"{SCENE}/transforms.json"),
    "negative focal length": (frame(fl_y=-3), "cannot be right .*: give fl_x", f"{SCENE}/transforms.json"),
    "centre is NaN": (frame(cx=np.nan), "cannot be right .*: give fl_x", f"{SCENE}/transforms.json"),
    "depth path of a wrong kind": (
        frame(depth_file_path=["depths/source_00.png"]),
        "depth_file_path of the frame images/source_00.png .*wrong kind.*: see docs",
        f"{SCENE}/transforms.json",
    ),
    "mask path of a wrong kind": (
        frame(mask_path=3),
        "mask_path of the frame .*: see docs",
        f"{SCENE}/transforms.json",
    ),
    "size of a wrong kind": (frame(w="8"), "w of the frame .*wrong kind.*: see docs", f"{SCENE}/transforms.json"),
    "pose beyond all numbers": (pose(put_far_away), r"beyond 1e\+12: remove", f"{SCENE}/transforms.json"),
    "place without origin": (
        describe(scenes={"room_000": {"map": "rooms"}}),
        "lacks origin of the scene room_000: see docs",
        "collection.json",
    ),
    "origin of a wrong kind": (
        describe(scenes={"room_000": {"map": "rooms", "origin": [0, "0", 0]}}),
        "origin of the scene room_000 in .* is '0' .a wrong kind.*: see docs",
        "collection.json",
    ),
    "scene outside of the folder": (
        describe(splits={"train": ["../room_000"], "test": ["room_001"]}),
        "splits.train in .* is '../room_000' .it must be the name of a folder.: see docs",
        "collection.json",
    ),
    "class of no colour": (
        describe(bev_classes=[{"id": 0, "name": "void", "color": [0, 0]}]),
        r"color of the class void in .* is \[0, 0\] .*: see docs",
        "collection.json",
    ),
    "intrinsics of another size": (
        frame(w=640, h=480),
        "are for 640 x 480 pixels.*: scale",
        f"{SCENE}/transforms.json",
    ),
    "missing image": (remove(IMAGE), "is missing: restore it or remove its frame", IMAGE),
    "truncated image": (cut(IMAGE), "is not a readable image.*: restore it", IMAGE),
    "empty image": (overwrite(IMAGE, b""), "is not a readable image.*: restore it", IMAGE),
    "text as image": (overwrite(IMAGE, b"not an image"), "is not a readable image.*: restore it", IMAGE),
    "image of another size": (picture(IMAGE, Image.new("RGB", (4, 8))), "is 4 x 8, but .* 8 x 8: resize", IMAGE),
    "missing depth": (remove(DEPTH), "is missing: restore it or remove its frame", DEPTH),
    "truncated depth": (cut(DEPTH), "is not a readable image.*: restore it", DEPTH),
    "8-bit depth": (picture(DEPTH, Image.new("L", (8, 8))), "must be a 16-bit PNG in millimetres: convert", DEPTH),
    "depth in metres": (
        depths(lambda d: (d / 1000).astype(np.uint16)),
        "median .*: store planar depth as 16-bit",
        SCENE,
    ),
    "depth in tenths of mm": (
        depths(lambda d: np.minimum(d.astype(int) * 10, 65535).astype(np.uint16)),
        "median .*: store planar depth as 16-bit",
        SCENE,
    ),
    "colours as BEV map": (
        picture(f"{SCENE}/bev.png", Image.new("RGB", (8, 8))),
        "palette PNG.*: convert",
        f"{SCENE}/bev.png",
    ),
}


def test_whole_collections_are_accepted(root: Path) -> None:
    use(root)


def test_a_null_depth_path_is_no_depth(root: Path) -> None:
    frame(depth_file_path=None, mask_path=None)(root)
    depths = SceneCollection.open(root).load_scene("room_000").source.depths
    assert not bool(depths[0].any()) and bool(depths[1].any())


def test_null_in_a_frame_is_as_good_as_absent(root: Path) -> None:
    edit(f"{SCENE}/transforms.json", lambda content: content.update(fl_x=4.0))(root)
    frame(fl_x=None)(root)
    assert SceneCollection.open(root).load_scene("room_000").source.cameras.fx[0] == 4


@pytest.mark.parametrize("case", CASES)
def test_broken_collections_are_one_sentence(case: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, sentence, file = CASES[case]
    damage(root)
    with pytest.raises(UserInputError, match=sentence) as error:
        use(root)
    message = str(error.value)
    assert str(root / file) in message
    assert message.endswith(".") and "\n" not in message
    with pytest.raises(SystemExit) as exit_info, exit_on_bad_input():
        use(root)
    assert exit_info.value.code == BAD_INPUT_EXIT_CODE
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize("name", [IMAGE, DEPTH, f"{SCENE}/bev.png", f"{SCENE}/transforms.json", "collection.json"])
def test_files_cut_anywhere_are_one_sentence(name: str, root: Path) -> None:
    """A truncated file of any length brings the sentence, except where only what follows the content is lost."""
    data = (root / name).read_bytes()
    content = use(root)
    for length in range(0, len(data), max(1, len(data) // 60)):
        (root / name).write_bytes(data[:length])
        try:
            remaining = use(root)
        except UserInputError as error:
            assert str(root / name) in str(error)
            continue
        assert length > len(data) - 24
        assert torch.equal(remaining.source.images, content.source.images)
        assert torch.equal(remaining.source.depths, content.source.depths)


def test_files_with_changed_bytes_are_one_sentence(root: Path) -> None:
    generator = np.random.default_rng(0)
    for name in (IMAGE, DEPTH):
        data = np.frombuffer((root / name).read_bytes(), np.uint8)
        for _ in range(60):
            changed = data.copy()
            changed[generator.integers(len(data), size=3)] = generator.integers(256, size=3)
            (root / name).write_bytes(changed.tobytes())
            try:
                use(root)
            except UserInputError as error:
                assert str(root / SCENE) in str(error)
        (root / name).write_bytes(data.tobytes())
