"""Makes a scene collection of MiniWorld's houses: which house is for what, places in them, and what is kept."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8

from nfldm_ns.collect.level_cameras import level_poses, share_inside
from nfldm_ns.collect.resuming import claim_folder, numbered_splits
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import SPLITS, read_json
from nfldm_ns.scenes.views import Views, make_cameras
from nfldm_ns.scenes.writing import write_collection, write_scene

if TYPE_CHECKING:
    from nfldm_ns.collect.miniworld_houses import HouseRenderer

LICENCE = "rendered from MiniWorld, Apache-2.0, https://miniworld.farama.org"
NUM_SOURCE_VIEWS = 8
_HOUSES_FILE = "houses.txt"
_CLEARANCE = 0.5  # metres between a camera and all things
_SOURCE_JITTER = 0.3
_TARGET_NEAREST = 0.4
_YAW_JITTER = 4.0
_ATTEMPTS = 40  # spots of each house that are tried
_LARGEST_DROUGHT = 10  # houses without a place, after which the filters are to blame


@dataclass(frozen=True)
class MiniworldOptions:
    """All that decides what a collection holds; lengths in metres.

    Attributes:
        fractions: share of the houses by held-out split.
        places: scenes of each house, at most.
        target_distance: greatest distance of a target view from its place.
        min_distance: least distance between two places of one house.
        min_depth: least median depth of a place's views; `min_view_depth` of each view.
        min_inside: least share of pixels whose surface lies inside the box.
    """

    num_scenes: int
    seed: int = 0
    image_size: int = 64
    fractions: Mapping[str, float] = field(default_factory=lambda: {"test": 0.1, "val": 0.0})
    places: int = 4
    aabb: tuple[tuple[float, ...], tuple[float, ...]] = ((-6.0, -6.0, -1.8), (6.0, 6.0, 1.4))
    near: float = 0.1
    far: float = 30.0
    num_target_views: int = 4
    target_distance: float = 1.5
    min_distance: float = 1.5
    min_depth: float = 1.5
    min_view_depth: float = 0.6
    min_inside: float = 0.6
    bev_size: int = 64


@dataclass(frozen=True)
class MiniworldReport:
    """Scenes per split, frames that were drawn, and the seconds that took."""

    num_scenes: dict[str, int]
    new_frames: int
    seconds: float


@dataclass(frozen=True)
class _Place:
    """`[V, 3]` eyes and `[V]` angles in degrees, source views first, ordered by yaw."""

    eyes: Float[np.ndarray, "views 3"]
    angles: Float[np.ndarray, " views"]


def collect_miniworld(
    root: Path, options: MiniworldOptions, on_progress: Callable[[int], None] = lambda done: None
) -> MiniworldReport:
    """Makes a collection, or completes one that was interrupted; more scenes may be asked for later.

    Args:
        on_progress: called with the number of scenes done so far.

    Raises:
        UserInputError: if the options cannot be met, the folder holds something else, or MiniWorld cannot draw.
    """
    begun = time.monotonic()
    _check(options)
    renderer = open_renderer(options.image_size)
    claim_folder(root, {key: value for key, value in asdict(options).items() if key != "num_scenes"})
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    drawn = found = drought = 0
    finished = _finished(root)
    for house, split in numbered_splits(options.fractions):
        if found >= options.num_scenes:
            break
        if house not in finished:
            made, count = _make_house(root, renderer, house, options, options.num_scenes - found)
            drawn += made
            if count < options.num_scenes - found or count == options.places:  # else it may have more
                _finish(root, house, count)
        else:
            count = min(finished[house], options.num_scenes - found)
        drought = 0 if count else drought + 1
        if drought >= _LARGEST_DROUGHT:
            raise UserInputError(
                f"No place of {drought} houses passed the filters: lower --min-depth, --min-view-depth or --min-inside."
            )
        splits[split] += [scene_id(house, k) for k in range(count)]
        found += count
        on_progress(found)
    _require_splits(splits, options)
    _remove_others(root, {i for ids in splits.values() for i in ids}, finished)
    _describe(root, options, splits)
    counts = {name: len(ids) for name, ids in splits.items()}
    return MiniworldReport(counts, drawn, time.monotonic() - begun)


def open_renderer(image_size: int) -> HouseRenderer:
    """MiniWorld's renderer, without a display.

    Raises:
        UserInputError: if the package or OpenGL is missing, with what to install.
    """
    try:
        from nfldm_ns.collect.miniworld_houses import HouseOptions, HouseRenderer
    except ModuleNotFoundError as error:
        if error.name not in ("miniworld", "pyglet"):
            raise
        raise UserInputError(f"The package {error.name} is not installed: 'pip install miniworld' brings it.") from None
    except ImportError as error:
        raise _cannot_draw(error) from None
    try:
        return HouseRenderer(image_size, HouseOptions())
    except Exception as error:  # pyglet raises many kinds where there is no OpenGL
        raise _cannot_draw(error) from None


def _cannot_draw(error: Exception) -> UserInputError:
    return UserInputError(
        f"MiniWorld cannot draw here ({type(error).__name__}: {error}): it needs OpenGL through EGL (on Debian and "
        "Ubuntu: sudo apt install libegl1 libgl1 libglu1-mesa libgl1-mesa-dri libfontconfig1)."
    )


def scene_id(house: int, place: int) -> str:
    """Names a scene after its house and its number among the house's places."""
    return f"house{house:05d}-{place:02d}"


