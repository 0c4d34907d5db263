"""Turns posed captures into a scene collection, whatever reader they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from nfldm_ns.collect.captures import Capture, CapturedFrame
from nfldm_ns.collect.monocular_depth import completed_depth
from nfldm_ns.collect.orientation import Up, upright
from nfldm_ns.collect.undistortion import undistort
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import DEPTH_UNIT_M, SPLITS, BevClass
from nfldm_ns.scenes.image_files import read_depth_file, read_mask_file, read_rgb
from nfldm_ns.scenes.views import Views, make_cameras
from nfldm_ns.scenes.writing import atomic_path, write_collection, write_scene

ReadCapture = Callable[[Path], Capture]
"""Of a capture's folder; or, if it has `named_within`, of a capture's name within the folder of a whole dataset."""
BEV_SIZE = 64
DEFAULT_AABB = ((-10.0, -10.0, -2.5), (10.0, 10.0, 4.0))
SIZE_STEP = 16  # widths and heights that are found are multiples of it, so that every preset's encoder divides them


@dataclass(frozen=True)
class ImportOptions:
    """How captures become scenes.

    Attributes:
        image_size: width and height of the result; images are cropped to its aspect and averaged down. A 0 is found
            (see `resolved_size`).
        num_source_views, num_target_views: per scene, evenly spaced over the capture's frames.
        metres_per_unit: scale of the poses.
        depth_unit_scale: metres per unit of the depth files (0.001 for millimetres); None follows the capture's
            `depth_unit_scale_factor`, and is 0.001 where it says nothing.
        up: the capture's axis that points up, or how it is found (see `nfldm_ns.collect.orientation`).
        fractions: share of the captures by held-out split, chosen by the seed.
        test_scenes: captures held out for testing, by folder name; takes the place of the fraction.
        monocular_depth: a depth model of transformers, by name or folder, that fills in between the points of frames
            with sparse depth; None leaves them sparse.
    """

    image_size: tuple[int, int] = (64, 64)
    num_source_views: int = 8
    num_target_views: int = 4
    metres_per_unit: float = 1.0
    depth_unit_scale: float | None = None
    up: Up = "z"
    aabb: tuple[tuple[float, ...], tuple[float, ...]] = DEFAULT_AABB
    near: float = 0.1
    far: float = 30.0
    test_fraction: float = 0.1
    val_fraction: float = 0.0
    test_scenes: tuple[str, ...] = ()
    seed: int = 0
    name: str = "imported captures"
    licence: str = "unknown"
    monocular_depth: str | None = None


def import_captures(
    root: Path,
    captures: Sequence[Path],
    options: ImportOptions,
    read: ReadCapture,
    made_by: dict[str, Any],
    on_scene: Callable[[Capture], None] = lambda capture: None,
) -> dict[str, list[str]]:
    """Writes a collection of one scene per capture, whole or not at all.

    Args:
        root: the new collection; must not exist or be empty.
        captures: folders of the format that `read` reads.
        read: a reader of `nfldm_ns.collect.formats`.
        made_by: command and options of the reader, for the record.
        on_scene: told of each capture once its scene is written.

    Returns:
        Scene ids by split.

    Raises:
        UserInputError: if a capture cannot be used.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserInputError(f"{root} is not empty: choose a new folder for the collection.")
    ids = scene_ids(captures)
    splits = split_captures(ids, options)
    places = {}
    classes: tuple[BevClass, ...] = ()
    with atomic_path(root) as temporary:
        for scene_id, folder in zip(ids, captures, strict=True):
            require_folder(folder, read)
            capture = read(folder)
            options = replace(options, image_size=resolved_size(capture, options.image_size))
            source, target, place = load_capture(capture, options)
            places[scene_id] = {"map": scene_id, **place}
            bev = bev_map(capture, np.array(place["origin"]), options)
            classes = classes or bev_classes([capture], options)
            write_scene(
                temporary / "scenes" / scene_id, source, target, bev, classes, extra={"place": places[scene_id]}
            )
            on_scene(capture)
        write_collection(
            temporary,
            name=options.name,
            licence=options.licence,
            aabb=options.aabb,
            near=options.near,
            far=options.far,
            image_size=options.image_size,
            splits=splits,
            places=places,
            bev_classes=classes,
            made_by={
                **made_by,
                "scenes": [path.name for path in captures],
                **asdict(options),
            },
        )
    return splits


