"""Makes a scene collection of long captures, cut into boxes along their paths: in parallel, and resumable.

A run has two parts. Frames are surveyed first (cameras, and depths of few pixels), in chunks that are kept. What the
boxes are is then decided by the surveys alone, so that it does not depend on workers or interruptions, and the scenes
are written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nfldm_ns.collect.capture_import import (
    ImportOptions,
    ReadCapture,
    bev_classes,
    bev_map,
    check_depth_unit,
    load_frame,
    load_views,
    require_folder,
    resolved_size,
    scene_ids,
    split_captures,
    world_poses,
)
from nfldm_ns.collect.captures import Capture
from nfldm_ns.collect.cut_picture import write_plan
from nfldm_ns.collect.cutting import (
    Aabb,
    Place,
    PlaceOptions,
    Survey,
    assign_splits,
    coarse_depth,
    coarse_intrinsics,
    found_box,
    plan_places,
)
from nfldm_ns.collect.resuming import claim_folder
from nfldm_ns.collect.workers import run_tasks
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import SPLITS
from nfldm_ns.scenes.writing import atomic_path, clear_unfinished, write_collection, write_json, write_scene

FOLDER = "cutting"
"""Of the run's own files within the collection: options, surveys, report, pictures."""
_CHUNK = 100  # frames surveyed as one task
_SPACING = 0.125  # of the box's width


@dataclass(frozen=True)
class CutOptions:
    """How captures are cut, beside what the import does with each frame.

    Attributes:
        box: around each place, in metres; None finds one for all captures (`found_box`).
        spacing: metres between places along the path; None is an eighth of the box's width.
        camera_height: metres between the floor and the cameras, where that gives each capture its scale.
        min_inside, min_overlap: see `PlaceOptions`.
        hold_out: stretches of every capture, or whole captures.
    """

    box: Aabb | None = None
    spacing: float | None = None
    camera_height: float | None = None
    min_inside: float = 0.4
    min_overlap: float = 0.5
    hold_out: Literal["stretches", "captures"] = "stretches"


@dataclass
class CutCapture:
    """What became of one capture.

    Attributes:
        scale: metres per metre of the options' units, as the cameras' height gave it.
        camera_height: above the floor, in metres; None where no floor was found.
    """

    name: str
    capture: Capture
    survey: Survey
    scale: float
    camera_height: float | None
    places: list[Place] = field(default_factory=list)

    def scene_id(self, place: Place) -> str:
        return f"{self.name}-{place.frame:05d}"

    def of_split(self, split: str) -> list[str]:
        return [self.scene_id(place) for place in self.places if place.split == split]

    def dropped(self) -> Iterator[tuple[str, float, float, int]]:
        """Stretches of the path without scenes: why, from and to which metre, and how many places they would be."""
        for reason, group in groupby(self.places, key=lambda place: place.dropped):
            members = list(group)
            if reason:
                yield reason, members[0].along, members[-1].along, len(members)


@dataclass
class CutReport:
    """What a run made."""

    aabb: Aabb
    spacing: float
    image_size: tuple[int, int]
    captures: list[CutCapture]

    @property
    def splits(self) -> dict[str, list[str]]:
        return {split: [i for cut in self.captures for i in cut.of_split(split)] for split in SPLITS}


