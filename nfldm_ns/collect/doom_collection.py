"""Makes a scene collection from Freedoom's maps, rendered by VizDoom: splits, quotas and workers.

Every candidate place can be judged alone, so which scenes a collection holds depends on the options only, never on the
number of workers or on interruptions.
"""

from __future__ import annotations

import fnmatch
import multiprocessing
import multiprocessing.util
import shutil
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import vizdoom
from jaxtyping import Float, Int

from nfldm_ns.collect.doom_geometry import BEV_CLASSES, UNITS_PER_METRE, DoomGeometry
from nfldm_ns.collect.doom_mazes import MAZES, MazeWad, maze_names
from nfldm_ns.collect.doom_places import NUM_SOURCE_VIEWS, can_stand, candidate_spots, hold_out_regions, in_split
from nfldm_ns.collect.doom_renderer import DoomRenderer
from nfldm_ns.collect.doom_scenes import SceneMaker, SceneOptions
from nfldm_ns.collect.doom_wad import DoomMap, Wad
from nfldm_ns.collect.resuming import claim_folder
from nfldm_ns.collect.workers import leave_interrupts_to_parent
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import SPLITS, read_json
from nfldm_ns.scenes.writing import write_collection

LICENCE = "rendered from Freedoom, BSD-3-Clause, https://freedoom.github.io"
WAD_NAMES = ("freedoom1", "freedoom2")
_MAZE_GAME = "freedoom2"
_REJECTED_FILE = "rejected.txt"
_CHUNK = 6
_REGION_SAMPLE = 1500


@dataclass(frozen=True)
class CollectionOptions:
    """All that decides what a collection holds.

    Attributes:
        maps: names such as `freedoom1/E1M1`.
        test_maps: those of them that are held out; chosen by the seed if there are none and `hold_out` is "maps".
        fractions: share of the scenes by name of the held-out split ("test", "val").
        hold_out: whole maps, or places of every map that are further than the box from all others.
    """

    num_scenes: int
    maps: tuple[str, ...]
    test_maps: tuple[str, ...] = ()
    fractions: Mapping[str, float] = field(default_factory=lambda: {"test": 0.1})
    hold_out: Literal["maps", "places"] = "maps"
    scenes: SceneOptions = field(default_factory=SceneOptions)


@dataclass(frozen=True)
class Report:
    """What a run did: scenes per split, frames of newly written scenes, and how long it took."""

    num_scenes: dict[str, int]
    new_frames: int
    seconds: float
    workers: int

    @property
    def frames_per_second_per_worker(self) -> float:
        return self.new_frames / max(self.seconds, 1e-9) / self.workers


def wad_path(name: str) -> Path:
    """Where the vizdoom package keeps one of `WAD_NAMES`."""
    return Path(vizdoom.__file__).parent / f"{name}.wad"


def known_maps(patterns: Sequence[str]) -> list[str]:
    """Names of Freedoom's maps (`freedoom1/E1M1`) and, if a pattern is about them, of mazes (`mazes/MAZE0000`)."""
    known = [f"{name}/{level}" for name in WAD_NAMES for level in Wad(wad_path(name)).map_names]
    if any(pattern.startswith(f"{MAZES}/") for pattern in patterns):
        known += [f"{MAZES}/{name}" for name in maze_names()]
    return known


def choose_maps(patterns: Sequence[str], known: Sequence[str]) -> list[str]:
    """Maps that match any of the names or globs, in the order of `known`.

    Raises:
        UserInputError: if a pattern matches none.
    """
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise UserInputError(
                f"No map matches {pattern!r}: give names such as freedoom1/E1M1 or globs such as 'freedoom2/MAP0*' "
                "and 'mazes/MAZE00*'."
            )
    return [name for name in known if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def collect(
    root: Path,
    options: CollectionOptions,
    workers: int = 1,
    on_progress: Callable[[int], None] = lambda done: None,
    time_limit_s: float | None = None,
) -> Report:
    """Makes a collection, or completes one that was interrupted.

    Args:
        on_progress: called with the number of scenes done so far.
        time_limit_s: begins no further places after so many seconds if each split has a scene by then; which scenes
            the collection holds then depends on the machine's speed.

    Raises:
        UserInputError: if the options cannot be met, or the folder holds something else.
    """
    begun = time.monotonic()
    _check_options(options)
    claim_folder(root, {k: v for k, v in asdict(options).items() if k != "num_scenes"})
    existing = {path.parent.name for path in root.glob("scenes/*/transforms.json")}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (str(root), options)) as pool:
        try:
            streams = _plan_streams(pool, options)
            deadline = None if time_limit_s is None else begun + time_limit_s
            _Scheduler(pool, root, streams, workers, on_progress, deadline).run(_totals(options, streams))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    splits = {name: [i for s in streams if s.split == name for i in s.scene_ids()] for name in SPLITS}
    _write_description(root, options, splits)
    for scene_id in {scene_id for stream in streams for scene_id in stream.surplus()}:
        shutil.rmtree(root / "scenes" / scene_id)
    new = {scene_id for ids in splits.values() for scene_id in ids} - existing
    num_frames = len(new) * (NUM_SOURCE_VIEWS + options.scenes.rig.num_target_views)
    counts = {name: len(ids) for name, ids in splits.items()}
    return Report(counts, num_frames, time.monotonic() - begun, workers)