def _check(options: MiniworldOptions) -> None:
    if options.num_scenes < 2 or options.places < 1:
        raise UserInputError(f"{options.num_scenes} scenes cannot be collected: ask for at least 2, and 1 per house.")
    if min(options.fractions.values()) < 0 or sum(options.fractions.values()) >= 1:
        raise UserInputError("The fractions of held-out houses must not be negative and must add up to less than one.")
    if options.image_size < 8 or options.num_target_views < 1:
        raise UserInputError("Images need at least 8 pixels a side, and scenes at least 1 target view.")


def _require_splits(splits: dict[str, list[str]], options: MiniworldOptions) -> None:
    lacking = [n for n, fraction in {"train": 1.0, **options.fractions}.items() if fraction > 0 and not splits[n]]
    if lacking:
        raise UserInputError(
            f"{options.num_scenes} scenes of {options.places} a house leave none for {lacking[0]}: ask for more "
            "scenes, or fewer of each house."
        )


def _finished(root: Path) -> dict[int, int]:
    """Scenes of each house that was looked through, as far as they are all there."""
    path = root / _HOUSES_FILE
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    counts = {int(words[0]): int(words[1]) for words in lines if len(words) == 2}
    return {
        house: count
        for house, count in counts.items()
        if all((root / "scenes" / scene_id(house, k) / "transforms.json").exists() for k in range(count))
    }


def _finish(root: Path, house: int, count: int) -> None:
    with (root / _HOUSES_FILE).open("a") as file:
        file.write(f"{house} {count}\n")


def _remove_others(root: Path, kept: set[str], finished: dict[int, int]) -> None:
    """Scenes that were made for a larger number stay only where their house is known to be complete."""
    known = {scene_id(house, k) for house, count in {**finished, **_finished(root)}.items() for k in range(count)}
    for path in (root / "scenes").iterdir():
        if path.is_dir() and path.name not in kept and path.name not in known:
            shutil.rmtree(path)


def _make_house(
    root: Path, renderer: HouseRenderer, house: int, options: MiniworldOptions, wanted: int
) -> tuple[int, int]:
    """Writes the scenes of one house; returns how many frames were drawn, and how many scenes there are."""
    seed = [options.seed, house]
    renderer.open(int(np.random.default_rng(seed).integers(2**31)))
    rng = np.random.default_rng([*seed, 1])
    count = drawn = 0
    taken: list[Float[np.ndarray, " 2"]] = []
    for _ in range(_ATTEMPTS):
        if count == min(options.places, wanted):
            break
        place = _plan(renderer, rng, options, taken)
        if place is None:
            continue
        frames = [renderer.render(eye, angle) for eye, angle in zip(place.eyes, place.angles, strict=True)]
        drawn += len(frames)
        images, depths = (np.stack(values) for values in zip(*frames, strict=True))
        if _is_open(place, depths, options):
            _write(root / "scenes" / scene_id(house, count), renderer, house, place, images, depths, options)
            taken.append(place.eyes[0, :2])
            count += 1
    return drawn, count


