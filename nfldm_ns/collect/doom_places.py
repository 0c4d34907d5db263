"""Where a scene's cameras stand in a Doom map, and which places each split may use. Map units throughout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.spatial import cKDTree

from nfldm_ns.collect.doom_geometry import EYE_HEIGHT, MAX_STEP, PLAYER_HEIGHT, UNITS_PER_METRE, DoomGeometry
from nfldm_ns.collect.doom_wad import DoomMap

NUM_SOURCE_VIEWS = 8
_PLAYER_RADIUS = 16.0
_ROOM_TO_STAND = 22.0
_ATTEMPTS = 24
_NEAR_A_THING = 6.0


@dataclass(frozen=True)
class RigOptions:
    """How the cameras of one scene stand around its place; lengths in metres, angles in degrees."""

    num_target_views: int = 4
    """Held-back views per scene."""
    source_jitter: float = 0.3
    """Greatest distance of a source view from the place."""
    yaw_jitter: float = 4.0
    """Greatest deviation of a source view from its eighth of a turn."""
    target_distance: float = 1.5
    """Greatest distance of a target view from the place."""
    min_target_distance: float = 0.4
    """Least distance of a target view from the place."""


@dataclass(frozen=True)
class Rig:
    """Planned cameras of one scene: `[V, 3]` eyes and `[V]` angles in degrees, source views first, ordered by yaw."""

    eyes: Float[np.ndarray, "views 3"]
    angles: Float[np.ndarray, " views"]


def can_stand(geometry: DoomGeometry, points: Float[np.ndarray, "points 2"]) -> Bool[np.ndarray, " points"]:
    """Whether a player fits there: inside the map, under a high enough ceiling, clear of walls and ledges."""
    sectors = geometry.sector_at(points)
    headroom = geometry.ceiling[sectors] - geometry.floor[sectors]
    return (sectors >= 0) & (headroom >= PLAYER_HEIGHT) & (geometry.clearance(points) > _ROOM_TO_STAND)


def eyes_at(geometry: DoomGeometry, points: Float[np.ndarray, "points 2"]) -> Float[np.ndarray, "points 3"]:
    """Camera positions of players standing at these points: above the highest floor they touch."""
    reach = np.array([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)]) * (_PLAYER_RADIUS - 1)
    sectors = geometry.sector_at((points[:, None] + reach).reshape(-1, 2)).reshape(len(points), -1)
    floors = np.where(sectors >= 0, geometry.floor[sectors], -np.inf).max(axis=1)
    return np.concatenate([points, (floors + EYE_HEIGHT)[:, None]], axis=1)


def candidate_spots(
    doom_map: DoomMap, geometry: DoomGeometry, seed: Sequence[int], spacing: float, snap: float = 0.0
) -> Float[np.ndarray, "count 2"]:
    """Spots to try, in the order to try them.

    They lie on a randomly turned and shifted triangular lattice, so that no two are closer than `spacing` (metres) and
    each can be judged alone. Only spots near something that the map's author placed are kept: the rest is often out of
    the player's reach.

    Args:
        snap: side, in metres, of the squares to whose centres spots are moved; 0 leaves them. With a side of at most
            `spacing` / sqrt(2) none fall together; of those that do, one is kept.
    """
    rng = np.random.default_rng(seed)
    pitch = spacing * UNITS_PER_METRE
    reach = np.hypot(*(geometry.bounds[1] - geometry.bounds[0])) / 2 + pitch
    steps = np.arange(-int(1.2 * reach / pitch) - 1, int(1.2 * reach / pitch) + 2)
    row, column = np.meshgrid(steps, steps, indexing="ij")
    lattice = np.stack([column + 0.5 * (row % 2), row * np.sqrt(3) / 2], axis=-1).reshape(-1, 2) * pitch
    turn, shift = rng.uniform(0, np.pi), rng.uniform(-pitch, pitch, 2)
    lattice = lattice @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    lattice = lattice + geometry.bounds.mean(axis=0) + shift
    if snap:
        side = snap * UNITS_PER_METRE
        lattice = np.unique((np.floor(lattice / side) + 0.5) * side, axis=0)
    things = np.stack([doom_map.things["x"], doom_map.things["y"]], axis=-1).astype(np.float64)
    near = cKDTree(things).query(lattice)[0] < _NEAR_A_THING * UNITS_PER_METRE
    return rng.permutation(lattice[near])


def plan_rig(
    geometry: DoomGeometry, spot: Float[np.ndarray, " 2"], rng: np.random.Generator, options: RigOptions
) -> Rig | None:
    """Cameras of a scene at a spot, all in sight of it and on floors a step away at most; None if they do not fit."""
    if not can_stand(geometry, spot[None])[0]:
        return None
    place = eyes_at(geometry, spot[None])[0]
    near = _stations(geometry, place, rng, 0.0, options.source_jitter, NUM_SOURCE_VIEWS)
    away = _stations(
        geometry, place, rng, options.min_target_distance, options.target_distance, options.num_target_views
    )
    if near is None or away is None:
        return None
    step = 360 / NUM_SOURCE_VIEWS
    yaws = rng.uniform(0, step) + step * np.arange(NUM_SOURCE_VIEWS)
    yaws = yaws + rng.uniform(-options.yaw_jitter, options.yaw_jitter, NUM_SOURCE_VIEWS)
    target_yaws = rng.uniform(0, 360, options.num_target_views)
    return Rig(np.concatenate([near, away]), np.concatenate([yaws, target_yaws]) % 360)


def _stations(
    geometry: DoomGeometry, place: np.ndarray, rng: np.random.Generator, nearest: float, farthest: float, count: int
) -> Float[np.ndarray, "count 3"] | None:
    """Eyes of players around a place, distances in metres, uniform over the area; None if too few spots are free."""
    share = rng.uniform((nearest / farthest) ** 2, 1, _ATTEMPTS) ** 0.5
    angle = rng.uniform(0, 2 * np.pi, _ATTEMPTS)
    points = place[:2] + (farthest * UNITS_PER_METRE * share * np.stack([np.cos(angle), np.sin(angle)])).T
    points = points[can_stand(geometry, points)]
    if len(points) < count:
        return None
    eyes = eyes_at(geometry, points)
    eyes = eyes[(np.abs(eyes[:, 2] - place[2]) <= MAX_STEP) & geometry.sees(place, eyes)]
    return eyes[:count] if len(eyes) >= count else None


@dataclass(frozen=True)
class Region:
    """A square of held-out places: all within `radius` of the centre in x and in y."""

    centre: tuple[float, float]
    radius: float

    def distance(self, points: Float[np.ndarray, "points 2"]) -> Float[np.ndarray, " points"]:
        """How far outside of the region points lie, in x or in y, whichever is farther; negative inside."""
        return np.abs(points - self.centre).max(axis=-1) - self.radius


def hold_out_regions(
    spots: Float[np.ndarray, "points 2"], fractions: Mapping[str, float], gap: float
) -> dict[str, Region]:
    """Chooses a region for each held-out split of one map so that as many spots as possible remain for training.

    Args:
        spots: a sample of the map's places.
        fractions: share of the spots by name of the held-out split.
        gap: least distance in x or in y between places of two splits.
    """
    regions: dict[str, Region] = {}
    for name, fraction in fractions.items():
        free = spots[in_split(spots, "train", regions, gap)]
        if fraction <= 0 or not len(free):
            continue
        spread = np.abs(free[:, None] - free).max(axis=-1)
        radii = np.quantile(spread, min(1.0, fraction * len(spots) / len(free)), axis=1)
        remaining = (spread > (radii + gap)[:, None]).sum(axis=1)
        best = int(remaining.argmax())
        regions[name] = Region((float(free[best, 0]), float(free[best, 1])), float(radii[best]))
    return regions


def in_split(
    points: Float[np.ndarray, "points 2"], split: str, regions: Mapping[str, Region], gap: float
) -> Bool[np.ndarray, " points"]:
    """Whether places belong to a split: clear of the regions before its own by the gap, and inside its own.

    Training has no region of its own and keeps clear of all.
    """
    kept = np.ones(len(points), dtype=bool)
    for name, region in regions.items():
        if name == split:
            return kept & (region.distance(points) <= 0)
        kept &= region.distance(points) > gap
    return kept
