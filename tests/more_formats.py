"""More small data sets in published formats: of phones and of cars."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from nerfstudio.cameras.cameras import Cameras
from PIL import Image
from scipy.spatial.transform import Rotation

from tests.rgbd_formats import TO_Y_UP, camera_to_worlds, lines, pictures_and_depths, quaternion
from tests.synthetic import BoxRoom

BASELINE = 0.4
NUSCENES_CAMERAS = ("CAM_FRONT", "CAM_BACK")
NUSCENES_TABLES = ("category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose", "log")
NUSCENES_TABLES += ("scene", "sample", "sample_data", "sample_annotation", "map")


def millimetres(depth: np.ndarray) -> Image.Image:
    return Image.fromarray((depth * 1000).round().astype(np.uint16))


def lzfse(content: bytes) -> bytes:
    """A stream of LZFSE's block for what is not compressed, and of its end."""
    return b"bvx-" + struct.pack("<I", len(content)) + content + b"bvx$"


def record3d_metadata(cameras: Cameras) -> dict:
    """K has its columns one after the other; poses are x, y, z, w and the position; y is up."""
    size, focal = int(cameras.width[0]), float(cameras.fx[0])
    poses = camera_to_worlds(cameras, opencv=False, world=TO_Y_UP)
    rows = []
    for pose in poses:
        w, x, y, z = quaternion(pose[:3, :3])
        rows.append([x, y, z, w, *pose[:3, 3].tolist()])
    matrix = [focal, 0, 0, 0, focal, 0, size / 2, size / 2, 1]
    return {"w": size, "h": size, "dw": size, "dh": size, "fps": 60, "K": matrix, "poses": rows, "initPose": rows[0]}


def write_record3d(folder: Path, room: BoxRoom, cameras: Cameras) -> None:
    """The export EXR + RGB."""
    os.environ.setdefault("OPENCV_IO_ENABLE_OPENEXR", "1")
    import cv2

    for name in ("rgb", "depth"):
        (folder / "EXR_RGBD" / name).mkdir(parents=True)
    (folder / "EXR_RGBD" / "metadata.json").write_text(json.dumps(record3d_metadata(cameras)))
    for i, (picture, depth) in enumerate(zip(*pictures_and_depths(room, cameras), strict=True)):
        picture.save(folder / f"EXR_RGBD/rgb/{i}.jpg", quality=95)
        assert cv2.imwrite(str(folder / f"EXR_RGBD/depth/{i}.exr"), depth.astype(np.float32))


def write_r3d(folder: Path, room: BoxRoom, cameras: Cameras) -> None:
    """An unpacked recording: depth in single precision, compressed by LZFSE."""
    (folder / "rgbd").mkdir(parents=True)
    (folder / "metadata").write_text(json.dumps(record3d_metadata(cameras)))
    for i, (picture, depth) in enumerate(zip(*pictures_and_depths(room, cameras), strict=True)):
        picture.save(folder / f"rgbd/{i}.jpg", quality=95)
        (folder / f"rgbd/{i}.depth").write_bytes(lzfse(depth.astype("<f4").tobytes()))
        (folder / f"rgbd/{i}.conf").write_bytes(lzfse(bytes([2]) * depth.size))


def write_polycam(folder: Path, room: BoxRoom, cameras: Cameras) -> None:
    """Corrected pictures and cameras beside the original ones, whose poses are off; y is up."""
    size, focal = int(cameras.width[0]), float(cameras.fx[0])
    root = folder / "keyframes"
    for name in ("images", "cameras", "corrected_images", "corrected_cameras", "depth", "confidence"):
        (root / name).mkdir(parents=True)
    poses = camera_to_worlds(cameras, opencv=False, world=TO_Y_UP)
    for i, (picture, depth) in enumerate(zip(*pictures_and_depths(room, cameras), strict=True)):
        camera = {"fx": focal, "fy": focal, "cx": size / 2, "cy": size / 2, "width": size, "height": size}
        camera |= {f"t_{row}{column}": float(poses[i, row, column]) for row in range(3) for column in range(4)}
        camera |= {"blur_score": 100.0 + i, "timestamp": 5000 + i, "neighbors": [], "manual_keyframe": False}
        name = f"{5000 + i}"
        (root / f"corrected_cameras/{name}.json").write_text(json.dumps(camera))
        (root / f"cameras/{name}.json").write_text(json.dumps({**camera, "t_03": 7.0}))
        for kind in ("images", "corrected_images"):
            picture.save(root / f"{kind}/{name}.jpg", quality=95)
        millimetres(depth).save(root / f"depth/{name}.png")
        Image.fromarray(np.full(depth.shape, 255, np.uint8)).save(root / f"confidence/{name}.png")