def cut_captures(
    root: Path,
    captures: Sequence[Path],
    options: ImportOptions,
    cut: CutOptions,
    read: ReadCapture,
    made_by: dict[str, Any],
    workers: int = 1,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> CutReport:
    """Writes a collection of as many scenes of each capture as its views allow, or completes one that was interrupted.

    Args:
        root: the new collection.
        captures: folders of the format that `read` reads.
        options: of the frames; its box does not count.
        read: a reader of `nfldm_ns.collect.formats` that other processes can be given.
        made_by: command and options of the reader, for the record.
        on_progress: told what is done ("frames", "scenes"), how many, and of how many.

    Raises:
        UserInputError: if a capture or an option cannot be used, or no place can be cut.
    """
    _check_options(options, cut, workers)
    names = scene_ids(captures)
    found = [_read(folder, read, options) for folder in captures]
    options = replace(options, image_size=resolved_size(found[0], options.image_size))
    split_captures(names, options)  # names of test scenes that are none are told of before any work
    folders = [str(folder.resolve()) for folder in captures]
    frames = [len(capture.frames) for capture in found]
    identity = {**made_by, "captures": folders, "frames": frames, **_recorded(options), **asdict(cut)}
    claim_folder(root, identity, f"{FOLDER}/options.json")
    clear_unfinished(root / "scenes")
    work = _Work(root, list(captures), names, read, options)
    _survey(work, frames, workers, on_progress)
    report = _plan(work, found, cut)
    _check_report(report)
    _write_scenes(work, report, workers, on_progress)
    _write_report(work, report, cut, made_by)
    return report


def _check_options(options: ImportOptions, cut: CutOptions, workers: int) -> None:
    if min(options.num_source_views, options.num_target_views, workers) < 1:
        raise UserInputError("Source views, target views and workers must be at least one each.")
    held_out = (options.test_fraction, options.val_fraction)
    if min(held_out) < 0 or sum(held_out) >= 1:
        raise UserInputError("The fractions of held-out scenes must not be negative and must add up to less than one.")
    for name, value in (("--spacing", cut.spacing), ("--camera-height", cut.camera_height)):
        if value is not None and not (0 < value < math.inf):
            raise UserInputError(f"{name} is {value:g}, but must be a number of metres above 0.")
    for name, share in (("--min-inside", cut.min_inside), ("--min-overlap", cut.min_overlap)):
        if not 0 <= share <= 1:
            raise UserInputError(f"{name} is {share:g}, but must be a share from 0 to 1.")
    if cut.box is not None and not all(low < 0 < high for low, high in zip(*cut.box, strict=True)):
        raise UserInputError(
            "The box must hold its place, which is its origin: give minimum x, y, z below 0, then maximum above."
        )


def _recorded(options: ImportOptions) -> dict[str, Any]:
    """Options that count for a cut."""
    values = asdict(options)
    del values["aabb"]
    return values


def _read(folder: Path, read: ReadCapture, options: ImportOptions) -> Capture:
    require_folder(folder, read)
    capture = read(folder)
    needed = options.num_source_views + options.num_target_views
    if len(capture.frames) < needed:
        raise UserInputError(
            f"{folder} has {len(capture.frames)} frames, too few for scenes of {options.num_source_views} source and "
            f"{options.num_target_views} target views: ask for fewer views, or give a longer capture."
        )
    if not any(frame.has_depth for frame in capture.frames):
        raise UserInputError(
            f"{folder} has no depth, without which nothing says what its views see: give depth files, or a "
            "reconstruction with points ('nfldm-collect colmap --cut', --monocular-depth for more than its points)."
        )
    world_poses(capture, options)
    return capture


# Surveys


@dataclass
class _Work:
    """What every process knows."""

    root: Path
    folders: list[Path]
    names: list[str]
    read: ReadCapture
    options: ImportOptions

    def survey_file(self, number: int, start: int) -> Path:
        return self.root / FOLDER / "surveys" / f"{self.names[number]}-{start:06d}.npz"


_work: _Work
_captures: dict[int, Capture]


def _start(work: _Work) -> None:
    global _work, _captures
    _work, _captures = work, {}


def _capture(number: int) -> Capture:
    if number not in _captures:
        _captures.clear()  # one at a time, as descriptions may be large
        _captures[number] = _work.read(_work.folders[number])
    return _captures[number]


def _chunks(frames: int) -> Iterator[tuple[int, int]]:
    for start in range(0, frames, _CHUNK):
        yield start, min(frames, start + _CHUNK)


def _survey(work: _Work, frames: list[int], workers: int, on_progress: Callable[[str, int, int], None]) -> None:
    """Surveys what was not yet."""
    tasks = [(number, *chunk) for number, count in enumerate(frames) for chunk in _chunks(count)]
    missing = [task for task in tasks if not work.survey_file(task[0], task[1]).is_file()]
    done = [len(tasks) - len(missing)]

    def tell() -> None:
        done[0] += 1
        on_progress("frames", min(sum(frames), done[0] * _CHUNK), sum(frames))

    run_tasks(_start, work, _survey_chunk, missing, workers, tell)


def _survey_chunk(number: int, start: int, stop: int) -> None:
    capture, options = _capture(number), _work.options
    depths, intrinsics = [], []
    for frame in capture.frames[start:stop]:
        loaded = load_frame(capture, frame, options)
        depth = np.zeros(loaded.mask.shape) if loaded.depth is None else np.where(loaded.mask, loaded.depth, 0)
        depths.append(coarse_depth(depth))
        intrinsics.append(coarse_intrinsics(loaded.intrinsics, options.image_size))
    with atomic_path(_work.survey_file(number, start)) as temporary, temporary.open("wb") as file:
        np.savez(file, depths=np.stack(depths), intrinsics=np.stack(intrinsics))


def _load_survey(work: _Work, number: int, capture: Capture) -> Survey:
    parts = []
    for start, _ in _chunks(len(capture.frames)):
        path = work.survey_file(number, start)
        try:
            with np.load(path) as content:
                parts.append((content["depths"], content["intrinsics"]))
        except Exception as error:  # numpy and zipfile raise many kinds for damaged files
            raise UserInputError(f"{path} is damaged ({error}): remove it and repeat the command.") from None
    depths, intrinsics = (np.concatenate(values) for values in zip(*parts, strict=True))
    cameras = [frame.camera for frame in capture.frames]
    return Survey(world_poses(capture, work.options), depths, intrinsics, cameras)


# Plans


def _plan(work: _Work, captures: list[Capture], cut: CutOptions) -> CutReport:
    options = work.options
    cuts = [_measured(work, number, capture, cut) for number, capture in enumerate(captures)]
    held_out = {"test": options.test_fraction, "val": options.val_fraction}
    by_stretch = cut.hold_out == "stretches" and not options.test_scenes
    aabb = cut.box or found_box([c.survey for c in cuts], by_stretch and sum(held_out.values()) > 0)
    if aabb is None:
        raise UserInputError(
            f"The cameras of {work.folders[0]} stand in one spot or see no depth, so no box can be found: give --box."
        )
    extent = max(aabb[1][axis] - aabb[0][axis] for axis in (0, 1))
    spacing = cut.spacing or _SPACING * extent
    views = (options.num_source_views, options.num_target_views)
    place_options = PlaceOptions(aabb, spacing, *views, cut.min_inside, cut.min_overlap)
    by_capture = {name: split for split, names in split_captures(work.names, options).items() for name in names}
    for each in cuts:
        each.places = plan_places(each.survey, place_options)
        assign_splits(each.places, extent, held_out if by_stretch else {})
        for place in each.places if not by_stretch else []:
            place.split = place.split and by_capture[each.name]
    return CutReport(aabb, spacing, options.image_size, cuts)


def _measured(work: _Work, number: int, capture: Capture, cut: CutOptions) -> CutCapture:
    """A capture's survey at its scale."""
    survey = _load_survey(work, number, capture)
    height = survey.camera_height()
    scale = 1.0
    if cut.camera_height is not None:
        if height is None:
            raise UserInputError(
                f"No floor is seen below the cameras of {capture.folder}, so that --camera-height gives no scale: set "
                "--metres-per-unit, or --up if another axis points up."
            )
        scale = cut.camera_height / height
        survey = survey.scaled(scale)
    known = survey.depths[survey.depths > 0]
    if len(known):
        sparse = any(frame.points is not None for frame in capture.frames)
        check_depth_unit(capture.folder, float(np.median(known)), work.options, sparse)
    return CutCapture(work.names[number], capture, survey, scale, None if height is None else height * scale)


def _check_report(report: CutReport) -> None:
    if report.splits["train"]:
        return
    reasons = sorted({reason for cut in report.captures for reason, *_ in cut.dropped()})
    raise UserInputError(
        f"No place of {report.captures[0].capture.folder} became a training scene ({'; '.join(reasons)}): "
        "ask for fewer views, lower --spacing, --min-inside or --min-overlap, or give another --box."
    )


# Scenes


def _write_scenes(work: _Work, report: CutReport, workers: int, on_progress: Callable[[str, int, int], None]) -> None:
    """Writes what is not there yet."""
    tasks = [
        (number, cut.scene_id(place), place, cut.survey.poses[[*place.sources, *place.targets]], cut.scale, report.aabb)
        for number, cut in enumerate(report.captures)
        for place in cut.places
        if place.split
    ]
    missing = [task for task in tasks if not (work.root / "scenes" / task[1] / "transforms.json").is_file()]
    done = [len(tasks) - len(missing)]

    def tell() -> None:
        done[0] += 1
        on_progress("scenes", done[0], len(tasks))

    run_tasks(_start, work, _write_place, missing, workers, tell)


def _write_place(number: int, scene_id: str, place: Place, poses: np.ndarray, scale: float, aabb: Aabb) -> None:
    poses = poses.copy()
    poses[:, :, 3] -= place.origin
    count = len(place.sources)
    capture = _capture(number)
    source, target = (
        load_views(capture, chosen, own, _work.options, scale)
        for chosen, own in ((place.sources, poses[:count]), (place.targets, poses[count:]))
    )
    options = replace(_work.options, aabb=aabb, metres_per_unit=_work.options.metres_per_unit * scale)
    bev = bev_map(capture, place.origin, options)
    classes = () if bev is None else bev_classes([capture], options)
    extra = {"place": _place(_work.names[number], place)}
    write_scene(_work.root / "scenes" / scene_id, source, target, bev, classes, extra)


def _place(name: str, place: Place) -> dict[str, Any]:
    found = {"map": name, "origin": place.origin.tolist()}
    return found if place.floor is None else {**found, "floor": place.floor}


def _write_report(work: _Work, report: CutReport, cut: CutOptions, made_by: dict[str, Any]) -> None:
    options = work.options
    for each in report.captures:
        write_plan(
            work.root / FOLDER / f"{each.name}.png", each.survey, each.places, report.aabb, _summary(each, report)
        )
    write_json(work.root / FOLDER / "report.json", as_json(report))
    write_collection(
        work.root,
        name=options.name,
        licence=options.licence,
        aabb=report.aabb,
        near=options.near,
        far=options.far,
        image_size=report.image_size,
        splits=report.splits,
        places={c.scene_id(p): _place(c.name, p) for c in report.captures for p in c.places if p.split},
        bev_classes=bev_classes([c.capture for c in report.captures if any(p.split for p in c.places)], options),
        made_by={
            **made_by,
            "scenes": [path.name for path in work.folders],
            **_recorded(options),
            **asdict(cut),
            "box": report.aabb,
            "spacing": report.spacing,
        },
    )


def _summary(cut: CutCapture, report: CutReport) -> str:
    counts = ", ".join(f"{len(ids)} {split}" for split in SPLITS if (ids := cut.of_split(split)))
    width = report.aabb[1][0] - report.aabb[0][0]
    return f"{cut.name}: {counts or 'no'} scenes, boxes of {width:g} m"


def as_json(report: CutReport) -> dict[str, Any]:
    """All places of all captures, and why those that are no scenes are none."""
    return {
        "aabb": report.aabb,
        "spacing": report.spacing,
        "image_size": list(report.image_size),
        "captures": {
            cut.name: {
                "frames": len(cut.capture.frames),
                "frames_without_depth": int((~cut.survey.known.any(axis=1)).sum()),
                "path_length": float(cut.survey.path_length[-1]),
                "camera_height": cut.camera_height,
                "scale": cut.scale,
                "places": [
                    {
                        "frame": cut.capture.frames[place.frame].name,
                        "along": place.along,
                        "origin": place.origin.tolist(),
                        "floor": place.floor,
                        "sources": [cut.capture.frames[i].name for i in place.sources],
                        "targets": [cut.capture.frames[i].name for i in place.targets],
                        "split": place.split or None,
                        "dropped": place.dropped or None,
                    }
                    for place in cut.places
                ],
            }
            for cut in report.captures
        },
    }
