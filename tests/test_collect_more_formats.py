"""Published formats of phones and cars become scenes, as their own documentation says what they mean."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nfldm_ns.collect.captures import Capture
from nfldm_ns.collect.checking import check_collection
from nfldm_ns.collect.formats.arkitscenes import read_arkitscenes
from nfldm_ns.collect.formats.kitti360 import read_kitti360
from nfldm_ns.collect.formats.polycam import read_polycam
from nfldm_ns.collect.formats.record3d import read_record3d
from nfldm_ns.collect.formats.scannetpp import read_scannetpp
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import SceneCollection
from tests import more_formats as formats
from tests.rgbd_formats import camera_to_worlds
from tests.test_collect_formats import COUNT, SIZE, assert_same, edit, remove, resize, room_and_cameras, truth
from tests.test_collect_formats import run as run_import

NUSCENES = formats.OPTIONS["nuscenes"]
READERS = {
    "record3d": read_record3d,
    "polycam": read_polycam,
    "arkitscenes": read_arkitscenes,
    "scannetpp": read_scannetpp,
    "kitti360": read_kitti360,
}


def run(kind: str, root: Path, captures: list[Path], *options: str) -> int:
    return run_import(kind, root, captures, *formats.OPTIONS.get(kind, []), *options)


def folder_of(kind: str, root: Path, name: str) -> Path:
    return root / "data_2d_raw" / name if kind == "kitti360" else root / name


def written(kind: str, root: Path, count: int = 2) -> list[Path]:
    folders = [folder_of(kind, root, f"hall{i}") for i in range(count)]
    for i, folder in enumerate(folders):
        formats.WRITERS[kind](folder, *room_and_cameras(i))
    return folders


@pytest.mark.parametrize("kind", formats.WRITERS)
def test_poses_images_and_depths_are_the_true_ones(kind: str, tmp_path: Path, capsys) -> None:
    root = tmp_path / "out"
    assert run(kind, root, written(kind, tmp_path / "in")) == 0
    collection = SceneCollection.open(root)
    assert json.loads((root / "collection.json").read_text())["made_by"]["command"] == f"nfldm-collect {kind}"
    for i in range(2):
        scene = collection.load_scene(f"hall{i}")
        for found, true in zip((scene.source, scene.target), truth(i), strict=True):
            assert_same(found, true, colour=0.015, depth=0.02 if kind == "kitti360" else 0.002)
            share = float((found.depths > 0).float().mean())
            assert 0.02 <= share <= 0.1 if kind == "kitti360" else share == 1
            assert found.masks is None
    report = check_collection(collection)
    assert report.ok, report.all_problems
    assert "left out" not in capsys.readouterr().out


def test_nuscenes_scenes_are_the_true_ones(tmp_path: Path, capsys) -> None:
    formats.write_nuscenes(tmp_path / "in", {f"hall{i}": room_and_cameras(i) for i in range(2)})
    root = tmp_path / "out"
    assert run_import("nuscenes", root, [tmp_path / "in"], *NUSCENES) == 0
    assert "There is no map expansion of boston-seaport" in " ".join(capsys.readouterr().out.split())
    collection = SceneCollection.open(root)
    for i in range(2):
        scene = collection.load_scene(f"hall{i}")
        for found, true in zip((scene.source, scene.target), truth(i), strict=True):
            assert_same(found, true, colour=0.015, depth=0.02)
            assert 0.02 <= float((found.depths > 0).float().mean()) <= 0.1
        assert scene.bev is None
    assert check_collection(collection).ok


def test_nuscenes_maps_lie_where_the_cameras_do(tmp_path: Path) -> None:
    """All that is drivable lies north of the line y = 0.5 and east of x = -1."""
    formats.write_nuscenes(tmp_path / "in", {"hall0": room_and_cameras(0), "hall1": room_and_cameras(1)})
    formats.write_map_expansion(tmp_path / "in", [(-1, 0.5), (50, 0.5), (50, 50), (-1, 50)])
    options = [*NUSCENES, "--scene-names", "hall1", "--test-fraction", "0"]
    assert run_import("nuscenes", tmp_path / "out", [tmp_path / "in"], *options) == 0
    collection = SceneCollection.open(tmp_path / "out")
    bev = collection.load_bev("hall1", (64, 64))
    place = json.loads((tmp_path / "out/collection.json").read_text())["scenes"]["hall1"]["origin"]
    steps = (np.arange(64) + 0.5) / 64
    (low, high) = (np.array(corner[:2]) for corner in collection.aabb)
    x, y = low[0] + steps * (high[0] - low[0]) + place[0], high[1] - steps * (high[1] - low[1]) + place[1]
    expected = (y > 0.5)[:, None] & (x > -1)[None]
    assert np.mean((bev == 1) != expected) < 0.03 and 0.2 < expected.mean() < 0.8
    assert [c.name for c in collection.bev_classes][1] == "drivable area"


def test_a_recording_of_record3d_is_the_same_as_its_export(tmp_path: Path, monkeypatch, capsys) -> None:
    """LZFSE itself is another package's; its block of what is not compressed is enough here."""

    def decompress(content: bytes) -> bytes:
        assert content[:4] == b"bvx-" and content[-4:] == b"bvx$"
        return content[8:-4]

    monkeypatch.setitem(sys.modules, "liblzfse", types.SimpleNamespace(decompress=decompress))
    formats.write_r3d(tmp_path / "hall", *room_and_cameras())
    assert run("record3d", tmp_path / "out", [tmp_path / "hall"]) == 0
    found = SceneCollection.open(tmp_path / "out").load_scene("hall")
    assert_same(found.source, truth(1)[0], colour=0.015)
    (tmp_path / "hall/rgbd/0.depth").write_bytes(formats.lzfse(b"1234"))
    for i in range(1, COUNT):
        shutil.copy(tmp_path / "hall/rgbd/0.depth", tmp_path / f"hall/rgbd/{i}.depth")
    assert run("record3d", tmp_path / "again", [tmp_path / "hall"]) == 2
    assert ".depth holds 4 bytes, not 48 x 48 depths" in " ".join(capsys.readouterr().err.split())


