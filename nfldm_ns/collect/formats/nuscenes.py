"""Scenes of nuScenes (Caesar et al., CVPR 2020), read through its devkit: six cameras, Lidar as sparse depth, maps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from nfldm_ns.collect.captures import Capture, CapturedFrame, GroundMap
from nfldm_ns.collect.formats.lidar import points_before, rigid
from nfldm_ns.collect.formats.reading import PIXEL_CENTRE, checked_pose, opengl_pose, pinhole, rotation_of
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import BevClass

CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
LIDAR = "LIDAR_TOP"
LAYERS = ("drivable_area", "carpark_area", "walkway", "ped_crossing")  # later ones cover earlier ones
MAP_CLASSES = (
    BevClass(0, "void", (0, 0, 0)),
    BevClass(1, "drivable area", (120, 120, 120)),
    BevClass(2, "car park", (90, 90, 160)),
    BevClass(3, "walkway", (200, 170, 110)),
    BevClass(4, "crossing", (240, 240, 240)),
)
_FINER = 4  # the devkit rounds corners to cells; of its finer map every fourth cell counts


@dataclass(frozen=True)
class NuscenesReader:
    """Reads scenes that are named within the dataset's folder, as `<dataset>/scene-0061`.

    Attributes:
        version: such as `v1.0-mini`.
        cameras: whose keyframes are read, in this order at each time.
        masks: a folder of `<camera>/<picture's name>.png`, black where masked; None for none.
    """

    version: str = "v1.0-trainval"
    cameras: tuple[str, ...] = CAMERAS
    masks: Path | None = None
    named_within = True  # see `import_captures`

    def __call__(self, path: Path) -> Capture:
        database = _database(str(path.parent), self.version)
        scene = next((s for s in database.scene if s["name"] == path.name), None)
        if scene is None:
            raise UserInputError(f"There is no scene {path.name} in {path.parent / self.version}: see its scene.json.")
        unknown = [name for name in self.cameras if name not in CAMERAS]
        if unknown or not self.cameras:
            raise UserInputError(
                f"{[*unknown, 'Nothing'][0]} is no camera of nuScenes: choose of {', '.join(CAMERAS)}."
            )
        where = f"{path.name} of {path.parent / self.version}"
        try:
            return self._read(path, database, scene)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise UserInputError(f"The tables of {where} are damaged ({error!r}): restore them.") from None

    def scene_names(self, folder: Path) -> list[str]:
        """All scenes of the dataset, in the order of its table."""
        return [scene["name"] for scene in _database(str(folder), self.version).scene]

    def _read(self, path: Path, database: Any, scene: dict[str, Any]) -> Capture:
        frames, token = [], scene["first_sample_token"]
        while token:
            sample = database.get("sample", token)
            for camera in self.cameras:
                frames.append(self._frame(path.parent, database, sample, camera))
            token = sample["next"]
        location = database.get("log", scene["log_token"])["location"]
        has_map = (path.parent / "maps" / "expansion" / f"{location}.json").is_file()
        ground = GroundMap(MAP_CLASSES, partial(_draw, str(path.parent), location)) if has_map else None
        notes = () if has_map else (f"There is no map expansion of {location} in {path.parent}: no semantic maps",)
        return Capture(path, frames, path.parent / self.version, notes=notes, ground=ground)

    def _frame(self, root: Path, database: Any, sample: dict[str, Any], camera: str) -> CapturedFrame:
        data = database.get("sample_data", sample["data"][camera])
        where = f"{data['filename']} of {root}"
        to_world = _to_world(database, data, where)
        sensor = database.get("calibrated_sensor", data["calibrated_sensor_token"])
        fx, fy, cx, cy = np.array(sensor["camera_intrinsic"], dtype=np.float64)[[0, 1, 0, 1], [0, 1, 2, 2]]
        lens = pinhole(
            (fx, fy, cx + PIXEL_CENTRE, cy + PIXEL_CENTRE), where, (float(data["width"]), float(data["height"]))
        )
        scan = database.get("sample_data", sample["data"][LIDAR])
        to_camera = np.linalg.inv(to_world) @ _to_world(database, scan, f"{scan['filename']} of {root}")
        points = partial(points_before, root / scan["filename"], 5, to_camera, fx, float(data["width"]))
        image = root / data["filename"]
        mask = None if self.masks is None else self.masks / camera / f"{image.stem}.png"
        pose = opengl_pose(to_world, where)
        return CapturedFrame(data["filename"], image, None, mask, pose, lens, points=points, camera=camera)


def _to_world(database: Any, data: dict[str, Any], where: str) -> Float[np.ndarray, "4 4"]:
    """From a sensor, at its own time, to the world, whose z points up."""
    transforms = []
    for table in ("ego_pose", "calibrated_sensor"):
        record = database.get(table, data[f"{table}_token"])
        rotation = rotation_of(np.array(record["rotation"], dtype=np.float64), f"{table} of {where}")
        translation = np.array(record["translation"], dtype=np.float64).reshape(3, 1)
        transforms.append(rigid(checked_pose(np.concatenate([rotation, translation], axis=1), f"{table} of {where}")))
    return transforms[0] @ transforms[1]


@lru_cache(maxsize=2)
def _database(root: str, version: str) -> Any:
    try:
        from nuscenes.nuscenes import NuScenes
    except ImportError as error:
        raise UserInputError(
            f"nuScenes' devkit cannot be imported ({error}): 'pip install nuscenes-devkit' brings it."
        ) from None
    if not (Path(root) / version).is_dir():
        raise UserInputError(
            f"There is no folder {version} in {root}: give nuScenes' own folder, and the --version that is in it."
        )
    try:
        return NuScenes(version=version, dataroot=root, verbose=False)
    except Exception as error:  # the devkit trusts its tables
        raise UserInputError(
            f"nuScenes' devkit cannot read {version} in {root} ({type(error).__name__}: {error}): restore what "
            "it lacks."
        ) from None


def _draw(root: str, location: str, corners: Float[np.ndarray, "2 2"], size: int) -> UInt8[np.ndarray, "size size"]:
    """Classes of `MAP_CLASSES` of a rectangle of the world, north up."""
    (x0, y0), (x1, y1) = corners.tolist()
    patch = ((x0 + x1) / 2, (y0 + y1) / 2, y1 - y0, x1 - x0)
    canvas = (size * _FINER, size * _FINER)
    try:
        layers = _map(root, location).get_map_mask(patch, 0.0, list(LAYERS), canvas)
    except UserInputError:
        raise
    except Exception as error:  # of shapely and OpenCV, for polygons that are none
        raise UserInputError(f"The map of {location} in {root} is damaged ({error}): restore it.") from None
    found = np.zeros(canvas, np.uint8)
    for value, layer in enumerate(layers, 1):
        found[layer > 0] = value
    return np.ascontiguousarray(found[::-1][_FINER // 2 :: _FINER, _FINER // 2 :: _FINER])  # its rows go north


@lru_cache(maxsize=4)
def _map(root: str, location: str) -> Any:
    from nuscenes.map_expansion.map_api import NuScenesMap

    try:
        return NuScenesMap(dataroot=root, map_name=location)
    except Exception as error:  # the devkit trusts its maps
        raise UserInputError(
            f"The map expansion of {location} in {root} cannot be read ({type(error).__name__}: {error}): restore "
            "it, or remove it."
        ) from None