def write_arkitscenes(folder: Path, room: BoxRoom, cameras: Cameras) -> None:
    """World-to-camera of OpenCV as axis times angle; poses between those of pictures are of nothing."""
    root = folder / f"{folder.name}_frames"
    for name in ("lowres_wide", "lowres_depth", "lowres_wide_intrinsics"):
        (root / name).mkdir(parents=True)
    size, focal = int(cameras.width[0]), float(cameras.fx[0])
    trajectory = []
    inverse = np.linalg.inv(camera_to_worlds(cameras, opencv=True))
    for i, (picture, depth) in enumerate(zip(*pictures_and_depths(room, cameras), strict=True)):
        time = 6845.117 + i / 10
        rotation = Rotation.from_matrix(inverse[i, :3, :3]).as_rotvec()
        trajectory.append([f"{time + 0.0004:.6f}", *rotation.tolist(), *inverse[i, :3, 3].tolist()])
        trajectory.append([f"{time + 0.05:.6f}", 0.1, 0.2, 0.3, 9.0, 9.0, 9.0])
        name = f"{folder.name}_{time:.3f}"
        picture.save(root / f"lowres_wide/{name}.png")
        millimetres(depth).save(root / f"lowres_depth/{name}.png")
        # A millisecond off for every third: the data set's own readers look there, too.
        stem = f"{folder.name}_{time + (0.001 if i % 3 == 0 else 0):.3f}"
        (root / f"lowres_wide_intrinsics/{stem}.pincam").write_text(
            lines([size, size, focal, focal, size / 2, size / 2])
        )
    (root / "lowres_wide.traj").write_text(lines(*trajectory))


def write_scannetpp(folder: Path, room: BoxRoom, cameras: Cameras) -> None:
    """The iPhone's frames, as the toolkit unpacks them, every picture masked nowhere."""
    root = folder / "iphone"
    for name in ("rgb", "depth", "rgb_masks"):
        (root / name).mkdir(parents=True)
    size, focal = int(cameras.width[0]), float(cameras.fx[0])
    matrix = [[focal, 0, (size - 1) / 2], [0, focal, (size - 1) / 2], [0, 0, 1]]
    poses = camera_to_worlds(cameras, opencv=True)
    entries = {}
    for i, (picture, depth) in enumerate(zip(*pictures_and_depths(room, cameras), strict=True)):
        name = f"frame_{10 * i:06d}"
        entries[name] = {"timestamp": i / 6, "pose": np.eye(4).tolist(), "intrinsic": matrix}
        entries[name]["aligned_pose"] = poses[i].tolist()
        picture.save(root / f"rgb/{name}.jpg", quality=95)
        millimetres(depth).save(root / f"depth/{name}.png")
        Image.fromarray(np.full(depth.shape, 255, np.uint8)).save(root / f"rgb_masks/{name}.png")
    (root / "pose_intrinsic_imu.json").write_text(json.dumps(entries))