def _check_options(options: CollectionOptions) -> None:
    held_out = sum(options.fractions.values())
    if options.num_scenes < 1:
        raise UserInputError(f"{options.num_scenes} scenes cannot be collected: ask for at least one.")
    if min(options.fractions.values()) < 0 or held_out >= 1:
        raise UserInputError("The fractions of held-out scenes must not be negative and must add up to less than one.")
    if options.hold_out == "maps" and held_out > 0 and len(options.maps) < 2:
        raise UserInputError(
            f"{options.maps[0]} is the only map, so none can be held out: give more maps or '--hold-out places'."
        )
    if options.test_maps and len(options.test_maps) == len(options.maps):
        raise UserInputError("All maps are held out for testing: leave some for training.")


def _write_description(root: Path, options: CollectionOptions, splits: dict[str, list[str]]) -> None:
    ids = [scene_id for name in SPLITS for scene_id in splits[name]]
    if not splits["train"]:
        raise UserInputError(
            f"No training place of {', '.join(options.maps[:3])} passed the filters: lower --min-depth, --min-inside "
            "or --min-brightness."
        )
    scenes = options.scenes
    write_collection(
        root,
        name="VizDoom places",
        licence=LICENCE,
        aabb=scenes.aabb,
        near=scenes.near,
        far=scenes.far,
        image_size=(scenes.image_size, scenes.image_size),
        splits=splits,
        places={i: read_json(root / "scenes" / i / "transforms.json")["place"] for i in ids},
        bev_classes=BEV_CLASSES,
        made_by={"command": "nfldm-collect vizdoom", "vizdoom": vizdoom.__version__, **asdict(options)},
    )


# Splits and quotas


@dataclass
class _Stream:
    """The candidate places of one map that belong to one split, and what became of them.

    Attributes:
        candidates: indices into the map's candidate spots, in the order to try them.
        accepted: by position in `candidates`, whether the place became a scene.
    """

    map: str
    split: str
    candidates: Int[np.ndarray, " count"]
    quota: int = 0
    submitted: int = 0
    accepted: dict[int, bool] = field(default_factory=dict)

    @property
    def in_flight(self) -> int:
        return self.submitted - len(self.accepted)

    @property
    def exhausted(self) -> bool:
        return self.submitted >= len(self.candidates) and not self.in_flight

    @property
    def num_accepted(self) -> int:
        return sum(self.accepted.values())

    @property
    def wants_more(self) -> bool:
        expected = self.num_accepted + self.in_flight * (self.num_accepted + 1) / (len(self.accepted) + 2)
        return self.submitted < len(self.candidates) and expected < self.quota

    def scene_id(self, position: int) -> str:
        return scene_id(self.map, int(self.candidates[position]))

    def next_chunk(self, known: Mapping[str, bool]) -> list[int]:
        """The next positions to be judged, passing over those whose verdict is known from an earlier run."""
        chunk: list[int] = []
        while len(chunk) < _CHUNK and self.wants_more:
            position, self.submitted = self.submitted, self.submitted + 1
            if self.scene_id(position) in known:
                self.accepted[position] = known[self.scene_id(position)]
            else:
                chunk.append(position)
        return chunk

    def _accepted_ids(self) -> list[str]:
        return [self.scene_id(position) for position, accepted in sorted(self.accepted.items()) if accepted]

    def scene_ids(self) -> list[str]:
        return self._accepted_ids()[: self.quota]

    def surplus(self) -> list[str]:
        return self._accepted_ids()[self.quota :]