def require_folder(folder: Path, read: ReadCapture) -> None:
    """Raises `UserInputError` where there is no folder that the reader could read this capture from."""
    if not (folder.parent if getattr(read, "named_within", False) else folder).is_dir():
        raise UserInputError(f"There is no capture folder {folder}: give the folders of captures.")


def resolved_size(capture: Capture, wanted: tuple[int, int]) -> tuple[int, int]:
    """Width and height where a 0 stands for what the capture's own aspect gives, and two for its own size.

    What is found is a multiple of `SIZE_STEP`; images are cropped to that aspect like to any other.

    Raises:
        UserInputError: for a negative size, or images that are too small to be divided.
    """
    width, height = wanted
    if min(wanted) < 0:
        raise UserInputError(f"The image size {width} x {height} is negative: give pixels, or 0 for what fits.")
    if width and height:
        return wanted
    frame = capture.frames[0]
    own_height, own_width = read_rgb(frame.image, "restore it or remove its frame").shape[:2]
    if not width and not height:
        found = own_width - own_width % SIZE_STEP, own_height - own_height % SIZE_STEP
    elif not width:
        found = _rounded(height * own_width / own_height), height
    else:
        found = width, _rounded(width * own_height / own_width)
    if min(found) < 1:
        raise UserInputError(
            f"{frame.image} is {own_width} x {own_height}, too small to keep its own size: set --image-size."
        )
    return found


def _rounded(pixels: float) -> int:
    return max(1, round(pixels / SIZE_STEP)) * SIZE_STEP


def scene_ids(captures: Sequence[Path]) -> list[str]:
    """Names of captures: of their folders, with their parents' where those are equal.

    Raises:
        UserInputError: if there is none, or two are still equal.
    """
    ids = [path.resolve().name for path in captures]
    if len(set(ids)) < len(ids):
        ids = [f"{path.resolve().parent.name}-{path.resolve().name}" for path in captures]
    if not ids or len(set(ids)) < len(ids):
        raise UserInputError("Give captures with different folder names, at least one: they become the scenes' names.")
    return ids


def split_captures(ids: Sequence[str], options: ImportOptions) -> dict[str, list[str]]:
    """Whole captures by split, those held out chosen by name or by the seed."""
    unknown = [name for name in options.test_scenes if name not in ids]
    if unknown:
        raise UserInputError(f"The test scene {unknown[0]} is not among the captures: give the name of its folder.")
    rest = [
        ids[i] for i in np.random.default_rng(options.seed).permutation(len(ids)) if ids[i] not in options.test_scenes
    ]
    held_out: dict[str, list[str]] = {"test": list(options.test_scenes), "val": []}
    for name, fraction in (("test", options.test_fraction), ("val", options.val_fraction)):
        if fraction > 0 and not held_out[name]:
            for _ in range(max(1, round(fraction * len(ids)))):
                if len(rest) > 1:
                    held_out[name].append(rest.pop())
    train = [i for i in ids if i in rest]
    return {name: train if name == "train" else sorted(held_out[name]) for name in SPLITS}


def bev_map(
    capture: Capture, origin: Float[np.ndarray, " 3"], options: ImportOptions
) -> UInt8[np.ndarray, "size size"] | None:
    """The semantic map of the box around a place, in metres of the world; None where `bev_classes` knows none."""
    if capture.ground is None or not bev_classes([capture], options):
        return None
    corners = origin[:2] + np.array(options.aabb)[:, :2]
    return capture.ground.draw(corners / (capture.units * options.metres_per_unit), BEV_SIZE)


def bev_classes(captures: Sequence[Capture], options: ImportOptions) -> tuple[BevClass, ...]:
    """Classes of the semantic maps of captures, which are of one format; none where there are no maps.

    Turned worlds have none: maps are of captures whose z points up.
    """
    grounds = [capture.ground for capture in captures if capture.ground is not None and options.up == "z"]
    return grounds[0].classes if grounds else ()


def load_capture(capture: Capture, options: ImportOptions) -> tuple[Views, Views, dict[str, Any]]:
    """Source views, target views and place of one capture, recentred on the mean of its source cameras.

    Raises:
        UserInputError: if files are missing, broken or contradictory, or there are too few frames.
    """
    sources, targets = _chosen_frames(capture, options)
    poses = world_poses(capture, options)
    origin = poses[sources][:, :, 3].mean(axis=0)
    poses[:, :, 3] -= origin
    with_depth = {capture.frames[i].has_depth for i in (*sources, *targets)}
    if len(with_depth) > 1:
        raise UserInputError(
            f"Some frames of {capture.folder} have a depth file and others have none: give all of them one, or none."
        )
    views = [load_views(capture, chosen, poses[chosen], options) for chosen in (sources, targets)]
    return views[0], views[1], {"origin": origin.tolist()}


