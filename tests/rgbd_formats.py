"""Small data sets in published formats, written as their own documentation or code has them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from nerfstudio.cameras.cameras import Cameras
from PIL import Image

from nfldm_ns.scenes.views import Views, make_cameras
from tests.synthetic import BoxRoom

GAME_UNITS_PER_METRE = 25.6
TO_Y_UP = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
TO_Y_DOWN = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])


def pictures_and_depths(room: BoxRoom, cameras: Cameras) -> tuple[list[Image.Image], np.ndarray]:
    views = room.render(cameras)
    pixels = views.images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    assert views.depths is not None
    return [Image.fromarray(picture) for picture in pixels], views.depths[:, 0].double().numpy()


def camera_to_worlds(cameras: Cameras, opencv: bool, world: np.ndarray | None = None) -> np.ndarray:
    """`[N, 4, 4]`, of OpenCV's or OpenGL's axes, in a world turned by `world`."""
    poses = np.tile(np.eye(4), (len(cameras), 1, 1))
    poses[:, :3] = cameras.camera_to_worlds.double().numpy()
    if opencv:
        poses = poses @ np.diag([1.0, -1, -1, 1])
    if world is not None:
        poses[:, :3] = world @ poses[:, :3]
    return poses


def quaternion(rotation: np.ndarray) -> list[float]:
    """w, x, y, z: the eigenvector of Bar-Itzhack's matrix."""
    r = rotation
    k = np.array(
        [
            [r[0, 0] - r[1, 1] - r[2, 2], r[1, 0] + r[0, 1], r[2, 0] + r[0, 2], r[2, 1] - r[1, 2]],
            [r[1, 0] + r[0, 1], r[1, 1] - r[0, 0] - r[2, 2], r[2, 1] + r[1, 2], r[0, 2] - r[2, 0]],
            [r[2, 0] + r[0, 2], r[2, 1] + r[1, 2], r[2, 2] - r[0, 0] - r[1, 1], r[1, 0] - r[0, 1]],
            [r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1], r[0, 0] + r[1, 1] + r[2, 2]],
        ]
    )
    x, y, z, w = np.linalg.eigh(k)[1][:, -1]
    return [float(w), float(x), float(y), float(z)]


def lines(*rows: object) -> str:
    return "".join(" ".join(map(str, row if isinstance(row, (list, tuple)) else row.tolist())) + "\n" for row in rows)


def write_gsn_replica(folder: Path, room: BoxRoom, cameras: Cameras) -> None:
    """Of habitat: y up, looking along -z, K of an image from -1 to 1; depth in thousands of metres."""
    folder.mkdir(parents=True)
    half = float(cameras.width[0]) / 2
    matrix = np.diag([float(cameras.fx[0]) / half, float(cameras.fy[0]) / half, 1, 1]).tolist()
    poses = np.linalg.inv(camera_to_worlds(cameras, opencv=False, world=TO_Y_UP))
    (folder / "cameras.json").write_text(json.dumps([{"Rt": pose.tolist(), "K": matrix} for pose in poses]))
    for i, (picture, depth) in enumerate(zip(*pictures_and_depths(room, cameras), strict=True)):
        picture.convert("RGBA").save(folder / f"{i:03d}_rgb.png")
        Image.fromarray((depth / 1000).astype(np.float32)).save(folder / f"{i:03d}_depth.tiff")


def write_gsn_vizdoom(folder: Path, room: BoxRoom, cameras: Cameras, scale: float = 1.0) -> None:
    """In game units, y up, looking along -z; K of 480 pixels, without a centre; the 8-bit depth buffer."""
    folder.mkdir(parents=True)
    unit = GAME_UNITS_PER_METRE * scale
    focal = float(cameras.fx[0]) * 480 / float(cameras.width[0])
    matrix = [[focal, 0, 0], [0, -focal, 0], [0, 0, 1]]
    poses = camera_to_worlds(cameras, opencv=False, world=TO_Y_UP)
    poses[:, :3, 3] *= unit
    entries = [{"Rt": pose.tolist(), "K": matrix} for pose in np.linalg.inv(poses)]
    (folder / "cameras.json").write_text(json.dumps(entries))
    for i, (picture, depth) in enumerate(zip(*pictures_and_depths(room, cameras), strict=True)):
        picture.save(folder / f"{i:03d}_rgb.png")
        Image.fromarray((depth * unit / 100 * 14).round().astype(np.uint8)).save(folder / f"{i:03d}_depth.png")


