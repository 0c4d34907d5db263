"""Makes a scene collection from Freedoom's maps, rendered by VizDoom."""

from __future__ import annotations

import fnmatch
import multiprocessing
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import vizdoom

from nfldm_ns.collect.doom_geometry import BEV_CLASSES, UNITS_PER_METRE, DoomGeometry
from nfldm_ns.collect.doom_places import (
    NUM_SOURCE_VIEWS,
    Region,
    Rig,
    RigOptions,
    can_stand,
    candidate_spots,
    hold_out_regions,
    in_split,
    plan_rig,
)
from nfldm_ns.collect.doom_renderer import HALF_FOV_TANGENT, DoomRenderer, Frame
from nfldm_ns.collect.doom_wad import DoomMap, Wad
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import SPLITS, read_json
from nfldm_ns.scenes.views import Views, make_cameras
from nfldm_ns.scenes.writing import write_collection, write_json, write_scene

LICENCE = "Freedoom (BSD-3-Clause), https://freedoom.github.io"
WAD_NAMES = ("freedoom1", "freedoom2")
_CANDIDATES_PER_STREAM = 20000
_JOURNAL = "collecting.json"


@dataclass(frozen=True)
class PlaceFilter:
    """Which places are worth a scene; a place is dropped as soon as it fails one of these."""

    min_brightness: float = 0.12
    """Least mean brightness of all views, in [0, 1]."""
    min_view_brightness: float = 0.04
    """Least mean brightness of each view."""
    min_depth: float = 2.0
    """Least median depth over all views, in metres."""
    min_view_depth: float = 0.7
    """Least median depth of each view, in metres: less means it faces a wall."""
    min_inside: float = 0.6
    """Least share of pixels whose surface lies inside the box."""


@dataclass(frozen=True)
class SceneOptions:
    """All that decides what one scene looks like."""

    seed: int = 0
    image_size: int = 64
    """Width and height of the images in pixels."""
    aabb: tuple[tuple[float, float, float], tuple[float, float, float]] = ((-10, -10, -2.5), (10, 10, 4))
    """The box around each place, in metres: minimum and maximum corner (x, y, z)."""
    near: float = 0.1
    far: float = 30.0
    """Surfaces farther than this, and the sky, have unknown depth."""
    bev_size: int = 64
    """Cells per side of the bird's-eye-view maps."""
    min_distance: float = 1.5
    """Least distance between two places of one map, in metres."""
    min_light: int = 0
    """Raises darker sectors to this light level (0-255)."""
    keep_sprites: bool = False
    """Keeps items and decorations. They always turn towards the camera, so they are no part of a static scene."""
    rig: RigOptions = field(default_factory=RigOptions)
    accept: PlaceFilter = field(default_factory=PlaceFilter)


@dataclass(frozen=True)
class Stream:
    """An endless, deterministic supply of scenes: one split's places of one map."""

    map: str
    split: str
    regions: tuple[tuple[str, Region], ...] = ()
    gap: float = 0.0

    @property
    def seed(self) -> int:
        return zlib.crc32(f"{self.map}/{self.split}".encode())

    def scene_id(self, candidate: int) -> str:
        return f"{self.map.replace('/', '-').lower()}-{candidate:05d}"


def wad_path(name: str) -> Path:
    """Where the vizdoom package keeps a Freedoom WAD."""
    return Path(vizdoom.__file__).parent / f"{name}.wad"


def all_maps() -> list[str]:
    """Names of all maps, such as `freedoom1/E1M1`."""
    return [f"{name}/{level}" for name in WAD_NAMES for level in Wad(wad_path(name)).map_names]