def load_frames(capture: Capture, chosen: Sequence[int], options: ImportOptions) -> Views:
    """Some frames of a capture in its own place, in metres; depth where all of them have it.

    Raises:
        UserInputError: if files are missing, broken or contradictory.
    """
    poses = world_poses(capture, options)[list(chosen)]
    if not all(capture.frames[i].has_depth for i in chosen):
        capture = replace(capture, frames=[replace(frame, depth=None, points=None) for frame in capture.frames])
    return load_views(capture, chosen, poses, options)


def _chosen_frames(capture: Capture, options: ImportOptions) -> tuple[list[int], list[int]]:
    """Source and target frames: of the file's own splits where it names them, else of all frames."""
    held_out = capture.splits["test"] or capture.splits["val"]
    if not capture.splits["train"] or not held_out:
        return choose_views(len(capture.frames), options.num_source_views, options.num_target_views, capture.folder)
    shared = set(capture.splits["train"]) & set(held_out)
    if shared:
        raise UserInputError(
            f"{capture.file} lists {capture.frames[min(shared)].name} for training and for testing: drop one."
        )
    chosen = []
    wanted = (options.num_source_views, options.num_target_views)
    for split, frames, count in zip(("train", "test"), (capture.splits["train"], held_out), wanted, strict=True):
        if not 1 <= count <= len(frames):
            raise UserInputError(
                f"{capture.folder} has {len(frames)} frames in its {split}ing split, too few for {count} views: "
                "ask for fewer, at least one."
            )
        chosen.append([sorted(frames)[i] for i in _middles(len(frames), count)])
    return chosen[0], chosen[1]


def choose_views(num_frames: int, num_source: int, num_target: int, folder: Path) -> tuple[list[int], list[int]]:
    """Indices of source and target frames: both evenly spaced over the capture, none in common.

    Raises:
        UserInputError: if there are too few frames.
    """
    if num_frames < num_source + num_target or min(num_source, num_target) < 1:
        raise UserInputError(
            f"{folder} has {num_frames} frames, too few for {num_source} source and {num_target} target views: "
            "ask for fewer, at least one each."
        )
    sources = _middles(num_frames, num_source)
    rest = [i for i in range(num_frames) if i not in set(sources)]
    return sources, [rest[i] for i in _middles(len(rest), num_target)]


def _middles(length: int, count: int) -> list[int]:
    """Indices in the middles of `count` equal parts of a sequence."""
    return [int((i + 0.5) * length / count) for i in range(count)]


def world_poses(capture: Capture, options: ImportOptions) -> Float[np.ndarray, "frames 3 4"]:
    """Camera-to-world of all frames, z up, in metres as far as the options say how long those are.

    Raises:
        UserInputError: if up is to be found where the cameras do not tell it.
    """
    poses = np.stack([frame.pose for frame in capture.frames])
    poses = upright(poses, options.up, str(capture.folder)) @ poses
    poses[:, :, 3] *= capture.units * options.metres_per_unit
    return poses


@dataclass(frozen=True)
class LoadedFrame:
    """One frame at the wanted size, its lens undone.

    Attributes:
        depth: planar, in metres, 0 where unknown; None if the frame has none.
        mask: False for what is not of the scene.
        intrinsics: fx, fy, cx, cy in pixels.
    """

    image: UInt8[np.ndarray, "height width 3"]
    depth: Float[np.ndarray, "height width"] | None
    mask: Bool[np.ndarray, "height width"]
    intrinsics: Float[np.ndarray, " 4"]


