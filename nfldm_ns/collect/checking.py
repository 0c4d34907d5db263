"""Judges a scene collection: files, cameras, splits, and whether depths and poses agree with each other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import torch

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import Scene, SceneCollection
from nfldm_ns.scenes.views import Views, camera_rays, project_points

CONSISTENT = 0.05
"""Two depths of one point agree when they differ by less than this share."""
MAX_MEDIAN_ERROR = 0.05
MIN_CONSISTENT = 0.4
MAX_PIXEL_ASPECT = 1.1
MAX_ZOOM = 1.5
CLEARLY = 0.75
"""Images are said to be turned if their colours then differ by less than this share of what they differ by now."""
_MIN_OVERLAP = 200
_MAX_CELLS = 48
_MIN_FIELD_OF_VIEW, _MAX_FIELD_OF_VIEW = 5.0, 170.0


@dataclass(frozen=True)
class Reprojection:
    """How well the depths of a scene's views agree.

    Attributes:
        num_pixels: pixels of one view that fall onto another view's known depth.
        median_error: median relative difference of the two depths; NaN without overlap.
        consistent: share of the pixels whose depths differ by less than `CONSISTENT`; the others may be occluded.
    """

    num_pixels: int
    median_error: float
    consistent: float


@dataclass
class SceneCheck:
    """What was found in one scene."""

    scene_id: str
    split: str
    num_source: int = 0
    num_target: int = 0
    brightness: float = float("nan")
    known_depth: float = 0.0
    median_depth: float = float("nan")
    inside: float = float("nan")
    reprojection: Reprojection = field(default_factory=lambda: Reprojection(0, float("nan"), float("nan")))
    problems: list[str] = field(default_factory=list)


@dataclass
class CollectionCheck:
    """What was found in a collection; it is good when there are no problems."""

    scenes: list[SceneCheck]
    problems: list[str]

    @property
    def all_problems(self) -> list[str]:
        return [*self.problems, *(f"{s.scene_id}: {problem}" for s in self.scenes for problem in s.problems)]

    @property
    def ok(self) -> bool:
        return not self.all_problems


def check_collection(
    collection: SceneCollection, on_scene: Callable[[SceneCheck], None] = lambda scene: None
) -> CollectionCheck:
    """Reads every scene and judges all that can be judged without a model."""
    scenes = []
    for split, ids in collection.splits.items():
        for scene_id in ids:
            scenes.append(check_scene(collection, scene_id, split))
            on_scene(scenes[-1])
    problems = [*split_problems(collection), *_shape_problems(scenes)]
    return CollectionCheck(scenes, problems)


def check_scene(collection: SceneCollection, scene_id: str, split: str = "") -> SceneCheck:
    """Judges one scene; whatever is wrong becomes one of its problems."""
    check = SceneCheck(scene_id, split)
    try:
        scene = collection.load_scene(scene_id)
    except UserInputError as error:
        check.problems.append(str(error))
        return check
    check.num_source, check.num_target = scene.source.shape[0], scene.target.shape[0]
    check.brightness = float(torch.cat([scene.source.images, scene.target.images]).mean())
    check.problems += list(_camera_problems(collection, scene))
    if scene.source.depths is not None or scene.target.depths is not None:
        _check_depths(collection, scene, check)
    return check


def _check_depths(collection: SceneCollection, scene: Scene, check: SceneCheck) -> None:
    views = Views.cat([scene.source, scene.target])
    depths = views.depths
    assert depths is not None
    known = depths > 0
    check.known_depth = float(known.float().mean())
    if not bool(known.any()):
        check.problems.append("all depths are unknown (0): leave the depth files out, or write metric depth")
        return
    check.median_depth = float(depths[known].median())
    check.inside = _share_inside(views, collection.aabb)
    if check.inside < 0.05:
        check.problems.append(f"only {check.inside:.0%} of the surfaces lie inside the box: check box and unit")
    sightings = _sightings(views, _MAX_CELLS)
    check.reprojection = _agreement(sightings)
    agreement = check.reprojection
    if agreement.num_pixels >= _MIN_OVERLAP and (
        agreement.median_error > MAX_MEDIAN_ERROR or agreement.consistent < MIN_CONSISTENT
    ):
        check.problems.append(
            f"depths of different views contradict each other (median error {agreement.median_error:.1%}, "
            f"{agreement.consistent:.0%} consistent): check pose convention, depth unit and planar depth"
        )
    turned = _turned(views, sightings)
    if turned is not None:
        check.problems.append(
            f"images seem to be turned by {turned} degrees against their depths and poses: turn them upright, as EXIF "
            "orientation may say"
        )


def _camera_problems(collection: SceneCollection, scene: Scene) -> Iterator[str]:
    low, high = collection.aabb
    for role, views in (("source", scene.source), ("target", scene.target)):
        cameras = views.cameras
        height, width = views.image_size
        for name, focal, size in (("horizontal", cameras.fx, width), ("vertical", cameras.fy, height)):
            fov = torch.rad2deg(2 * torch.atan(size / 2 / focal))
            if bool(((fov < _MIN_FIELD_OF_VIEW) | (fov > _MAX_FIELD_OF_VIEW)).any()):
                yield f"a {role} view's {name} field of view is {float(fov.min()):.0f} degrees: check the focal length"
        centred = (cameras.cx > 0) & (cameras.cx < width) & (cameras.cy > 0) & (cameras.cy < height)
        if not bool(centred.all()):
            yield f"a {role} view has its principal point outside of the image: check cx and cy"
        eyes = cameras.camera_to_worlds[..., 3]
        if not bool(((eyes >= low) & (eyes <= high)).all()):
            yield f"a {role} camera stands outside of the box: check unit and origin of the poses"
    yield from _lens_problems(scene)
    centre = scene.source.cameras.camera_to_worlds[..., 3].mean(dim=0)
    if float(centre.norm()) > 0.25 * float((high - low).min()):
        yield f"the source cameras' mean is {float(centre.norm()):.2f} m away from the origin: recentre the poses"


def _lens_problems(scene: Scene) -> Iterator[str]:
    """Focal lengths that no one camera has: pixels that are not square, or fields of view far apart."""
    cameras = [scene.source.cameras, scene.target.cameras]
    fx, fy = (torch.cat([getattr(c, name) for c in cameras])[:, 0] for name in ("fx", "fy"))
    unlike = (fx / fy).log().abs().argmax()
    if float((fx[unlike] / fy[unlike]).log().abs()) > math.log(MAX_PIXEL_ASPECT):
        yield (
            f"a view's fx is {float(fx[unlike]):.1f} and its fy {float(fy[unlike]):.1f}, so that its pixels are not "
            "square: check w, h and the focal lengths against the images"
        )
    if float(fx.max() / fx.min()) > MAX_ZOOM:
        yield (
            f"the views' focal lengths differ from {float(fx.min()):.1f} to {float(fx.max()):.1f} pixels: check "
            "w, h and the focal lengths against the images"
        )


@dataclass
class _Sightings:
    """Pixels of one view whose surfaces should be seen by others, too.

    Attributes:
        here, there: (view, row, column) of the pixels, and of where they fall in other views, which know depth there.
        error: relative difference of the two depths.
    """

    here: tuple[torch.Tensor, ...]
    there: tuple[torch.Tensor, ...]
    error: torch.Tensor


def _sightings(views: Views, max_cells: int) -> list[_Sightings]:
    """Of each view, for at most so many of its rows and columns."""
    assert views.depths is not None
    height, width = views.image_size
    origins, directions = camera_rays(views.cameras, height, width)
    step = max(1, -(-max(height, width) // max_cells))
    depths = views.depths[:, 0]
    found = []
    for i in range(views.shape[0]):
        row, column = (step * index for index in (depths[i, ::step, ::step] > 0).nonzero(as_tuple=True))
        points = origins[i] + depths[i, row, column, None] * directions[i, row, column]
        z, there_row, there_column, visible = _project(views, points)
        visible[i] = False
        there_row, there_column = there_row.clamp(0, height - 1), there_column.clamp(0, width - 1)
        depth = depths[torch.arange(len(depths))[:, None], there_row, there_column]
        view, point = seen = (visible & (depth > 0)).nonzero(as_tuple=True)
        here = (torch.full_like(view, i), row[point], column[point])
        found.append(_Sightings(here, (view, there_row[seen], there_column[seen]), ((z - depth).abs() / depth)[seen]))
    return found


def turned_images(views: Views, max_cells: int = _MAX_CELLS) -> int | None:
    """Degrees (90, 180 or 270) by which images seem to be turned against their own depths and poses; None if upright.

    Every pixel is carried by its depth into the other views, where its colour should be found again. If with all images
    turned alike it is found there clearly better, depths and poses are not those of these images.

    Args:
        views: batch shape `[N]`, with depths.
        max_cells: at most this many rows and columns of pixels are compared.
    """
    return _turned(views, _sightings(views, max_cells))


def _turned(views: Views, sightings: list[_Sightings]) -> int | None:
    height, width = views.image_size
    agreeing = torch.cat([sighting.error for sighting in sightings]) < CONSISTENT
    if height != width or int(agreeing.sum()) < _MIN_OVERLAP:
        return None
    here, there = (
        [torch.cat(parts)[agreeing] for parts in zip(*places, strict=True)]
        for places in ([s.here for s in sightings], [s.there for s in sightings])
    )

    def difference(images: torch.Tensor) -> float:
        pixels = images.movedim(1, -1)
        return float((pixels[tuple(here)] - pixels[tuple(there)]).abs().mean())

    upright, *turned = (difference(torch.rot90(views.images, turn, (-2, -1))) for turn in range(4))
    best = min(range(3), key=turned.__getitem__)
    return 90 * (best + 1) if turned[best] < CLEARLY * upright else None


def reprojection_agreement(views: Views, max_cells: int = _MAX_CELLS) -> Reprojection:
    """Compares each view's depth, seen from every other view, with the depth known there.

    Args:
        views: batch shape `[N]`, with depths.
        max_cells: at most this many rows and columns of pixels are compared.
    """
    return _agreement(_sightings(views, max_cells))


def _agreement(sightings: list[_Sightings]) -> Reprojection:
    error = torch.cat([sighting.error for sighting in sightings])
    if not len(error):
        return Reprojection(0, float("nan"), float("nan"))
    return Reprojection(len(error), float(error.median()), float((error < CONSISTENT).float().mean()))


def _project(views: Views, points: torch.Tensor):
    """Planar depth, row and column of points `[P, 3]` in N views, and whether they are in the image, each `[N, P]`."""
    height, width = views.image_size
    column, row, z = project_points(views.cameras, points.expand(views.shape[0], -1, 3))
    column, row = torch.floor(column), torch.floor(row)
    visible = (z > 1e-3) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    clip = 2.0**30
    return z, row.clamp(-clip, clip).long(), column.clamp(-clip, clip).long(), visible


def _share_inside(views: Views, aabb: torch.Tensor) -> float:
    assert views.depths is not None
    origins, directions = camera_rays(views.cameras, *views.image_size)
    points = origins[:, None, None] + views.depths[:, 0, ..., None] * directions
    inside = ((points >= aabb[0]) & (points <= aabb[1])).all(dim=-1)
    return float(inside[views.depths[:, 0] > 0].float().mean())


def split_problems(collection: SceneCollection) -> list[str]:
    """Whatever makes splits unfit to judge by: places of two splits nearer than the box, or no test split at all."""
    problems = []
    try:
        collection.require_train_and_test()
    except UserInputError as error:
        problems.append(str(error))
    for first, second in combinations(collection.splits, 2):
        problems += _shared_places(collection, first, second)
    return problems


def _shared_places(collection: SceneCollection, first: str, second: str) -> Iterator[str]:
    extent = float((collection.aabb[1] - collection.aabb[0])[:2].max())
    by_map: dict[str, tuple[dict[str, list[float]], dict[str, list[float]]]] = {}
    for k, split in enumerate((first, second)):
        for scene_id in collection.splits[split]:
            place = collection.places.get(scene_id)
            if place is not None:
                by_map.setdefault(str(place["map"]), ({}, {}))[k][scene_id] = place["origin"]
    for name, (ours, theirs) in by_map.items():
        if not ours or not theirs:
            continue
        a, b = np.array(list(ours.values())), np.array(list(theirs.values()))
        distance = np.abs(a[:, None, :2] - b[None, :, :2]).max(axis=-1)
        if distance.min() < extent:
            i, j = np.unravel_index(distance.argmin(), distance.shape)
            yield (
                f"{first} and {second} share places of {name}: {list(ours)[i]} and {list(theirs)[j]} are "
                f"{distance.min():.1f} m apart, less than the box's {extent:.1f} m"
            )


def _shape_problems(scenes: list[SceneCheck]) -> list[str]:
    shapes = Counter((s.num_source, s.num_target) for s in scenes if s.num_source)
    if len(shapes) <= 1:
        return []
    listed = ", ".join(f"{count} scenes with {n} + {m}" for (n, m), count in shapes.most_common())
    return [f"scenes have different numbers of source + target views ({listed}): they cannot share a batch"]