def choose_maps(patterns: Sequence[str], known: Sequence[str]) -> list[str]:
    """Maps that match any of the names or globs, in the order of `known`.

    Raises:
        UserInputError: if a pattern matches none.
    """
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise UserInputError(
                f"No map matches {pattern!r}: give names such as freedoom1/E1M1 or globs such as 'freedoom2/MAP0*'."
            )
    return [name for name in known if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


class SceneMaker:
    """Makes the scenes of one map; the renderer must be open on a WAD that has it."""

    def __init__(self, name: str, doom_map: DoomMap, renderer: DoomRenderer, options: SceneOptions) -> None:
        self.name, self.options = name, options
        self._map, self._renderer = doom_map, renderer
        self._geometry = DoomGeometry(doom_map)
        self._aabb = np.array(options.aabb)

    def scenes(self, root: Path, stream: Stream) -> Iterator[str]:
        """Writes scene after scene and yields their ids; scenes already on disk are not made again."""
        spots = candidate_spots(self._map, self._geometry, stream.seed + self.options.seed, _CANDIDATES_PER_STREAM)
        usable = in_split(spots, stream.split, dict(stream.regions), stream.gap)
        taken = np.zeros((0, 2))
        for i, spot in enumerate(spots):
            if not usable[i]:
                continue
            if len(taken) and np.hypot(*(taken - spot).T).min() < self.options.min_distance * UNITS_PER_METRE:
                continue
            folder = root / "scenes" / stream.scene_id(i)
            if not (folder / "transforms.json").exists() and not self._make(folder, spot, stream.seed + i):
                continue
            taken = np.concatenate([taken, spot[None]])
            yield folder.name

    def _make(self, folder: Path, spot: np.ndarray, seed: int) -> bool:
        seed = (seed + self.options.seed) % 2**31
        rig = plan_rig(self._geometry, spot, seed, self.options.rig)
        if rig is None or not self._looks_promising(rig):
            return False
        frames = self._render(rig, seed)
        if frames is None:
            return False
        depths = np.stack([self._refine(frame) for frame in frames]) / UNITS_PER_METRE
        images = np.stack([frame.image for frame in frames])
        if not self._accepts(images, depths, frames):
            return False
        self._write(folder, frames, images, depths)
        return True

    def _render(self, rig: Rig, seed: int) -> list[Frame] | None:
        self._renderer.start(self.name.split("/")[1], seed)
        frames = []
        for eye, angle in zip(rig.eyes, rig.angles, strict=True):
            frame = self._renderer.render(eye[0], eye[1], angle)
            if frame is None or abs(frame.eye[2] - eye[2]) > 1:
                return None
            if frame.image.mean() / 255 < self.options.accept.min_view_brightness:
                return None
            frames.append(frame)
        return frames

    def _cast(self, eye: np.ndarray, angle: float, size: int) -> np.ndarray:
        far = 1.5 * self.options.far * UNITS_PER_METRE
        return self._geometry.cast(eye, angle, size, size, HALF_FOV_TANGENT, far)

    def _refine(self, frame: Frame) -> np.ndarray:
        """Exact depth where the map's geometry agrees with the coarse buffer, the buffer's elsewhere; map units."""
        exact = self._cast(frame.eye, frame.angle, self.options.image_size)
        with np.errstate(invalid="ignore"):
            agree = np.abs(exact - frame.depth) < 6 + 0.02 * frame.depth
        return np.where(agree, exact, frame.depth)

    def _looks_promising(self, rig: Rig) -> bool:
        """Judges the place by coarse ray casts, which cost far less than renders."""
        size = 16
        depths = [self._cast(eye, angle, size) for eye, angle in zip(rig.eyes, rig.angles, strict=True)]
        return self._is_open(np.stack(depths) / UNITS_PER_METRE, rig.eyes, rig.angles)

    def _is_open(self, depths: np.ndarray, eyes: np.ndarray, angles: np.ndarray) -> bool:
        accept = self.options.accept
        if np.median(depths, axis=(1, 2)).min() < accept.min_view_depth or np.median(depths) < accept.min_depth:
            return False
        eyes = (eyes - eyes[:NUM_SOURCE_VIEWS].mean(axis=0)) / UNITS_PER_METRE
        return _share_inside(depths, eyes, angles, self._aabb) >= accept.min_inside

    def _accepts(self, images: np.ndarray, depths: np.ndarray, frames: list[Frame]) -> bool:
        eyes = np.stack([frame.eye for frame in frames])
        angles = np.array([frame.angle for frame in frames])
        return images.mean() / 255 >= self.options.accept.min_brightness and self._is_open(depths, eyes, angles)

    def _write(self, folder: Path, frames: list[Frame], images: np.ndarray, depths: np.ndarray) -> None:
        options = self.options
        eyes = np.stack([frame.eye for frame in frames])
        centre = eyes[:NUM_SOURCE_VIEWS].mean(axis=0)
        bev = self._geometry.bev(centre, self._aabb[:, :2] * UNITS_PER_METRE, options.bev_size)
        poses = camera_to_worlds((eyes - centre) / UNITS_PER_METRE, np.array([frame.angle for frame in frames]))
        depths = np.where((depths >= options.near) & (depths <= options.far), depths, 0)
        focal, middle = options.image_size / 2 / HALF_FOV_TANGENT, options.image_size / 2
        views = Views(
            make_cameras(torch.from_numpy(poses), focal, focal, middle, middle, options.image_size, options.image_size),
            torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255,
            torch.from_numpy(depths).float()[:, None],
        )
        place = {"map": self.name, "origin": (centre / UNITS_PER_METRE).tolist()}
        source, target = slice(None, NUM_SOURCE_VIEWS), slice(NUM_SOURCE_VIEWS, None)
        write_scene(folder, views[source], views[target], bev, BEV_CLASSES, {"place": place})


def camera_to_worlds(eyes: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """OpenGL camera-to-world `[V, 3, 4]` of level cameras at `eyes` looking along `angles` (degrees)."""
    turn = np.radians(angles)
    zero, one = np.zeros_like(turn), np.ones_like(turn)
    right = np.stack([np.sin(turn), -np.cos(turn), zero], axis=-1)
    up = np.stack([zero, zero, one], axis=-1)
    back = -np.stack([np.cos(turn), np.sin(turn), zero], axis=-1)
    return np.stack([right, up, back, eyes], axis=-1)


def _share_inside(depths: np.ndarray, eyes: np.ndarray, angles: np.ndarray, aabb: np.ndarray) -> float:
    """Share of pixels `[V, S, S]` whose surface lies inside the box; sky counts as outside."""
    size = depths.shape[-1]
    across = ((np.arange(size) + 0.5) / size * 2 - 1) * HALF_FOV_TANGENT
    local = np.stack(np.broadcast_arrays(across, -across[:, None], -1.0), axis=-1)
    directions = np.einsum("vij,hwj->vhwi", camera_to_worlds(eyes, angles)[:, :, :3], local)
    with np.errstate(invalid="ignore"):
        points = eyes[:, None, None] + depths[..., None] * directions
        return float(((points > aabb[0]) & (points < aabb[1])).all(axis=-1).mean())


_worker_queue: Any = None


def _init_worker(queue: Any) -> None:
    global _worker_queue
    _worker_queue = queue
    torch.set_num_threads(1)


def _run_stream(root: Path, stream: Stream, quota: int, options: SceneOptions) -> list[str]:
    """The first `quota` scenes of a stream, or fewer if it runs dry."""
    wad_name, level = stream.map.split("/")
    wad = Wad(wad_path(wad_name))
    made: list[str] = []
    with DoomRenderer(
        wad, [level], options.image_size, keep_sprites=options.keep_sprites, min_light=options.min_light
    ) as renderer:
        maker = SceneMaker(stream.map, wad.read_map(level), renderer, options)
        for scene_id in maker.scenes(root, stream):
            made.append(scene_id)
            _worker_queue.put(scene_id)
            if len(made) >= quota:
                break
    return made


def share_out(total: int, capacities: Sequence[float]) -> list[int]:
    """Splits a total as evenly as the capacities allow, earlier ones first."""
    quotas = [0] * len(capacities)
    while sum(quotas) < total:
        free = [i for i, capacity in enumerate(capacities) if quotas[i] < capacity]
        if not free:
            break
        each, rest = divmod(total - sum(quotas), len(free))
        for position, i in enumerate(free):
            quotas[i] = int(min(capacities[i], quotas[i] + each + (position < rest)))
    return quotas


def split_maps(maps: Sequence[str], test_maps: Sequence[str], fractions: dict[str, float], seed: int) -> dict[str, str]:
    """Which split each map belongs to when whole maps are held out."""
    order = [maps[i] for i in np.random.default_rng(seed).permutation(len(maps)) if maps[i] not in test_maps]
    split = {name: "test" for name in test_maps}
    for name, fraction in fractions.items():
        if name == "test" and test_maps:
            continue
        for _ in range(max(1, round(fraction * len(maps))) if fraction > 0 else 0):
            if len(order) > 1:
                split[order.pop()] = name
    return {name: split.get(name, "train") for name in maps}


def split_places(name: str, fractions: dict[str, float], options: SceneOptions) -> list[Stream]:
    """Streams of one map when places are held out: those of two splits are further apart than the box."""
    wad_name, level = name.split("/")
    doom_map = Wad(wad_path(wad_name)).read_map(level)
    geometry = DoomGeometry(doom_map)
    spots = candidate_spots(doom_map, geometry, options.seed, 2000)
    spots = spots[can_stand(geometry, spots)]
    extent = max(options.aabb[1][axis] - options.aabb[0][axis] for axis in (0, 1))
    gap = (extent + 2 * options.rig.source_jitter) * UNITS_PER_METRE
    regions = hold_out_regions(spots, fractions, gap)
    return [Stream(name, split, tuple(regions.items()), gap) for split in ("train", *regions)]


@dataclass(frozen=True)
class Report:
    """What a collection run did."""

    num_scenes: dict[str, int]
    new_frames: int
    seconds: float
    workers: int

    @property
    def frames_per_second_per_worker(self) -> float:
        return self.new_frames / max(self.seconds, 1e-9) / self.workers


def collect(
    root: Path,
    num_scenes: int,
    maps: Sequence[str],
    test_maps: Sequence[str],
    fractions: dict[str, float],
    options: SceneOptions,
    workers: int,
    hold_out: Literal["maps", "places"] = "maps",
    on_scene: Callable[[str], None] = lambda scene_id: None,
) -> Report:
    """Makes or completes a collection."""
    begun = time.monotonic()
    _check_journal(root, {"maps": list(maps), "test_maps": list(test_maps), "fractions": fractions, "hold_out": hold_out, **asdict(options)})
    if hold_out == "places":
        streams = [stream for name in maps for stream in split_places(name, fractions, options)]
    else:
        split_of = split_maps(maps, test_maps, fractions, options.seed)
        streams = [Stream(name, split_of[name]) for name in maps]
    held_out = {stream.split for stream in streams}
    totals = {name: round(num_scenes * fractions.get(name, 0)) if name in held_out else 0 for name in SPLITS}
    totals["train"] = num_scenes - totals["val"] - totals["test"]
    existing = {path.parent.name for path in root.glob("scenes/*/transforms.json")}

    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        queue = manager.Queue()
        with ProcessPoolExecutor(workers, context, _init_worker, (queue,)) as pool:
            made = _fill(pool, queue, root, streams, totals, options, on_scene)
    splits = {
        name: [i for stream in streams if stream.split == name for i in made[stream]] for name in SPLITS
    }
    places = {
        scene_id: read_json(root / "scenes" / scene_id / "transforms.json")["place"]
        for name in SPLITS
        for scene_id in splits[name]
    }
    write_collection(
        root,
        name="VizDoom places",
        licence=LICENCE,
        aabb=options.aabb,
        near=options.near,
        far=options.far,
        image_size=(options.image_size, options.image_size),
        splits=splits,
        places=places,
        bev_classes=BEV_CLASSES,
        made_by={"command": "nfldm-collect vizdoom", "maps": list(maps), **asdict(options)},
    )
    new = set(places) - existing
    frames = len(new) * (NUM_SOURCE_VIEWS + options.rig.num_target_views)
    return Report({n: len(ids) for n, ids in splits.items()}, frames, time.monotonic() - begun, workers)


def _fill(pool, queue, root, streams, totals, options, on_scene) -> dict[Stream, list[str]]:
    """Runs all streams; what a dry one leaves is shared out again among the others of its split."""
    made: dict[Stream, list[str]] = {stream: [] for stream in streams}
    capacity = {stream: float("inf") for stream in streams}
    seen: set[str] = set()
    while True:
        quotas: dict[Stream, int] = {}
        for split in SPLITS:
            members = [stream for stream in streams if stream.split == split]
            shares = share_out(totals[split], [capacity[s] for s in members])
            quotas.update(zip(members, shares, strict=True))
        jobs = {s: pool.submit(_run_stream, root, s, q, options) for s, q in quotas.items() if q > len(made[s])}
        if not jobs:
            return made
        while not all(job.done() for job in jobs.values()) or not queue.empty():
            try:
                scene_id = queue.get(timeout=0.2)
            except Exception:
                continue
            if scene_id not in seen:
                seen.add(scene_id)
                on_scene(scene_id)
        for stream, job in jobs.items():
            made[stream] = job.result()
            if len(made[stream]) < quotas[stream]:
                capacity[stream] = len(made[stream])


def _check_journal(root: Path, options: dict[str, Any]) -> None:
    """Makes sure that scenes of two different runs are never mixed in one folder."""
    path = root / _JOURNAL
    options = __import__("json").loads(__import__("json").dumps(options))
    if path.exists():
        begun = read_json(path)
        changed = [key for key in options if begun.get(key) != options[key]]
        if changed:
            raise UserInputError(
                f"{root} was begun with another {changed[0]} ({begun.get(changed[0])}): use the same options or another folder."
            )
    elif (root / "collection.json").exists() or (root / "scenes").exists():
        raise UserInputError(f"{root} already holds another collection: choose another folder.")
    else:
        root.mkdir(parents=True, exist_ok=True)
        write_json(path, options)