def load_frame(capture: Capture, frame: CapturedFrame, options: ImportOptions) -> LoadedFrame:
    """Reads the files of one frame, undoes its lens, crops and averages down.

    Raises:
        UserInputError: if a file is missing, broken or contradicts another.
    """
    pixels = read_rgb(frame.image, "restore it or remove its frame")
    size = (pixels.shape[1], pixels.shape[0])
    lens = frame.lens.intrinsics(size, str(frame.image))
    depth = None if frame.depth is None else _read_depth(frame, size[::-1], lens, options)
    pixels, depth, mask, lens = undistort(
        pixels, depth, _read_mask(frame, size), lens, frame.lens.distortion, frame.lens.fisheye, str(frame.image)
    )
    box = _crop_box(size, options.image_size)
    image = np.asarray(Image.fromarray(pixels).resize(options.image_size, Image.Resampling.BOX, box=box))
    intrinsics = _fit_intrinsics(lens, box, options.image_size)
    if depth is not None:
        depth = _resize_depth(depth, box, size, options.image_size)
    elif frame.points is not None:
        scale = capture.units * options.metres_per_unit
        depth = _sparse_depth(frame.read_points() * scale, intrinsics, options.image_size)
        if options.monocular_depth is not None:
            left, top, right, bottom = (round(edge) for edge in box)
            crop = Image.fromarray(pixels).crop((left, top, right, bottom))
            depth = completed_depth(crop, depth, options.monocular_depth)
    return LoadedFrame(image, depth, _resize_mask(mask, box, options.image_size, frame), intrinsics)


def load_views(
    capture: Capture,
    chosen: Sequence[int],
    poses: Float[np.ndarray, "views 3 4"],
    options: ImportOptions,
    scale: float = 1.0,
) -> Views:
    """Views of chosen frames, all with depth or all without.

    Args:
        poses: of these frames, in the scene.
        scale: metres per metre of the options, where it was found later; of the depths, as poses have it already.

    Raises:
        UserInputError: if a file is missing, broken or contradicts another, or depths are of another unit.
    """
    frames = [load_frame(capture, capture.frames[i], options) for i in chosen]
    depths = [frame.depth * scale for frame in frames if frame.depth is not None]
    width, height = options.image_size
    fx, fy, cx, cy = torch.tensor(np.stack([f.intrinsics for f in frames]), dtype=torch.float32).unbind(-1)
    views = Views(
        make_cameras(torch.from_numpy(poses), fx, fy, cx, cy, height, width),
        torch.from_numpy(np.stack([frame.image for frame in frames])).permute(0, 3, 1, 2).float() / 255,
        torch.from_numpy(np.stack(depths)).float()[:, None] if depths else None,
        None
        if all(frame.mask.all() for frame in frames)
        else torch.from_numpy(np.stack([frame.mask for frame in frames]))[:, None],
    )
    if views.depths is not None and bool((views.depths > 0).any()):
        median = float(views.depths[views.depths > 0].median())
        check_depth_unit(capture.folder, median, options, sparse=capture.frames[chosen[0]].points is not None)
    return views


def _read_depth(
    frame: CapturedFrame, size: tuple[int, int], intrinsics: Float[np.ndarray, " 4"], options: ImportOptions
) -> Float[np.ndarray, "height width"]:
    """Depth in metres at the pixels of its image; files of another size are of the same view."""
    path, unit = frame.depth, frame.depth_unit
    assert path is not None
    depth = read_depth_file(path, eight_bits=frame.coarse_depth, size=frame.depth_size)
    if frame.depth_lens is not None:
        own = frame.depth_lens.intrinsics((depth.shape[1], depth.shape[0]), str(path))
        depth = _seen_by(depth, own, intrinsics, size)
    else:
        _check_aspect(path, depth, size, "depth")
        depth = _of_size(depth, size)
    if options.depth_unit_scale is not None:
        unit = options.depth_unit_scale
    else:
        unit = DEPTH_UNIT_M if unit is None else unit * options.metres_per_unit
    return depth * unit


def _seen_by(
    depth: Float[np.ndarray, "own_height own_width"],
    own: Float[np.ndarray, " 4"],
    intrinsics: Float[np.ndarray, " 4"],
    size: tuple[int, int],
) -> Float[np.ndarray, "height width"]:
    """The nearest values of one camera's depth at the pixels of another one in its place, unknown outside."""
    at = []
    for axis, (length, limit) in enumerate(zip(size[::-1], depth.shape[::-1], strict=True)):
        rays = (np.arange(length) + 0.5 - intrinsics[2 + axis]) / intrinsics[axis]
        at.append(np.floor(rays * own[axis] + own[2 + axis]).clip(-1, limit).astype(int) + 1)
    return np.pad(depth, 1)[np.ix_(at[1], at[0])]