def points_on_walls(room: BoxRoom, eye: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`[count, 3]`: where rays in all directions meet the room, which is convex, so that all cameras see them."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=-1)
    origin = torch.from_numpy(eye).float().expand(count, 3)
    _, distance = room.trace(origin, directions)
    return (origin + distance[:, None] * directions).double().numpy()


def turned(seed: int) -> np.ndarray:
    """A rigid transform."""
    generator = np.random.default_rng(seed)
    found = np.eye(4)
    found[:3, :3] = Rotation.random(random_state=seed).as_matrix()
    found[:3, 3] = generator.uniform(-2, 2, 3)
    return found


def write_kitti360(folder: Path, room: BoxRoom, cameras: Cameras) -> None:
    """A drive: `folder` is `<data set>/data_2d_raw/<drive>`. The right camera repeats the left one's pictures."""
    root, drive = folder.parent.parent, folder.name
    size, focal = int(cameras.width[0]), float(cameras.fx[0])
    (root / "calibration").mkdir(parents=True, exist_ok=True)
    (root / "data_poses" / drive).mkdir(parents=True)
    scans = root / "data_3d_raw" / drive / "velodyne_points" / "data"
    scans.mkdir(parents=True)
    for number in (0, 1):
        (folder / f"image_0{number}" / "data_rect").mkdir(parents=True)
    rectify = np.eye(4)
    rectify[:3, :3] = Rotation.from_rotvec([0.01, -0.02, 0.015]).as_matrix()
    to_velodyne = turned(3)
    text = "calib_time: 20-Feb-2020 10:00:00\ncorner_dist: 9.950000e-02\n"
    for number in (0, 1):
        matrix = np.array([[focal, 0, (size - 1) / 2, 0], [0, focal, (size - 1) / 2, 0], [0, 0, 1, 0]])
        matrix[0, 3] = -focal * BASELINE * number
        rotation = rectify[:3, :3] if number == 0 else np.eye(3)
        text += f"S_rect_0{number}: " + lines([float(size), float(size)])
        text += f"R_rect_0{number}: " + lines(rotation.reshape(-1)) + f"P_rect_0{number}: " + lines(matrix.reshape(-1))
    (root / "calibration" / "perspective.txt").write_text(text)
    (root / "calibration" / "calib_cam_to_velo.txt").write_text(lines(to_velodyne[:3].reshape(-1)))
    poses = camera_to_worlds(cameras, opencv=True)
    rows = []
    for i, (picture, _) in enumerate(zip(*pictures_and_depths(room, cameras), strict=True)):
        index = 3 * i + 1
        rows.append([index, *poses[i].reshape(-1).tolist()])
        for number in (0, 1):
            picture.save(folder / f"image_0{number}/data_rect/{index:010d}.png")
        to_scan = to_velodyne @ np.linalg.inv(rectify) @ np.linalg.inv(poses[i])
        points = points_on_walls(room, poses[i, :3, 3], 600, i) @ to_scan[:3, :3].T + to_scan[:3, 3]
        scan = np.concatenate([points, np.full((len(points), 1), 0.3)], axis=1)
        (scans / f"{index:010d}.bin").write_bytes(scan.astype("<f4").tobytes())
    (root / "data_poses" / drive / "cam0_to_world.txt").write_text(lines(*rows))


def write_nuscenes(root: Path, rooms: dict[str, tuple[BoxRoom, Cameras]], version: str = "v1.0-mini") -> None:
    """Scenes of two cameras: frames alternate between them, each with a car pose of its own, as they come in time."""
    tables: dict[str, list[dict]] = {name: [] for name in NUSCENES_TABLES}
    (root / version).mkdir(parents=True)
    (root / "maps").mkdir()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(root / "maps/mask.png")
    for channel in (*NUSCENES_CAMERAS, "LIDAR_TOP"):
        modality = "lidar" if channel == "LIDAR_TOP" else "camera"
        tables["sensor"].append({"token": channel, "channel": channel, "modality": modality})
        (root / "samples" / channel).mkdir(parents=True)
    tables["map"].append({"token": "map", "log_tokens": [], "category": "semantic_prior", "filename": "maps/mask.png"})
    for name, (room, cameras) in rooms.items():
        _add_scene(root, tables, name, room, cameras)
    for name, rows in tables.items():
        (root / version / f"{name}.json").write_text(json.dumps(rows))


def _add_scene(root: Path, tables: dict[str, list[dict]], name: str, room: BoxRoom, cameras: Cameras) -> None:
    size, focal = int(cameras.width[0]), float(cameras.fx[0])
    matrix = [[focal, 0, (size - 1) / 2], [0, focal, (size - 1) / 2], [0, 0, 1]]
    poses = camera_to_worlds(cameras, opencv=True)
    pictures, _ = pictures_and_depths(room, cameras)
    count = len(poses) // len(NUSCENES_CAMERAS)
    log = {
        "token": f"log-{name}",
        "logfile": name,
        "vehicle": "n008",
        "date_captured": "2018",
        "location": "boston-seaport",
    }
    tables["log"].append(log)
    tables["map"][0]["log_tokens"].append(log["token"])
    scene = {"token": name, "name": name, "log_token": log["token"], "nbr_samples": count, "description": ""}
    scene |= {"first_sample_token": f"{name}-0", "last_sample_token": f"{name}-{count - 1}"}
    tables["scene"].append(scene)

    def add(
        key: str, sample: str, channel: str, sensor: np.ndarray, ego: np.ndarray, file: str, intrinsic: list
    ) -> None:
        for table, pose in (("ego_pose", ego), ("calibrated_sensor", sensor)):
            record = {"token": key, "rotation": quaternion(pose[:3, :3]), "translation": pose[:3, 3].tolist()}
            extra = {"sensor_token": channel, "camera_intrinsic": intrinsic} if table == "calibrated_sensor" else {}
            tables[table].append({**record, **extra})
        data = {"token": key, "sample_token": sample, "ego_pose_token": key, "calibrated_sensor_token": key}
        data |= {"filename": file, "is_key_frame": True, "width": size, "height": size, "prev": "", "next": ""}
        tables["sample_data"].append(data)

    for i in range(count):
        sample = f"{name}-{i}"
        neighbours = {"prev": f"{name}-{i - 1}" if i else "", "next": f"{name}-{i + 1}" if i + 1 < count else ""}
        tables["sample"].append({"token": sample, "timestamp": i, "scene_token": name, **neighbours})
        for j, channel in enumerate(NUSCENES_CAMERAS):
            at = len(NUSCENES_CAMERAS) * i + j
            file, ego = f"samples/{channel}/{name}-{i}.jpg", turned(100 * i + j)
            pictures[at].save(root / file, quality=95)
            add(f"{sample}-{channel}", sample, channel, np.linalg.inv(ego) @ poses[at], ego, file, matrix)
        file, ego, sensor = f"samples/LIDAR_TOP/{name}-{i}.pcd.bin", turned(100 * i + 50), turned(7)
        to_scan = np.linalg.inv(ego @ sensor)
        points = points_on_walls(room, np.zeros(3), 600, i) @ to_scan[:3, :3].T + to_scan[:3, 3]
        scan = np.concatenate([points, np.full((len(points), 2), 1.0)], axis=1)
        (root / file).write_bytes(scan.astype("<f4").tobytes())
        add(f"{sample}-LIDAR_TOP", sample, "LIDAR_TOP", sensor, ego, file, [])


def write_map_expansion(root: Path, corners: list[tuple[float, float]]) -> None:
    """A map of Boston with one drivable area."""
    names = (
        "polygon",
        "line",
        "node",
        "drivable_area",
        "road_segment",
        "road_block",
        "lane",
        "ped_crossing",
        "walkway",
    )
    names += ("stop_line", "carpark_area", "road_divider", "lane_divider", "traffic_light", "lane_connector")
    content: dict = {name: [] for name in names} | {"arcline_path_3": {}, "connectivity": {}}
    content |= {"version": "1.3", "canvas_edge": [2979.5, 2118.1]}
    content["node"] = [{"token": f"n{i}", "x": x, "y": y} for i, (x, y) in enumerate(corners)]
    content["polygon"] = [
        {"token": "p", "exterior_node_tokens": [node["token"] for node in content["node"]], "holes": []}
    ]
    content["drivable_area"] = [{"token": "d", "polygon_tokens": ["p"]}]
    (root / "maps" / "expansion").mkdir(parents=True)
    (root / "maps" / "expansion" / "boston-seaport.json").write_text(json.dumps(content))


WRITERS: dict[str, Callable[[Path, BoxRoom, Cameras], None]] = {
    "record3d": write_record3d,
    "polycam": write_polycam,
    "arkitscenes": write_arkitscenes,
    "scannetpp": write_scannetpp,
    "kitti360": write_kitti360,
}
"""By sub-command of `nfldm-collect`; one folder is one capture."""
OPTIONS = {
    "kitti360": ["--cameras", "left"],
    "nuscenes": ["--version", "v1.0-mini", "--cameras", *NUSCENES_CAMERAS],
}