def write_tum(folder: Path, room: BoxRoom, cameras: Cameras, lost: tuple[int, ...] = ()) -> None:
    """Depth 8 ms after each picture; poses at 100 Hz, but none near the lost ones."""
    for name in ("rgb", "depth"):
        (folder / name).mkdir(parents=True)
    listed: dict[str, list[tuple[str, ...]]] = {"rgb": [], "depth": [], "groundtruth": []}
    poses = camera_to_worlds(cameras, opencv=True)
    for i, (picture, depth) in enumerate(zip(*pictures_and_depths(room, cameras), strict=True)):
        time = 1305031102.175304 + i / 8
        picture.save(folder / f"rgb/{time:.6f}.png")
        listed["rgb"].append((f"{time:.6f}", f"rgb/{time:.6f}.png"))
        Image.fromarray((depth * 5000).round().astype(np.uint16)).save(folder / f"depth/{time + 0.008:.6f}.png")
        listed["depth"].append((f"{time + 0.008:.6f}", f"depth/{time + 0.008:.6f}.png"))
        w, x, y, z = quaternion(poses[i, :3, :3])
        for late in (-0.03, 0.003, 0.04):
            shown = poses[i, :3, 3] if late == 0.003 else poses[i, :3, 3] + 1
            if late != 0.003 or i not in lost:
                row = (time + late, *shown.tolist(), x, y, z, w)
                listed["groundtruth"].append(tuple(f"{value:.6f}" for value in row))
    for name, rows in listed.items():
        head = f"# {name}\n# file: 'rgbd_dataset.bag'\n# timestamp ...\n"
        (folder / f"{name}.txt").write_text(head + lines(*rows))


def write_replica(folder: Path, room: BoxRoom, cameras: Cameras) -> None:
    """`cam_params.json` within the room's folder; it may be moved beside it."""
    (folder / "results").mkdir(parents=True)
    width, height = int(cameras.width[0]), int(cameras.height[0])
    camera = {"w": width, "h": height, "fx": float(cameras.fx[0]), "fy": float(cameras.fy[0])}
    camera |= {"cx": (width - 1) / 2, "cy": (height - 1) / 2, "scale": 6553.5}
    (folder / "cam_params.json").write_text(json.dumps({"camera": camera}))
    (folder / "traj.txt").write_text(lines(*camera_to_worlds(cameras, opencv=True).reshape(-1, 16)))
    for i, (picture, depth) in enumerate(zip(*pictures_and_depths(room, cameras), strict=True)):
        picture.save(folder / f"results/frame{i:06d}.jpg", quality=95)
        Image.fromarray((depth * 6553.5).round().astype(np.uint16)).save(folder / f"results/depth{i:06d}.png")