def _sparse_depth(
    points: Float[np.ndarray, "points 3"], intrinsics: Float[np.ndarray, " 4"], wanted: tuple[int, int]
) -> Float[np.ndarray, "height width"]:
    """Depth of the pixels that points fall on, of the nearest one where there are several; all others unknown."""
    x, y, z = points[points[:, 2] > 0].T
    column, row = np.floor(intrinsics[0] * x / z + intrinsics[2]), np.floor(intrinsics[1] * y / z + intrinsics[3])
    inside = (column >= 0) & (column < wanted[0]) & (row >= 0) & (row < wanted[1])
    depth = np.full(wanted[::-1], np.inf)
    np.minimum.at(depth, (row[inside].astype(int), column[inside].astype(int)), z[inside])
    return np.where(np.isfinite(depth), depth, 0)


def _of_size(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The nearest values in a map of this (height, width)."""
    height, width = size
    return _resize_depth(values, (0, 0, width, height), (width, height), (width, height))


def _check_aspect(path: Path, values: np.ndarray, size: tuple[int, int], kind: str) -> None:
    (height, width), (own_height, own_width) = size, values.shape
    if abs(own_width * height - own_height * width) > max(own_width, own_height, width, height):
        raise UserInputError(
            f"{path} is {own_width} x {own_height}, another aspect than its image's {width} x {height}: is it turned "
            f"or cropped? Give {kind} of the same view."
        )


def _read_mask(frame: CapturedFrame, size: tuple[int, int]) -> Bool[np.ndarray, "height width"] | None:
    """Which pixels of an image of this (width, height) are of the scene; None if nothing masks any."""
    seen = frame.lens.seen(size)
    if frame.mask is None:
        return seen
    mask = read_mask_file(frame.mask)
    _check_aspect(frame.mask, mask, size[::-1], "a mask")
    mask = _of_size(mask, size[::-1])
    return mask if seen is None else mask & seen


def _resize_mask(
    mask: Bool[np.ndarray, "height width"] | None,
    box: tuple[float, float, float, float],
    wanted: tuple[int, int],
    frame: CapturedFrame,
) -> Bool[np.ndarray, "new_height new_width"]:
    """New pixels are valid only if all that is averaged into them is."""
    if mask is None:
        return np.ones(wanted[::-1], bool)
    masked = Image.fromarray((~mask).astype(np.float32))
    valid = np.asarray(masked.resize(wanted, Image.Resampling.BOX, box=box)) <= 0
    if not valid.any():
        raise UserInputError(
            f"Nothing of {frame.image} is left of its mask or fisheye_crop_radius: remove its frame, or mask less."
        )
    return valid


def check_depth_unit(folder: Path, median: float, options: ImportOptions, sparse: bool) -> None:
    """Raises `UserInputError` if the median of a capture's known depths (metres) shows that their unit is another."""
    if not options.near < median < options.far:
        remedy = "--metres-per-unit" if sparse else "--depth-unit-scale to metres per unit of its depth files"
        raise UserInputError(
            f"The depths of {folder} have a median of {median:.4g} m, not between {options.near:g} and "
            f"{options.far:g} m: set {remedy}."
        )


def _crop_box(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest centred box (left, top, right, bottom) of the wanted aspect."""
    scale = min(size[0] / wanted[0], size[1] / wanted[1])
    width, height = wanted[0] * scale, wanted[1] * scale
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return left, top, left + width, top + height


def _fit_intrinsics(intrinsics: np.ndarray, box: tuple[float, ...], wanted: tuple[int, int]) -> np.ndarray:
    """fx, fy, cx, cy in pixels of the cropped and resized image."""
    resize = np.array([wanted[0] / (box[2] - box[0]), wanted[1] / (box[3] - box[1])] * 2)
    return (intrinsics - np.array([0, 0, box[0], box[1]])) * resize


def _resize_depth(depth: np.ndarray, box: tuple[float, ...], size: tuple[int, int], wanted: tuple[int, int]):
    """Depth at the centres of the new pixels; averages would invent surfaces between near and far."""
    x = (box[0] + (np.arange(wanted[0]) + 0.5) / wanted[0] * (box[2] - box[0])) / size[0] * depth.shape[1]
    y = (box[1] + (np.arange(wanted[1]) + 0.5) / wanted[1] * (box[3] - box[1])) / size[1] * depth.shape[0]
    return depth[np.ix_(y.astype(int).clip(0, depth.shape[0] - 1), x.astype(int).clip(0, depth.shape[1] - 1))]
