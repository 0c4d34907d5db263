"""Where a capture is cut into boxes: places along its path, the views that see each, and splits that share none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from nfldm_ns.collect.orientation import floor_drop

Aabb = tuple[tuple[float, ...], tuple[float, ...]]
GRID = 24
"""At most so many rows and columns of a frame's depth are looked at."""
_WALL_CELLS = 64  # of surfaces to a box's width, for lines of sight
_REACHES = (0.25, 0.35, 0.5)  # of half the box's width: views stand no farther from their place; the first that will do
_TOLERANCE = 0.1  # of depth, by which a surface may lie behind what another view sees and still be that
_APART = 0.2  # least difference of a target view from every source: a turn by 11 degrees, or 0.2 of the reach
_ELSEWHERE = 0.7  # of the spacing, which is along the path: least distance of any two places, as at corners
_HORIZONTAL = 0.8  # quantile of the distance of surfaces that a found box reaches
_ABOVE, _BELOW = 0.9, 0.98
_BOXES_ALONG = 3.0  # a found box fits so many times along the path, or no place could be held out
_LARGEST_HALF = 10.0


@dataclass(frozen=True)
class Survey:
    """What is known of a capture's frames before it is cut: cameras, and depths of few pixels.

    Attributes:
        poses: camera-to-world, z up, in metres.
        depths: planar, of `rows` x `columns` cells of each image; 0 is unknown or masked.
        intrinsics: fx, fy, cx, cy in cells.
        cameras: which of several that move together each frame is of; None: there is one.
    """

    poses: Float[np.ndarray, "frames 3 4"]
    depths: Float[np.ndarray, "frames rows columns"]
    intrinsics: Float[np.ndarray, "frames 4"]
    cameras: Sequence[str] | None = None

    def scaled(self, scale: float) -> Survey:
        """With all lengths so many times as long."""
        poses = self.poses.copy()
        poses[:, :, 3] *= scale
        return Survey(poses, self.depths * scale, self.intrinsics, self.cameras)

    @property
    def eyes(self) -> Float[np.ndarray, "frames 3"]:
        return self.poses[:, :, 3]

    @cached_property
    def known(self) -> Bool[np.ndarray, "frames cells"]:
        """Which cells have depth."""
        return self.depths.reshape(len(self.depths), -1) > 0

    @cached_property
    def points(self) -> Float[np.ndarray, "frames cells 3"]:
        """Surfaces in the world, also of cells without depth, where they mean nothing."""
        rows, columns = self.depths.shape[1:]
        x = (np.arange(columns) + 0.5 - self.intrinsics[:, 2:3]) / self.intrinsics[:, 0:1]
        y = (np.arange(rows) + 0.5 - self.intrinsics[:, 3:4]) / self.intrinsics[:, 1:2]
        across = np.broadcast_to(x[:, None, :], self.depths.shape)
        down = np.broadcast_to(-y[:, :, None], self.depths.shape)
        local = np.stack([across, down, -np.ones(self.depths.shape)], axis=-1) * self.depths[..., None]
        world = np.einsum("nij,nrcj->nrci", self.poses[:, :, :3], local) + self.eyes[:, None, None]
        return world.reshape(len(self.depths), -1, 3)

    @cached_property
    def path_length(self) -> Float[np.ndarray, " frames"]:
        """How far the camera came by each frame; of several that move together, the first frame's, even in between."""
        frames = np.arange(len(self.eyes))
        own = frames if self.cameras is None else np.flatnonzero(np.array(self.cameras) == self.cameras[0])
        steps = np.linalg.norm(np.diff(self.eyes[own], axis=0), axis=1)
        return np.interp(frames, own, np.concatenate([[0.0], np.cumsum(steps)]))

    def camera_height(self) -> float | None:
        """Height of the cameras above the floor, see `floor_drop`; None where no floor is seen."""
        return floor_drop((self.eyes[:, None, 2] - self.points[:, :, 2])[self.known])

    def sees(self, frame: int, points: Float[np.ndarray, "points 3"]) -> Bool[np.ndarray, " points"]:
        """Which points a frame shows: within its image, and not behind what it has depth of."""
        rows, columns = self.depths.shape[1:]
        local = (points - self.eyes[frame]) @ self.poses[frame, :, :3]
        z = -local[:, 2]
        fx, fy, cx, cy = self.intrinsics[frame]
        with np.errstate(divide="ignore", invalid="ignore"):
            column, row = np.floor(fx * local[:, 0] / z + cx), np.floor(-fy * local[:, 1] / z + cy)
            inside = (z > 0) & (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
        depth = self.depths[frame][np.where(inside, row, 0).astype(int), np.where(inside, column, 0).astype(int)]
        return inside & ((depth == 0) | (z <= depth * (1 + _TOLERANCE)))


def coarse_depth(depth: Float[np.ndarray, "height width"]) -> Float[np.ndarray, "rows columns"]:
    """Depth of at most `GRID` x `GRID` cells: at their centres, or the nearest known in them where that is unknown."""
    height, width = depth.shape
    step = max(1, -(-max(height, width) // GRID))
    rows, columns = -(-height // step), -(-width // step)
    padded = np.full((rows * step, columns * step), np.inf)
    padded[:height, :width] = np.where(depth > 0, depth, np.inf)
    blocks = padded.reshape(rows, step, columns, step)
    centres, nearest = blocks[:, step // 2, :, step // 2], blocks.min(axis=(1, 3))
    found = np.where(np.isfinite(centres), centres, nearest)
    return np.where(np.isfinite(found), found, 0)


def coarse_intrinsics(intrinsics: Float[np.ndarray, " 4"], size: tuple[int, int]) -> Float[np.ndarray, " 4"]:
    """fx, fy, cx, cy in the cells of `coarse_depth` of an image of this (width, height)."""
    step = max(1, -(-max(size) // GRID))
    fx, fy, cx, cy = intrinsics
    shift = 0.5 - (step // 2 + 0.5) / step  # the middle pixel of an even number is not in the middle
    return np.array([fx / step, fy / step, cx / step + shift, cy / step + shift])


class Walls:
    """Surfaces of a whole capture in cells of one size, for lines of sight."""

    def __init__(self, survey: Survey, cell: float) -> None:
        self._cell = cell
        points = survey.points[survey.known]
        self._low = np.floor(points.min(axis=0) / cell).astype(np.int64) - 1 if len(points) else np.zeros(3, np.int64)
        self._shape = np.floor(points.max(axis=0) / cell).astype(np.int64) - self._low + 2 if len(points) else self._low
        keys, counts = np.unique(self._keys(points), return_counts=True)
        self._keys_of_surfaces = keys[(counts >= 2) & (keys >= 0)]  # a single point may be noise

    def _keys(self, points: Float[np.ndarray, "*points 3"]) -> Int[np.ndarray, "*points"]:
        """Number of the cell of each point; -1 outside."""
        at = np.floor(points / self._cell).astype(np.int64) - self._low
        inside = ((at >= 0) & (at < self._shape)).all(axis=-1)
        return np.where(inside, (at[..., 0] * self._shape[1] + at[..., 1]) * self._shape[2] + at[..., 2], -1)

    def between(self, eyes: Float[np.ndarray, "eyes 3"], place: Float[np.ndarray, " 3"]) -> Bool[np.ndarray, " eyes"]:
        """Whether a surface lies between each eye and the place, more than a cell and a half away from both."""
        hidden = np.zeros(len(eyes), bool)
        for i, eye in enumerate(eyes):
            length = float(np.linalg.norm(place - eye))
            margin = 1.5 * self._cell
            if length <= 2 * margin:
                continue
            along = np.arange(margin, length - margin, self._cell / 3) / length
            hidden[i] = self._is_surface(self._keys(eye + along[:, None] * (place - eye))).any()
        return hidden

    def _is_surface(self, keys: Int[np.ndarray, " keys"]) -> Bool[np.ndarray, " keys"]:
        surfaces = self._keys_of_surfaces
        if not len(surfaces):
            return np.zeros(len(keys), bool)
        return surfaces[np.searchsorted(surfaces, keys).clip(max=len(surfaces) - 1)] == keys


@dataclass(frozen=True)
class PlaceOptions:
    """What makes a place, lengths in metres.

    Attributes:
        spacing: between places along the path.
        num_source_views, num_target_views: per place.
        min_inside: least share of a view's surfaces inside the box.
        min_overlap: least share of a target view's surfaces that some source view sees, too.
    """

    aabb: Aabb
    spacing: float
    num_source_views: int = 8
    num_target_views: int = 4
    min_inside: float = 0.4
    min_overlap: float = 0.5


@dataclass
class Place:
    """A box along a path.

    Attributes:
        frame: whose eye it was planned around.
        along: metres along the path.
        sources, targets: frames; none where it was dropped.
        origin: mean of the source views' eyes, to which the box is relative.
        floor: height of the floor relative to the origin; None where none is seen.
        dropped: why it is no scene; empty if it is one.
    """

    frame: int
    along: float
    origin: Float[np.ndarray, " 3"]
    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    floor: float | None = None
    split: str = ""
    dropped: str = ""


def found_box(surveys: Sequence[Survey], held_out: bool) -> Aabb | None:
    """A box, the same in x and y, that holds most of what the cameras of all captures see around them.

    Sideways it reaches as far as 80 % of the surfaces, and where places of a capture are held out, no farther than that
    three boxes fit along a path; down to the floor, up to 90 % of what is above the cameras, and rounded.

    Args:
        surveys: of captures with depth.
        held_out: whether places of each capture are held out from others.

    Returns:
        None if nothing has depth.
    """
    offsets = [(survey.points - survey.eyes[:, None])[survey.known] for survey in surveys]
    points = np.concatenate(offsets) if offsets else np.zeros((0, 3))
    if not len(points):
        return None
    half = float(np.quantile(np.hypot(points[:, 0], points[:, 1]), _HORIZONTAL))
    if held_out:
        extents = [np.ptp(survey.eyes[:, :2], axis=0).max() for survey in surveys]
        half = min(half, max(extents) / (2 * _BOXES_ALONG))
    half = min(half, _LARGEST_HALF)
    if half <= 0:
        return None
    step = 10 ** np.floor(np.log10(half)) / 2
    half = max(step, float(np.floor(half / step + 1e-9) * step))
    heights = [height for survey in surveys if (height := survey.camera_height()) is not None]
    below, above = -points[points[:, 2] < 0, 2], points[points[:, 2] > 0, 2]
    down = max(heights) if heights else (float(np.quantile(below, _BELOW)) if len(below) else half)
    up = float(np.quantile(above, _ABOVE)) if len(above) else half
    step /= 5
    low, high = (float(np.ceil((min(side, 2 * half) + step) / step) * step) for side in (down, up))
    corners = ((-half, -half, -low), (half, half, high))
    return tuple(tuple(round(float(value), 6) for value in corner) for corner in corners)  # type: ignore[return-value]


def places_along(survey: Survey, spacing: float) -> list[int]:
    """Frames at whose eyes there are places: so far apart along the path, and hardly nearer where it comes back."""
    chosen: list[int] = []
    since = np.inf
    for i, eye in enumerate(survey.eyes):
        since += survey.path_length[i] - survey.path_length[i - 1] if i else 0.0
        near = np.linalg.norm(survey.eyes[chosen] - eye, axis=1) if chosen else np.array([np.inf])
        if since >= spacing and near.min() >= _ELSEWHERE * spacing:
            chosen.append(i)
            since = 0.0
    return chosen


def plan_places(survey: Survey, options: PlaceOptions) -> list[Place]:
    """Places along a capture's path with the views that see them, and those dropped, which say why."""
    width = min(options.aabb[1][axis] - options.aabb[0][axis] for axis in (0, 1))
    walls = Walls(survey, width / _WALL_CELLS)
    return [_plan_place(survey, walls, frame, options) for frame in places_along(survey, options.spacing)]


def _plan_place(survey: Survey, walls: Walls, frame: int, options: PlaceOptions) -> Place:
    """A place with views as near to it as there are enough of: the nearer, the less is hidden from some of them."""
    half = min(min(-options.aabb[0][axis], options.aabb[1][axis]) for axis in (0, 1))
    for share in _REACHES:
        place = _plan_within(survey, walls, frame, share * half, options)
        if not place.dropped:
            break
    return place


def _plan_within(survey: Survey, walls: Walls, frame: int, reach: float, options: PlaceOptions) -> Place:
    place = Place(frame, float(survey.path_length[frame]), survey.eyes[frame].copy())
    seeing = views_of_place(survey, walls, place.origin, options.aabb, reach, options.min_inside)
    place.sources = spread_views(survey, seeing, frame, reach, options.num_source_views)
    if len(place.sources) == options.num_source_views:
        place.origin = survey.eyes[place.sources].mean(axis=0)
        place.targets = _target_views(survey, seeing, place, reach, options)
    place.dropped = _why_not(survey, place, len(seeing), options)
    place.floor = _floor(survey, place, options.aabb)
    return place


def _floor(survey: Survey, place: Place, aabb: Aabb) -> float | None:
    """Height of the floor in a place's box relative to its origin, of what all frames within the box see of it."""
    apart = (survey.eyes - place.origin)[:, :2]
    frames = np.flatnonzero(((apart >= aabb[0][:2]) & (apart <= aabb[1][:2])).all(axis=1))
    offsets = (survey.points[frames] - place.origin)[survey.known[frames]]
    offsets = offsets[((offsets >= aabb[0]) & (offsets <= aabb[1])).all(axis=-1)]
    drop = floor_drop(-offsets[:, 2])
    return None if drop is None else -drop


def views_of_place(
    survey: Survey, walls: Walls, place: Float[np.ndarray, " 3"], aabb: Aabb, reach: float, min_inside: float
) -> Int[np.ndarray, " views"]:
    """Frames that see a place: near it, with no wall in between, and enough of what they show inside of the box."""
    near = np.flatnonzero(np.linalg.norm((survey.eyes - place)[:, :2], axis=1) <= reach)
    near = near[share_inside(survey, near, place, aabb) >= min_inside]
    return near[~walls.between(survey.eyes[near], place)]


def share_inside(
    survey: Survey, frames: Int[np.ndarray, " views"], origin: Float[np.ndarray, " 3"], aabb: Aabb
) -> Float[np.ndarray, " views"]:
    """Share of each frame's cells with depth whose surface lies in the box around an origin; 0 for none with depth."""
    offsets = survey.points[frames] - origin
    inside = ((offsets >= aabb[0]) & (offsets <= aabb[1])).all(axis=-1) & survey.known[frames]
    return inside.sum(axis=1) / np.maximum(survey.known[frames].sum(axis=1), 1)


def _looks(survey: Survey, reach: float) -> Float[np.ndarray, "frames 6"]:
    """Where frames stand and look, in numbers whose distance says how different two views are."""
    return np.concatenate([-survey.poses[:, :, 2], survey.eyes / max(reach, 1e-9)], axis=1)


def spread_views(survey: Survey, frames: Int[np.ndarray, " views"], first: int, reach: float, count: int) -> list[int]:
    """Frames that look in as different directions from as different spots as there are (farthest point sampling).

    Args:
        first: frame at the place; the first choice is the one of `frames` most like it.

    Returns:
        `count` frames in their order in the capture; all of them if there are fewer.
    """
    looks = _looks(survey, reach)
    if len(frames) <= count:
        return sorted(frames.tolist())
    at = int(np.linalg.norm(looks[frames] - looks[first], axis=1).argmin())
    chosen = [at]
    distance = np.full(len(frames), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, np.linalg.norm(looks[frames] - looks[frames[chosen[-1]]], axis=1))
        chosen.append(int(distance.argmax()))
    return sorted(int(frames[i]) for i in chosen)


def _target_views(
    survey: Survey, seeing: Int[np.ndarray, " views"], place: Place, reach: float, options: PlaceOptions
) -> list[int]:
    """Views apart from the sources, most of whose surfaces in the box sources see, too."""
    looks = _looks(survey, reach)
    rest = seeing[~np.isin(seeing, place.sources)]
    apart = np.linalg.norm(looks[rest, None] - looks[place.sources], axis=-1).min(axis=1, initial=np.inf)
    rest = rest[apart >= _APART]
    rest = np.array([i for i in rest if overlap(survey, int(i), place, options.aabb) >= options.min_overlap], np.int64)
    return spread_views(survey, rest, place.frame, reach, options.num_target_views)


def overlap(survey: Survey, frame: int, place: Place, aabb: Aabb) -> float:
    """Share of a frame's surfaces in the box that one of the source views sees as well."""
    points = survey.points[frame][survey.known[frame]]
    offsets = points - place.origin
    points = points[((offsets >= aabb[0]) & (offsets <= aabb[1])).all(axis=-1)]
    if not len(points):
        return 0.0
    return float(np.any([survey.sees(source, points) for source in place.sources], axis=0).mean())


def _why_not(survey: Survey, place: Place, seeing: int, options: PlaceOptions) -> str:
    """Why a place is no scene; empty if it is one."""
    if seeing < options.num_source_views:
        return "too few views see the box"
    if len(place.targets) < options.num_target_views:
        return "too few views apart from the sources and covered by them"
    eyes = survey.eyes[[*place.sources, *place.targets]] - place.origin
    if not ((eyes >= options.aabb[0]) & (eyes <= options.aabb[1])).all():
        return "views stand outside of the box"
    return ""


SHARED = "between the splits"


def assign_splits(places: Sequence[Place], extent: float, fractions: Mapping[str, float]) -> None:
    """Gives each place that was not dropped its split: held-out ones are stretches of the path, as far from the ends of
    others as the box is wide; what lies between is dropped.

    Of all stretches with the wanted number of places the one is taken that leaves the most for training; a shorter one
    where that would leave none.

    Args:
        places: of one capture in the order of its path.
        extent: the box's width; places of two splits are at least so far apart in x or in y.
        fractions: share of the places by name of the held-out split.
    """
    used = [place for place in places if not place.dropped]
    for place in used:
        place.split = "train"
    centres = np.array([place.origin[:2] for place in used]).reshape(-1, 2)
    near = np.abs(centres[:, None] - centres).max(axis=-1) < extent
    free = np.ones(len(used), bool)
    for split, fraction in fractions.items():
        if fraction <= 0:
            continue
        stretch = _stretch(near, free, max(1, round(fraction * len(used))))
        if stretch is None:
            continue
        lost = near[stretch].any(axis=0) & free
        lost[stretch] = False
        for i in np.flatnonzero(lost):
            used[i].split, used[i].dropped = "", SHARED
        for i in range(stretch.start, stretch.stop):
            used[i].split = split
        free[stretch], free[lost] = False, False


def _stretch(near: Bool[np.ndarray, "places places"], free: Bool[np.ndarray, " places"], count: int) -> slice | None:
    """The stretch of free places, at most `count`, that leaves the most other free places far enough away."""
    for length in range(count, 0, -1):
        starts = [s for s in range(len(free) - length + 1) if free[s : s + length].all()]
        left = [int((free & ~near[s : s + length].any(axis=0)).sum()) for s in starts]
        if left and max(left) > 0:
            start = starts[int(np.argmax(left))]
            return slice(start, start + length)
    return None