def scene_id(map_name: str, candidate: int) -> str:
    """Names a scene after its map and its number among the map's candidate spots."""
    return f"{map_name.replace('/', '-').lower()}-{candidate:05d}"


def share_out(total: int, capacities: Sequence[float]) -> list[int]:
    """Splits a total as evenly as the capacities allow, the remainder going to earlier ones."""
    quotas = [0] * len(capacities)
    while sum(quotas) < total:
        free = [i for i, capacity in enumerate(capacities) if quotas[i] < capacity]
        if not free:
            break
        each, rest = divmod(total - sum(quotas), len(free))
        for position, i in enumerate(free):
            quotas[i] = int(min(capacities[i], quotas[i] + each + (position < rest)))
    return quotas


def split_maps(
    maps: Sequence[str], test_maps: Sequence[str], fractions: Mapping[str, float], seed: int
) -> dict[str, str]:
    """Which split each map belongs to when whole maps are held out."""
    order = [maps[i] for i in np.random.default_rng(seed).permutation(len(maps)) if maps[i] not in test_maps]
    split = dict.fromkeys(test_maps, "test")
    for name, fraction in fractions.items():
        if fraction <= 0 or (name == "test" and test_maps):
            continue
        for _ in range(max(1, round(fraction * len(maps)))):
            if len(order) > 1:
                split[order.pop()] = name
    return {name: split.get(name, "train") for name in maps}


def _plan_streams(pool: ProcessPoolExecutor, options: CollectionOptions) -> list[_Stream]:
    if options.hold_out == "places":
        found = list(pool.map(_split_places, options.maps))
        return [
            _Stream(name, split, candidates)
            for name, by_split in zip(options.maps, found, strict=True)
            for split, candidates in by_split.items()
        ]
    split_of = split_maps(options.maps, options.test_maps, options.fractions, options.scenes.seed)
    counts = list(pool.map(_count_spots, options.maps))
    return [_Stream(n, split_of[n], np.arange(count)) for n, count in zip(options.maps, counts, strict=True)]


def _totals(options: CollectionOptions, streams: Sequence[_Stream]) -> dict[str, int]:
    """Scenes per split; what an absent split would get goes to training."""
    present = {stream.split for stream in streams}
    totals = {
        name: max(1, round(options.num_scenes * fraction))
        for name, fraction in options.fractions.items()
        if name in present and fraction > 0
    }
    if options.test_maps:
        totals.setdefault("test", max(1, round(options.num_scenes * len(options.test_maps) / len(options.maps))))
    return {**totals, "train": max(0, options.num_scenes - sum(totals.values()))}


class _Scheduler:
    """Hands small chunks of candidates to the workers until every stream has met its quota or run dry."""

    def __init__(
        self,
        pool: ProcessPoolExecutor,
        root: Path,
        streams: Sequence[_Stream],
        workers: int,
        on_progress: Callable[[int], None],
        deadline: float | None = None,
    ) -> None:
        self._pool, self._streams, self._workers, self._on_progress = pool, streams, workers, on_progress
        self._deadline = deadline
        self._running: dict[Future[list[bool]], tuple[_Stream, list[int]]] = {}
        self._rejected = root / _REJECTED_FILE
        rejected = self._rejected.read_text().split() if self._rejected.exists() else []
        self._known = dict.fromkeys(rejected, False)
        self._known.update({path.parent.name: True for path in root.glob("scenes/*/transforms.json")})

    def run(self, totals: Mapping[str, int]) -> None:
        while True:
            self._set_quotas(totals)
            late = self._is_late(totals)
            while not late and len(self._running) < 2 * self._workers and self._submit():
                pass
            if self._running:
                self._collect()
            elif late or not any(stream.wants_more for stream in self._streams):
                return
            self._on_progress(sum(min(stream.num_accepted, stream.quota) for stream in self._streams))

    def _is_late(self, totals: Mapping[str, int]) -> bool:
        """Whether the time is over, and every split has a scene."""
        if self._deadline is None or time.monotonic() < self._deadline:
            return False
        found = {stream.split for stream in self._streams if stream.num_accepted}
        return all(split in found for split, total in totals.items() if total)

    def _set_quotas(self, totals: Mapping[str, int]) -> None:
        """Shares each split's scenes out among its maps; what a dry map leaves goes to the others."""
        for split, total in totals.items():
            members = [stream for stream in self._streams if stream.split == split]
            capacities = [stream.num_accepted if stream.exhausted else float("inf") for stream in members]
            for stream, quota in zip(members, share_out(total, capacities), strict=True):
                stream.quota = quota

    def _collect(self) -> None:
        done, _ = wait(self._running, return_when=FIRST_COMPLETED)
        for job in done:
            stream, positions = self._running.pop(job)
            verdicts = dict(zip(positions, job.result(), strict=True))
            stream.accepted.update(verdicts)
            with self._rejected.open("a") as file:
                file.writelines(f"{stream.scene_id(p)}\n" for p, accepted in verdicts.items() if not accepted)

    def _submit(self) -> bool:
        """Starts one chunk; False if no more are wanted for now."""
        wanting = [stream for stream in self._streams if stream.wants_more]
        if not wanting:
            return False
        stream = min(wanting, key=lambda s: (s.num_accepted + s.in_flight) / max(s.quota, 1))
        positions = stream.next_chunk(self._known)
        if positions:
            job = self._pool.submit(_make_scenes, stream.map, stream.candidates[positions].tolist())
            self._running[job] = (stream, positions)
        return True