def _plan(
    renderer: HouseRenderer,
    rng: np.random.Generator,
    options: MiniworldOptions,
    taken: list[Float[np.ndarray, " 2"]],
) -> _Place | None:
    """Cameras around a random spot, all in its room, which is convex; None if they do not fit."""
    from nfldm_ns.collect.miniworld_houses import EYE_HEIGHT, inside

    rooms = renderer.rooms
    areas = (rooms[:, 2] - rooms[:, 0]) * (rooms[:, 3] - rooms[:, 1])
    room = rooms[rng.choice(len(rooms), p=areas / areas.sum())]
    spot = rng.uniform(room[:2], room[2:])
    if any(np.linalg.norm(spot - other) < options.min_distance for other in taken):
        return None

    def stations(nearest: float, farthest: float, count: int) -> Float[np.ndarray, "count 2"] | None:
        distance = farthest * rng.uniform((nearest / farthest) ** 2, 1, 6 * count) ** 0.5
        angle = rng.uniform(0, 2 * np.pi, 6 * count)
        points = spot + distance[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        points = points[inside(room, points) & (renderer.clearance(points) > _CLEARANCE)]
        return points[:count] if len(points) >= count else None

    near = stations(0, _SOURCE_JITTER, NUM_SOURCE_VIEWS)
    away = stations(
        min(_TARGET_NEAREST, options.target_distance / 2), options.target_distance, options.num_target_views
    )
    turn = rng.uniform(0, 360 / NUM_SOURCE_VIEWS) + 360 / NUM_SOURCE_VIEWS * np.arange(NUM_SOURCE_VIEWS)
    turn = turn + rng.uniform(-_YAW_JITTER, _YAW_JITTER, NUM_SOURCE_VIEWS)
    target_turn = rng.uniform(0, 360, options.num_target_views)
    if near is None or away is None:
        return None
    points = np.concatenate([near, away])
    eyes = np.concatenate([points, np.full((len(points), 1), EYE_HEIGHT)], axis=1)
    return _Place(eyes, np.concatenate([turn, target_turn]) % 360)


def _poses(place: _Place) -> Float[np.ndarray, "views 3 4"]:
    return level_poses(place.eyes - place.eyes[:NUM_SOURCE_VIEWS].mean(axis=0), place.angles)


def _is_open(place: _Place, depths: Float[np.ndarray, "views size size"], options: MiniworldOptions) -> bool:
    if np.median(depths, axis=(1, 2)).min() < options.min_view_depth or np.median(depths) < options.min_depth:
        return False
    return share_inside(depths, _poses(place), np.array(options.aabb)) >= options.min_inside


def _write(
    folder: Path,
    renderer: HouseRenderer,
    house: int,
    place: _Place,
    images: UInt8[np.ndarray, "views size size 3"],
    depths: Float[np.ndarray, "views size size"],
    options: MiniworldOptions,
) -> None:
    from nfldm_ns.collect.miniworld_houses import BEV_CLASSES

    half = options.image_size / 2
    known = np.where((depths >= options.near) & (depths <= options.far), depths, 0)
    views = Views(
        make_cameras(torch.from_numpy(_poses(place)), half, half, half, half, options.image_size, options.image_size),
        torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255,
        torch.from_numpy(known).float()[:, None],
    )
    centre = place.eyes[:NUM_SOURCE_VIEWS].mean(axis=0)
    bev = renderer.bev(centre[:2], np.array(options.aabb)[:, :2], options.bev_size)
    where: dict[str, Any] = {"map": f"house{house:05d}", "origin": centre.tolist()}
    source, target = views[:NUM_SOURCE_VIEWS], views[NUM_SOURCE_VIEWS:]
    write_scene(folder, source, target, bev, BEV_CLASSES, {"place": where})


def _describe(root: Path, options: MiniworldOptions, splits: dict[str, list[str]]) -> None:
    from nfldm_ns.collect.miniworld_houses import BEV_CLASSES

    ids = [scene for name in SPLITS for scene in splits[name]]
    write_collection(
        root,
        name="MiniWorld houses",
        licence=LICENCE,
        aabb=options.aabb,
        near=options.near,
        far=options.far,
        image_size=(options.image_size, options.image_size),
        splits=splits,
        places={i: read_json(root / "scenes" / i / "transforms.json")["place"] for i in ids},
        bev_classes=BEV_CLASSES,
        made_by={"command": "nfldm-collect miniworld", "miniworld": version("miniworld"), **asdict(options)},
    )