def write_scannet(folder: Path, room: BoxRoom, cameras: Cameras, lost: tuple[int, ...] = ()) -> None:
    """The depth camera stands where the colour camera does, but sees less, and has larger pixels."""
    for name in ("color", "depth", "pose", "intrinsic"):
        (folder / name).mkdir(parents=True)
    size = int(cameras.width[0])
    width, height, focal = round(size * 0.8), round(size * 0.75), float(cameras.fx[0]) * 0.85
    depth_cameras = make_cameras(
        cameras.camera_to_worlds, torch.tensor(focal), torch.tensor(focal), width / 2 + 1, height / 2, height, width
    )
    for kind, values in {
        "color": (float(cameras.fx[0]), (size - 1) / 2, (size - 1) / 2),
        "depth": (focal, (width + 1) / 2, (height - 1) / 2),
    }.items():
        f, cx, cy = values
        matrix = np.array([[f, 0, cx, 0], [0, f, cy, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        (folder / f"intrinsic/intrinsic_{kind}.txt").write_text(lines(*matrix))
        (folder / f"intrinsic/extrinsic_{kind}.txt").write_text(lines(*np.eye(4)))
    pictures, _ = pictures_and_depths(room, cameras)
    _, depths = pictures_and_depths(room, depth_cameras)
    poses = camera_to_worlds(cameras, opencv=True)
    poses[list(lost)] = -np.inf
    for i, (picture, depth) in enumerate(zip(pictures, depths, strict=True)):
        picture.save(folder / f"color/{i}.jpg", quality=95)
        Image.fromarray((depth * 1000).round().astype(np.uint16)).save(folder / f"depth/{i}.png")
        (folder / f"pose/{i}.txt").write_text(lines(*poses[i]))


def write_colmap(folder: Path, room: BoxRoom, cameras: Cameras, binary: bool = True, num_points: int = 80) -> None:
    """A world whose y points down; each image observes points of its own, and corners that became none."""
    (folder / "images").mkdir(parents=True)
    (folder / "sparse" / "0").mkdir(parents=True)
    size, focal = int(cameras.width[0]), float(cameras.fx[0])
    poses = camera_to_worlds(cameras, opencv=True, world=TO_Y_DOWN)
    pictures, depths = pictures_and_depths(room, cameras)
    generator = np.random.default_rng(0)
    images, points = [], []
    for i in reversed(range(len(poses))):  # COLMAP's order is not that of names
        pictures[i].save(folder / f"images/frame_{i:05d}.png")
        observed = []
        for row, column in generator.integers(0, size, (num_points, 2)):
            ray = (
                np.array([(column + 0.5 - size / 2) / focal, (row + 0.5 - size / 2) / focal, 1])
                * depths[i, row, column]
            )
            points.append((len(points) + 1, poses[i, :3, :3] @ ray + poses[i, :3, 3], i + 1, len(observed)))
            observed += [(column + 0.5, row + 0.5, len(points)), (1.5, 2.5, -1)]
        inverse = np.linalg.inv(poses[i])
        images.append((i + 1, quaternion(inverse[:3, :3]), inverse[:3, 3], f"frame_{i:05d}.png", observed))
    write = _write_colmap_binary if binary else _write_colmap_text
    write(folder / "sparse" / "0", (size, focal), images, points)


def _write_colmap_text(model: Path, camera: tuple[int, float], images: list, points: list) -> None:
    size, focal = camera
    camera_line = [1, "PINHOLE", size, size, focal, focal, size / 2, size / 2]
    (model / "cameras.txt").write_text("# Camera list\n" + lines(camera_line))
    text = "# Image list with two lines of data per image:\n"
    for key, rotation, position, name, observed in images:
        text += lines([key, *rotation, *position, 1, name], [value for point in observed for value in point])
    (model / "images.txt").write_text(text)
    (model / "points3D.txt").write_text(lines(*([k, *xyz, 9, 9, 9, 0.5, image, at] for k, xyz, image, at in points)))


def _write_colmap_binary(model: Path, camera: tuple[int, float], images: list, points: list) -> None:
    size, focal = camera
    data = struct.pack("<QiiQQ4d", 1, 1, 1, size, size, focal, focal, size / 2, size / 2)
    (model / "cameras.bin").write_bytes(data)
    data = struct.pack("<Q", len(images))
    for key, rotation, position, name, observed in images:
        data += struct.pack("<i7di", key, *rotation, *position, 1) + name.encode() + b"\0"
        data += struct.pack("<Q", len(observed)) + b"".join(struct.pack("<ddq", *point) for point in observed)
    (model / "images.bin").write_bytes(data)
    data = struct.pack("<Q", len(points))
    for key, xyz, image, at in points:
        data += struct.pack("<Q3d3BdQii", key, *xyz, 9, 9, 9, 0.5, 1, image, at)
    (model / "points3D.bin").write_bytes(data)


WRITERS: dict[str, Callable[[Path, BoxRoom, Cameras], None]] = {
    "gsn": write_gsn_replica,
    "tum": write_tum,
    "replica": write_replica,
    "scannet": write_scannet,
    "colmap": write_colmap,
}
"""By sub-command of `nfldm-collect`."""


def options_of(kind: str, size: int, focal: float) -> list[str]:
    """What the sub-command needs to be told for such images."""
    centre = str((size - 1) / 2)
    return ["--intrinsics", str(focal), str(focal), centre, centre] if kind == "tum" else []


def expected(room: BoxRoom, cameras: Cameras, chosen: list[int], origin: list[int]) -> Views:
    """Views of chosen frames, recentred on the mean of others."""
    views = room.render(cameras)[chosen]
    centre = cameras.camera_to_worlds[origin, :, 3].mean(dim=0)
    views.cameras.camera_to_worlds[:, :, 3] -= centre
    return views