def test_without_its_package_lzfse_is_one_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "liblzfse", None)
    formats.write_r3d(tmp_path / "hall", *room_and_cameras())
    assert run("record3d", tmp_path / "out", [tmp_path / "hall"]) == 2
    assert "'pip install pyliblzfse' brings what reads it" in " ".join(capsys.readouterr().err.split())


def test_record3d_s_frames_may_have_lenses_of_their_own(tmp_path: Path) -> None:
    (folder,) = written("record3d", tmp_path, 1)
    path = folder / "EXR_RGBD" / "metadata.json"
    content = json.loads(path.read_text())
    content["perFrameIntrinsicCoeffs"] = [[20.0 + i, 21.0, 23.0, 25.0] for i in range(COUNT)]
    path.write_text(json.dumps(content))
    lenses = [frame.lens.intrinsics((SIZE, SIZE), "x").tolist() for frame in read_record3d(folder).frames]
    assert lenses == content["perFrameIntrinsicCoeffs"]


def test_polycam_without_corrections_takes_the_originals_and_leaves_out_the_blurred(tmp_path: Path) -> None:
    (folder,) = written("polycam", tmp_path, 1)
    shutil.rmtree(folder / "keyframes" / "corrected_cameras")
    capture = read_polycam(folder, min_blur_score=103)
    assert len(capture.frames) == COUNT - 3 and capture.notes[0].startswith(f"3 of {COUNT} pictures")
    assert {float(frame.pose[0, 3]) for frame in capture.frames} == {7.0}


def test_arkitscenes_pictures_without_a_pose_are_counted(tmp_path: Path) -> None:
    (folder,) = written("arkitscenes", tmp_path, 1)
    path = folder / "hall0_frames" / "lowres_wide.traj"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(row for i, row in enumerate(rows) if i not in (4, 10)))
    capture = read_arkitscenes(folder)
    assert len(capture.frames) == COUNT - 2
    assert capture.notes[0] == f"2 of {COUNT} pictures of {folder} have no pose within 0.005 s"


def test_scannetpp_masks_are_honoured_and_lost_poses_left_out(tmp_path: Path) -> None:
    (folder,) = written("scannetpp", tmp_path, 1)
    mask = np.full((SIZE, SIZE), 255, np.uint8)
    mask[:12] = 0
    for path in (folder / "iphone" / "rgb_masks").iterdir():
        Image.fromarray(mask).save(path)
    path = folder / "iphone" / "pose_intrinsic_imu.json"
    content = json.loads(path.read_text())
    content["frame_000010"]["aligned_pose"] = [[float("-inf")] * 4] * 4
    path.write_text(json.dumps(content))
    assert len(read_scannetpp(folder).frames) == COUNT - 1
    assert run("scannetpp", tmp_path / "out", [folder]) == 0
    masks = SceneCollection.open(tmp_path / "out").load_scene("hall0").source.masks
    assert torch.equal(masks, torch.from_numpy(mask > 0).expand_as(masks))