# Workers: one process each, with its maps and VizDoom instances


@dataclass
class _Worker:
    root: Path
    options: CollectionOptions
    renderers: dict[str, DoomRenderer] = field(default_factory=dict)

    def renderer(self, wad_name: str) -> DoomRenderer:
        if wad_name not in self.renderers:
            levels = [name.split("/")[1] for name in self.options.maps if name.split("/")[0] == wad_name]
            scenes = self.options.scenes
            renderer = DoomRenderer(
                _open_wad(wad_name),
                levels,
                scenes.image_size,
                keep_sprites=scenes.keep_sprites,
                min_light=scenes.min_light,
            )
            self.renderers[wad_name] = renderer.__enter__()
        return self.renderers[wad_name]

    def close(self) -> None:
        for renderer in self.renderers.values():
            renderer.__exit__(None, None, None)


_worker: _Worker


def _start_worker(root: str, options: CollectionOptions) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = _Worker(Path(root), options)
    leave_interrupts_to_parent()
    multiprocessing.util.Finalize(None, _worker.close, exitpriority=10)


@cache
def _open_wad(name: str) -> Wad | MazeWad:
    return MazeWad(wad_path(_MAZE_GAME)) if name == MAZES else Wad(wad_path(name))


@lru_cache(maxsize=8)
def _open_map(name: str) -> tuple[DoomMap, DoomGeometry]:
    wad_name, level = name.split("/")
    doom_map = _open_wad(wad_name).read_map(level)
    return doom_map, DoomGeometry(doom_map)


def _map_seed(name: str, options: SceneOptions) -> list[int]:
    return [options.seed, zlib.crc32(name.encode())]


@lru_cache(maxsize=8)
def _spots(name: str, options: SceneOptions) -> Float[np.ndarray, "count 2"]:
    return candidate_spots(*_open_map(name), _map_seed(name, options), options.min_distance, options.snap)


def _count_spots(name: str) -> int:
    return len(_spots(name, _worker.options.scenes))


def _split_places(name: str) -> dict[str, Int[np.ndarray, " count"]]:
    """Candidates of each split when places are held out: those of two splits are further apart than the box."""
    options = _worker.options.scenes
    spots = _spots(name, options)
    extent = max(options.aabb[1][axis] - options.aabb[0][axis] for axis in (0, 1))
    gap = (extent + 2 * options.rig.source_jitter) * UNITS_PER_METRE
    geometry = _open_map(name)[1]
    standing = np.concatenate([s[can_stand(geometry, s)] for s in np.array_split(spots[:_REGION_SAMPLE], 50)])
    regions = hold_out_regions(standing, _worker.options.fractions, gap)
    return {split: np.flatnonzero(in_split(spots, split, regions, gap)) for split in ("train", *regions)}


def _make_scenes(name: str, candidates: list[int]) -> list[bool]:
    """For each candidate, whether it became a scene."""
    options = _worker.options.scenes
    maker = SceneMaker(name, _open_map(name)[1], _worker.renderer(name.split("/")[0]), options)
    made = []
    for candidate in candidates:
        folder = _worker.root / "scenes" / scene_id(name, candidate)
        spot, seed = _spots(name, options)[candidate], [*_map_seed(name, options), candidate]
        made.append(maker.make(folder, spot, seed))
    return made
