"""Published RGB-D formats become scenes, as their own documentation says what they mean."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nfldm_ns.collect.capture_import import choose_views
from nfldm_ns.collect.captures import Lens
from nfldm_ns.collect.checking import check_collection
from nfldm_ns.collect.formats.colmap import read_colmap
from nfldm_ns.collect.formats.gsn import read_gsn
from nfldm_ns.collect.formats.tum import PUBLISHED, read_tum
from nfldm_ns.collect.undistortion import undistort
from nfldm_ns.commands.collect import main
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import Views
from tests import rgbd_formats as formats
from tests.synthetic import AABB, BoxRoom, surround_cameras

SIZE, FOCAL, COUNT = 48, 24.0, 14
BOX = [str(v) for corner in AABB for v in corner]


def room_and_cameras(seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    room = BoxRoom.random(generator)
    return room, surround_cameras(COUNT, SIZE, generator)


def run(kind: str, root: Path, captures: list[Path], *options: str, box: list[str] = BOX) -> int:
    command = [kind, str(root), "--scenes", *map(str, captures), "--image-size", str(SIZE), str(SIZE), "--box", *box]
    with pytest.raises(SystemExit) as end:
        main([*command, *formats.options_of(kind, SIZE, FOCAL), *options])
    return int(end.value.code or 0)


def written(kind: str, folder: Path, count: int = 3) -> list[Path]:
    for i in range(count):
        formats.WRITERS[kind](folder / f"hall{i}", *room_and_cameras(i))
    return [folder / f"hall{i}" for i in range(count)]


def truth(seed: int, left: list[int] | None = None) -> tuple[Views, Views]:
    """Source and target views of a capture of which these frames are left."""
    room, cameras = room_and_cameras(seed)
    left = left or list(range(COUNT))
    sources, targets = ([left[i] for i in chosen] for chosen in choose_views(len(left), 8, 4, Path()))
    first, second = (formats.expected(room, cameras, chosen, sources) for chosen in (sources, targets))
    return first, second


def assert_same(found: Views, true: Views, *, colour: float = 0.002, depth: float = 0.002) -> None:
    torch.testing.assert_close(found.cameras.camera_to_worlds, true.cameras.camera_to_worlds, atol=1e-4, rtol=0)
    for name in ("fx", "fy", "cx", "cy"):
        torch.testing.assert_close(getattr(found.cameras, name), getattr(true.cameras, name), atol=1e-3, rtol=0)
    assert float((found.images - true.images).abs().mean()) < colour
    known = found.depths > 0
    assert float(((found.depths - true.depths).abs() / true.depths)[known].median()) < depth


@pytest.mark.parametrize("kind", formats.WRITERS)
def test_poses_images_and_depths_are_the_true_ones(kind: str, tmp_path: Path, capsys) -> None:
    root = tmp_path / "out"
    assert run(kind, root, written(kind, tmp_path / "in"), "--licence", "CC0-1.0") == 0
    collection = SceneCollection.open(root)
    assert [len(ids) for ids in collection.splits.values()] == [2, 0, 1] and collection.licence == "CC0-1.0"
    assert json.loads((root / "collection.json").read_text())["made_by"]["command"] == f"nfldm-collect {kind}"
    for i in range(3):
        scene = collection.load_scene(f"hall{i}")
        for found, true in zip((scene.source, scene.target), truth(i), strict=True):
            assert_same(found, true, colour=0.015, depth=0.02 if kind == "scannet" else 0.002)
            share = float((found.depths > 0).float().mean())
            low, high = {"colmap": (0.02, 0.05), "scannet": (0.7, 0.95)}.get(kind, (1.0, 1.0))
            assert low <= share <= high
    report = check_collection(collection)
    assert report.ok, report.all_problems
    assert "left out" not in capsys.readouterr().out


def test_gsn_of_vizdoom_counts_in_game_units(tmp_path: Path) -> None:
    """In halls four times as large, so that 8 bits tell enough of their depth."""
    formats.write_gsn_vizdoom(tmp_path / "00", *room_and_cameras(0), scale=4.0)
    formats.write_gsn_vizdoom(tmp_path / "01", *room_and_cameras(1), scale=4.0)
    box = [str(4 * float(value)) for value in BOX]
    assert run("gsn", tmp_path / "out", [tmp_path / "00", tmp_path / "01"], box=box) == 0
    collection = SceneCollection.open(tmp_path / "out")
    assert check_collection(collection).ok
    found, (true, _) = collection.load_scene("00").source, truth(0)
    true.cameras.camera_to_worlds[:, :, 3] *= 4
    true.depths = true.depths * 4
    assert_same(found, true, depth=0.02)


def test_gsn_frames_may_be_of_opencv_have_centres_and_no_depth(tmp_path: Path) -> None:
    formats.write_gsn_replica(tmp_path / "00", *room_and_cameras())
    for path in (tmp_path / "00").glob("*_depth.tiff"):
        path.unlink()
    content = json.loads((tmp_path / "00" / "cameras.json").read_text())
    for entry in content:
        entry["Rt"] = (np.diag([1.0, -1, -1, 1]) @ entry["Rt"]).tolist()
        entry["K"] = [[24.0, 0, 23], [0, 24.0, 25], [0, 0, 1]]
    (tmp_path / "00" / "cameras.json").write_text(json.dumps([*content, content[0]]))
    capture = read_gsn(tmp_path / "00", "opencv")
    assert capture.frames[0].lens.intrinsics((SIZE, SIZE), "x").tolist() == [24, 24, 23, 25]
    assert [note.split(" ")[0] for note in capture.notes] == ["1", str(tmp_path / "00")]
    assert run("gsn", tmp_path / "out", [tmp_path / "00"], "--camera-axes", "opencv") == 0
    assert json.loads((tmp_path / "out/collection.json").read_text())["made_by"]["camera_axes"] == "opencv"
    views = SceneCollection.open(tmp_path / "out").load_scene("00").source
    torch.testing.assert_close(views.cameras.camera_to_worlds, truth(1)[0].cameras.camera_to_worlds, atol=1e-4, rtol=0)
    assert views.depths is None


@pytest.mark.parametrize("kind", ["tum", "scannet"])
def test_frames_without_pose_are_left_out_and_counted(kind: str, tmp_path: Path, capsys) -> None:
    write = {"tum": formats.write_tum, "scannet": formats.write_scannet}[kind]
    write(tmp_path / "hall", *room_and_cameras(), lost=(3, 7))
    assert run(kind, tmp_path / "out", [tmp_path / "hall"]) == 0
    assert f"2 of {COUNT} pictures of {tmp_path / 'hall'} have no" in " ".join(capsys.readouterr().out.split())
    left = [i for i in range(COUNT) if i not in (3, 7)]
    found = SceneCollection.open(tmp_path / "out").load_scene("hall")
    assert_same(found.source, truth(1, left)[0], colour=0.015, depth=0.02)
    assert_same(found.target, truth(1, left)[1], colour=0.015, depth=0.02)


def test_tum_knows_published_cameras_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "rgbd_dataset_freiburg2_desk"
    formats.write_tum(folder, *room_and_cameras())
    assert read_tum(folder).frames[0].lens.distortion == PUBLISHED["freiburg2"][1]
    third = read_tum(folder, "freiburg3").frames[0].lens
    assert third.intrinsics((640, 480), "x").tolist() == pytest.approx([535.4, 539.2, 320.6, 248.1])


@pytest.mark.parametrize("camera", PUBLISHED)
def test_tum_s_lenses_can_be_undone(camera: str) -> None:
    (fx, fy, cx, cy), distortion = PUBLISHED[camera]
    image = np.full((480, 640, 3), 128, np.uint8)
    shown, _, mask, new = undistort(image, None, None, np.array([fx, fy, cx, cy]), distortion, False, "x")
    assert shown.mean() > 125 and (mask is None or mask.mean() > 0.97) and 0.8 < new[0] / fx < 1.3


def test_replica_s_camera_may_stand_beside_its_rooms(tmp_path: Path) -> None:
    (room,) = written("replica", tmp_path / "Replica", 1)
    shutil.move(room / "cam_params.json", room.parent / "cam_params.json")
    assert run("replica", tmp_path / "out", [room]) == 0
    assert_same(SceneCollection.open(tmp_path / "out").load_scene("hall0").source, truth(0)[0], colour=0.015)


def test_scannet_without_the_depth_camera_s_intrinsics(tmp_path: Path) -> None:
    """Depth then is of the same view, as where it was resized to the pictures."""
    (scan,) = written("scannet", tmp_path, 1)
    (scan / "intrinsic" / "intrinsic_depth.txt").unlink()
    room, cameras = room_and_cameras(0)
    for i, depth in enumerate(room.render(cameras).depths[:, 0].numpy()):
        Image.fromarray((depth * 1000).round().astype(np.uint16)).save(scan / f"depth/{i}.png")
    assert run("scannet", tmp_path / "out", [scan]) == 0
    assert_same(SceneCollection.open(tmp_path / "out").load_scene("hall0").source, truth(0)[0], colour=0.015)


def test_colmap_in_text_is_the_same_as_in_binary(tmp_path: Path) -> None:
    for name, binary in (("binary", True), ("text", False)):
        formats.write_colmap(tmp_path / name, *room_and_cameras(), binary=binary)
    first, second = (read_colmap(tmp_path / name) for name in ("binary", "text"))
    for a, b in zip(first.frames, second.frames, strict=True):
        assert a.name == b.name and a.lens == b.lens
        np.testing.assert_allclose(a.pose, b.pose, atol=1e-12)
        np.testing.assert_allclose(a.points, b.points, atol=1e-12)


def test_colmap_without_points_has_no_depth_and_with_them_a_unit(tmp_path: Path, capsys) -> None:
    formats.write_colmap(tmp_path / "hall", *room_and_cameras(), num_points=0)
    assert run("colmap", tmp_path / "none", [tmp_path / "hall"]) == 0
    assert "points3D.bin has no points: there is no depth." in " ".join(capsys.readouterr().out.split())
    assert SceneCollection.open(tmp_path / "none").load_scene("hall").source.depths is None
    formats.write_colmap(tmp_path / "house", *room_and_cameras())
    assert run("colmap", tmp_path / "wrong", [tmp_path / "house"], "--metres-per-unit", "100") == 2
    assert "and 30 m: set --metres-per-unit." in " ".join(capsys.readouterr().err.split())
    box = [str(2 * float(value)) for value in BOX]
    assert run("colmap", tmp_path / "twice", [tmp_path / "house"], "--metres-per-unit", "2", box=box) == 0
    found, (true, _) = SceneCollection.open(tmp_path / "twice").load_scene("house").source, truth(1)
    true.cameras.camera_to_worlds[:, :, 3] *= 2
    true.depths = true.depths * 2
    assert_same(found, true)


@pytest.mark.parametrize(
    ("line", "focal", "centre", "distortion", "fisheye"),
    [
        ("SIMPLE_PINHOLE 48 48 20 24 25", (20, 20), (24, 25), (0, 0, 0, 0, 0, 0), False),
        ("PINHOLE 48 48 20 21 24 25", (20, 21), (24, 25), (0, 0, 0, 0, 0, 0), False),
        ("SIMPLE_RADIAL 48 48 20 24 25 .1", (20, 20), (24, 25), (0.1, 0, 0, 0, 0, 0), False),
        ("RADIAL 48 48 20 24 25 .1 .2", (20, 20), (24, 25), (0.1, 0.2, 0, 0, 0, 0), False),
        ("OPENCV 48 48 20 21 24 25 .1 .2 .3 .4", (20, 21), (24, 25), (0.1, 0.2, 0, 0, 0.3, 0.4), False),
        ("OPENCV_FISHEYE 48 48 20 21 24 25 .1 .2 .3 .4", (20, 21), (24, 25), (0.1, 0.2, 0.3, 0.4, 0, 0), True),
    ],
)
def test_colmap_s_lenses(tmp_path: Path, line: str, focal, centre, distortion, fisheye) -> None:
    formats.write_colmap(tmp_path / "hall", *room_and_cameras(), binary=False)
    (tmp_path / "hall/sparse/0/cameras.txt").write_text(f"1 {line}\n")
    lens = read_colmap(tmp_path / "hall").frames[0].lens
    assert lens == Lens(fisheye, distortion, (48, 48), focal, centre, (None, None))


def edit(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_text(change((folder / name).read_text()))

    return apply


def resize(pattern: str, size: tuple[int, int]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for path in folder.glob(pattern):
            Image.open(path).resize(size).save(path)

    return apply


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def set_camera(key: str, value: object) -> Callable[[str], str]:
    def change(text: str) -> str:
        content = json.loads(text)
        content[3][key] = value
        return json.dumps(content)

    return change


NAN = [[float("nan")] * 4] * 4


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("gsn", remove("cameras.json"), "cameras.json is missing"),
        ("gsn", edit("cameras.json", set_camera("K", [[1, 2], [3, 4]])), "K of camera 3 in .*cameras.json is "),
        ("gsn", edit("cameras.json", set_camera("Rt", NAN)), "Rt of camera 3 in .*cameras.json is "),
        ("gsn", edit("cameras.json", set_camera("Rt", np.diag([2.0, 1, 1, 1]).tolist())), "rotation of camera 3 of .*"),
        ("gsn", edit("cameras.json", lambda text: json.dumps(json.loads(text)[:5])), "5 cameras, but 013_rgb.png"),
        ("gsn", resize("*_depth.tiff", (48, 20)), "is 48 x 20, another aspect"),
        ("tum", remove("groundtruth.txt"), "groundtruth.txt is missing"),
        ("tum", edit("groundtruth.txt", lambda text: text.replace(" ", " 0 ", 40)), "values in line .* of .*truth.txt"),
        ("tum", edit("depth.txt", lambda text: "x" + text[1:]), "something else than numbers in line 1 "),
        ("tum", edit("rgb.txt", lambda text: "# nothing"), "rgb.txt has no lines but comments"),
        ("tum", lambda folder: next((folder / "depth").iterdir()).unlink(), "depth/.*png is missing: restore it"),
        ("replica", remove("cam_params.json"), "cam_params.json is neither in .* nor beside it"),
        ("replica", edit("cam_params.json", lambda text: text.replace("6553.5", "0")), "camera.scale in .* is 0"),
        ("replica", edit("traj.txt", lambda text: text.replace(" ", "\n", 1)), "1 values in line 1 of .*, not 16"),
        ("replica", edit("traj.txt", lambda text: text.splitlines()[0]), "has 1 poses, too few for frame000001.jpg"),
        ("replica", resize("results/frame*.jpg", (48, 30)), "48 x 30 pixels, but its intrinsics are for 48 x 48"),
        ("scannet", remove("intrinsic/intrinsic_color.txt"), "intrinsic_color.txt is missing"),
        ("scannet", remove("pose/3.txt"), "pose/3.txt is missing"),
        ("scannet", edit("pose/3.txt", lambda text: text.replace("1", "one")), "something else than numbers in line"),
        ("scannet", edit("pose/3.txt", lambda text: "1 2 3 4\n"), "pose/3.txt has 1 lines of numbers, not 4"),
        ("scannet", lambda folder: shutil.rmtree(folder / "color"), "There are no files .*jpg in .*color"),
        ("colmap", remove("sparse/0/points3D.bin"), "points3D.bin nor points3D.txt is there"),
        ("colmap", remove("images/frame_00001.png"), "frame_00001.png is missing"),
        ("colmap", lambda f: (f / "sparse/0/images.bin").write_bytes(b"\xff" * 90), "images.bin is damaged"),
        ("colmap", resize("images/*.png", (48, 30)), "48 x 30 pixels, but its intrinsics are for 48 x 48"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_sentence(kind: str, spoil, message: str, tmp_path: Path, capsys) -> None:
    (folder,) = written(kind, tmp_path / "in", 1)
    spoil(folder)
    assert run(kind, tmp_path / "out", [folder]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.count("error: ") == 1 and "Traceback" not in error
    assert re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_tum_needs_to_know_the_camera_and_colmap_the_model(tmp_path: Path, capsys) -> None:
    (folder,) = written("tum", tmp_path, 1)
    with pytest.raises(SystemExit):
        main(["tum", str(tmp_path / "out"), "--scenes", str(folder)])
    assert "give --camera freiburg1" in " ".join(capsys.readouterr().err.split())
    formats.write_colmap(tmp_path / "c", *room_and_cameras(), binary=False)
    (tmp_path / "c/sparse/0/cameras.txt").write_text("1 FULL_OPENCV 48 48 20 21 24 25 0 0 0 0 0 0 0 0\n")
    assert run("colmap", tmp_path / "out", [tmp_path / "c"]) == 2
    assert "is FULL_OPENCV, which cannot be undone here" in " ".join(capsys.readouterr().err.split())