def test_scannetpp_s_dslr_is_turned_upright_and_undistorted(tmp_path: Path) -> None:
    """Its transforms.json has x and y exchanged and z turned round; without distortion a fisheye is equidistant."""
    _, cameras = room_and_cameras()
    poses = camera_to_worlds(cameras, opencv=False, world=np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, -1]]))
    root = tmp_path / "scene" / "dslr"
    for name in ("nerfstudio", "resized_images", "resized_anon_masks"):
        (root / name).mkdir(parents=True)
    content: dict = {"camera_model": "OPENCV_FISHEYE", "fl_x": 24.0, "fl_y": 24.0, "cx": 24.0, "cy": 24.0, "w": 48}
    content |= {"h": 48, "k1": 0.0, "k2": 0.0, "k3": 0.0, "k4": 0.0, "has_mask": True, "frames": [], "test_frames": []}
    for i, pose in enumerate(poses):
        name = f"DSC{i:05d}"
        Image.fromarray(np.full((48, 48, 3), 90, np.uint8)).save(root / f"resized_images/{name}.JPG")
        Image.fromarray(np.full((48, 48), 255, np.uint8)).save(root / f"resized_anon_masks/{name}.png")
        frame = {
            "file_path": f"{name}.JPG",
            "mask_path": f"{name}.png",
            "transform_matrix": pose.tolist(),
            "is_bad": i == 5,
        }
        content["test_frames" if i >= 10 else "frames"].append(frame)
    (root / "nerfstudio" / "transforms.json").write_text(json.dumps(content))
    capture: Capture = read_scannetpp(tmp_path / "scene", "dslr")
    assert [len(capture.splits[name]) for name in ("train", "test")] == [9, 4]
    left = [i for i in range(COUNT) if i != 5]
    true = camera_to_worlds(cameras, opencv=False)[left, :3]
    np.testing.assert_allclose(np.stack([frame.pose for frame in capture.frames]), true, atol=1e-9)
    options = ["--camera", "dslr", "--num-source-views", "6"]
    assert run("scannetpp", tmp_path / "out", [tmp_path / "scene"], *options) == 0
    views = SceneCollection.open(tmp_path / "out").load_scene("scene").source
    assert views.depths is None and abs(float(views.images.mean()) - 90 / 255) < 0.01


def test_kitti360_s_right_camera_stands_beside_the_left(tmp_path: Path) -> None:
    (folder,) = written("kitti360", tmp_path, 1)
    left, right = (read_kitti360(folder, side).frames for side in ("left", "right"))
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(b.pose[:, 3] - a.pose[:, 3], formats.BASELINE * a.pose[:, 0], atol=1e-9)
        np.testing.assert_allclose(b.pose[:, :3], a.pose[:, :3])
    # A wall is where it is, whichever camera sees it.
    worlds = [f.read_points() * [1, -1, -1] @ f.pose[:, :3].T + f.pose[:, 3] for f in (left[0], right[0])]
    room, _ = room_and_cameras(0)
    for points in worlds:
        gap = np.minimum(np.abs(points - room.corners[0].numpy()), np.abs(points - room.corners[1].numpy())).min(axis=1)
        assert len(points) > 50 and gap.max() < 1e-4
    first = read_kitti360(folder).frames[:2]
    assert [f.name for f in first] == ["image_00/0000000001", "image_01/0000000001"]
    assert [f.camera for f in first] == ["image_00", "image_01"], "whose path is not counted between them"


def test_kitti360_leaves_out_what_has_no_pose_or_scan(tmp_path: Path) -> None:
    (folder,) = written("kitti360", tmp_path, 1)
    path = tmp_path / "data_poses" / "hall0" / "cam0_to_world.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    (tmp_path / "data_3d_raw/hall0/velodyne_points/data/0000000004.bin").unlink()
    capture = read_kitti360(folder, "left")
    assert len(capture.frames) == COUNT - 2 and capture.notes[0].startswith("2 pictures of ")
    shutil.rmtree(tmp_path / "data_3d_raw")
    capture = read_kitti360(folder, "left")
    assert len(capture.frames) == COUNT - 1 and not capture.frames[0].has_depth


def set_key(name: str, change) -> object:
    def apply(text: str) -> str:
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return edit(name, apply)


META = "EXR_RGBD/metadata.json"
CAMERA = "keyframes/corrected_cameras/5003.json"
IMU = "iphone/pose_intrinsic_imu.json"
TRAJ = "hall0_frames/lowres_wide.traj"


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("record3d", remove(META), "Neither metadata nor metadata.json is in .*EXR_RGBD"),
        ("record3d", set_key(META, lambda c: c.pop("K")), "metadata.json lacks 'K'"),
        ("record3d", set_key(META, lambda c: c.update(poses=c["poses"][:5])), "has 5 poses, too few for 13.jpg"),
        ("record3d", set_key(META, lambda c: c["poses"].__setitem__(2, [2.0] * 7)), "quaternion of frame 2 of "),
        ("record3d", lambda f: shutil.rmtree(f / "EXR_RGBD/rgb"), "There are no pictures 0.jpg"),
        ("record3d", set_key(META, lambda c: c.update(w=40)), "but its intrinsics are for 40 x 48"),
        ("polycam", lambda f: shutil.rmtree(f / "keyframes"), "neither images and cameras nor corrected_images"),
        ("polycam", set_key(CAMERA, lambda c: c.pop("fx")), "5003.json lacks 'fx'"),
        ("polycam", set_key(CAMERA, lambda c: c.update(t_00=9.0)), "rotation of .*5003.json is not orthonormal"),
        ("polycam", remove("keyframes/depth/5003.png"), "depth/5003.png is missing"),
        ("polycam", lambda f: [p.unlink() for p in (f / "keyframes/corrected_cameras").iterdir()], "a usable camera"),
        ("arkitscenes", remove(TRAJ), "lowres_wide.traj is missing"),
        ("arkitscenes", edit(TRAJ, lambda text: text.replace(" ", " 0 ", 1)), "8 values in line 1 of .*, not 7"),
        ("arkitscenes", edit(TRAJ, lambda text: "1 0 0 0 1 1 1\n"), "has a pose within 0.005 s"),
        ("arkitscenes", lambda f: shutil.rmtree(f / "hall0_frames/lowres_wide_intrinsics"), "No .pincam file of"),
        ("arkitscenes", resize("*/lowres_depth/*.png", (48, 20)), "is 48 x 20, another aspect"),
        ("scannetpp", remove(IMU), "pose_intrinsic_imu.json is missing"),
        ("scannetpp", set_key(IMU, lambda c: c["frame_000020"].pop("intrinsic")), "lacks .*intrinsic"),
        ("scannetpp", set_key(IMU, lambda c: c["frame_000020"].update(aligned_pose=[[1.0]])), "aligned_pose.* is "),
        ("scannetpp", lambda f: shutil.rmtree(f / "iphone/rgb"), "unpack rgb.mkv and depth.bin"),
        ("scannetpp", remove("iphone/rgb_masks/frame_000020.png"), "rgb_masks/frame_000020.png is missing"),
        ("kitti360", remove("../../calibration/perspective.txt"), "perspective.txt is missing"),
        ("kitti360", edit("../../calibration/perspective.txt", lambda t: t.replace("P_rect_00", "x")), "lacks P_rect"),
        ("kitti360", edit("../../calibration/calib_cam_to_velo.txt", lambda t: t + t), "has 2 lines of numbers, not 1"),
        ("kitti360", edit("../../data_poses/hall0/cam0_to_world.txt", lambda t: "1 2\n"), "2 values in line 1 of .*17"),
        ("kitti360", lambda f: shutil.rmtree(f / "image_00"), "There are no pictures in .*data_rect"),
        (
            "kitti360",
            lambda f: [p.write_bytes(b"123") for p in f.glob("../../data_3d_raw/hall0/*/data/*.bin")],
            "has 3 bytes, which no scan",
        ),
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


@pytest.mark.parametrize("kind", READERS)
def test_an_empty_folder_is_one_sentence(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserInputError):
        READERS[kind](tmp_path)


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lambda root: None, ["--version", "v1.0-test"], "There is no folder v1.0-test in"),
        (lambda root: None, ["--scene-names", "scene-9999"], "There is no scene scene-9999 in"),
        (lambda root: None, ["--cameras", "CAM_TOP"], "CAM_TOP is no camera of nuScenes"),
        (remove("v1.0-mini/ego_pose.json"), [], "devkit cannot read v1.0-mini in .*FileNotFoundError"),
        (remove("samples/LIDAR_TOP/hall0-2.pcd.bin"), [], "hall0-2.pcd.bin cannot be read"),
        (
            set_key("v1.0-mini/ego_pose.json", lambda c: [row.update(rotation=[2.0, 0, 0, 0]) for row in c]),
            [],
            "quaternion of ego_pose of samples/CAM_FRONT/hall0-0.jpg .* has length 2",
        ),
        (
            set_key("v1.0-mini/calibrated_sensor.json", lambda c: c[0].pop("translation")),
            [],
            "of hall0 .*damaged",
        ),
    ],
)
def test_what_cannot_be_used_of_nuscenes_is_one_sentence(spoil, options, message, tmp_path: Path, capsys) -> None:
    formats.write_nuscenes(tmp_path / "in", {"hall0": room_and_cameras(0)})
    spoil(tmp_path / "in")
    assert run_import("nuscenes", tmp_path / "out", [tmp_path / "in"], *NUSCENES, *options) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.count("error: ") == 1 and re.search(message, error), error
    assert not (tmp_path / "out").exists()
