"""One scene from one spot of a Doom map: choosing its cameras, rendering, exact depth, judging, writing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8

from nfldm_ns.collect.doom_geometry import BEV_CLASSES, UNITS_PER_METRE, DoomGeometry
from nfldm_ns.collect.doom_places import NUM_SOURCE_VIEWS, Rig, RigOptions, plan_rig
from nfldm_ns.collect.doom_renderer import HALF_FOV_TANGENT, DoomRenderer, Frame
from nfldm_ns.collect.level_cameras import level_poses, share_inside
from nfldm_ns.scenes.views import Views, make_cameras
from nfldm_ns.scenes.writing import write_scene

_BUFFER_TOLERANCE = 6.0  # map units: the depth buffer's rounding and the shift of its sample from the pixel's centre
_BUFFER_RELATIVE_TOLERANCE = 0.02
_PREVIEW_SIZE = 16


@dataclass(frozen=True)
class PlaceFilter:
    """Which places are worth a scene; a place that fails one of these is left out."""

    min_brightness: float = 0.12
    """Least mean brightness of all views, in [0, 1]."""
    min_view_brightness: float = 0.04
    """Least mean brightness of each view, in [0, 1]."""
    min_depth: float = 2.0
    """Least median depth of all views, in metres."""
    min_view_depth: float = 0.7
    """Least median depth of each view, in metres: less means that it faces a wall."""
    min_inside: float = 0.6
    """Least share of pixels whose surface lies inside the box; sky is outside."""


@dataclass(frozen=True)
class SceneOptions:
    """All that decides what a scene looks like."""

    seed: int = 0
    image_size: int = 64
    aabb: tuple[tuple[float, ...], tuple[float, ...]] = ((-10.0, -10.0, -2.5), (10.0, 10.0, 4.0))
    near: float = 0.1
    far: float = 30.0
    bev_size: int = 64
    min_distance: float = 1.5
    snap: float = 0.0
    min_light: int = 0
    keep_sprites: bool = False
    rig: RigOptions = field(default_factory=RigOptions)
    accept: PlaceFilter = field(default_factory=PlaceFilter)


@dataclass(frozen=True)
class Shot:
    """Rendered views of one place: `[V]` frames, `[V, S, S]` exact planar depth in metres."""

    frames: list[Frame]
    depths: Float[np.ndarray, "views size size"]

    @property
    def images(self) -> UInt8[np.ndarray, "views size size 3"]:
        return np.stack([frame.image for frame in self.frames])

    @property
    def rig(self) -> Rig:
        return Rig(np.stack([f.eye for f in self.frames]), np.array([f.angle for f in self.frames]))


class SceneMaker:
    """Makes scenes of one map.

    Args:
        name: such as `freedoom1/E1M1`.
        renderer: open on a WAD that has this map.
    """

    def __init__(self, name: str, geometry: DoomGeometry, renderer: DoomRenderer, options: SceneOptions) -> None:
        self.name, self.geometry, self.options = name, geometry, options
        self._renderer = renderer
        self._aabb = np.array(options.aabb)

    def make(self, folder: Path, spot: Float[np.ndarray, " 2"], seed: list[int]) -> bool:
        """Writes the scene at a spot, or nothing if the place is not worth it. The seed decides all that is random."""
        rng = np.random.default_rng(seed)
        rig = plan_rig(self.geometry, spot, rng, self.options.rig)
        if rig is None or not self._is_open(rig, self._cast(rig, _PREVIEW_SIZE)):
            return False
        shot = self._shoot(rig, int(rng.integers(2**31)))
        if shot is None or not self._is_open(shot.rig, shot.depths):
            return False
        if shot.images.mean() / 255 < self.options.accept.min_brightness:
            return False
        self._write(folder, shot)
        return True

    def _cast(self, rig: Rig, size: int) -> Float[np.ndarray, "views size size"]:
        far = 1.5 * self.options.far * UNITS_PER_METRE
        return self.geometry.cast(rig.eyes, rig.angles, size, HALF_FOV_TANGENT, far) / UNITS_PER_METRE

    def _is_open(self, rig: Rig, depths: Float[np.ndarray, "views size size"]) -> bool:
        accept = self.options.accept
        if np.median(depths, axis=(1, 2)).min() < accept.min_view_depth or np.median(depths) < accept.min_depth:
            return False
        eyes = (rig.eyes - rig.eyes[:NUM_SOURCE_VIEWS].mean(axis=0)) / UNITS_PER_METRE
        return share_inside(depths, level_poses(eyes, rig.angles), self._aabb, HALF_FOV_TANGENT) >= accept.min_inside

    def _shoot(self, rig: Rig, seed: int) -> Shot | None:
        """Renders all views; None if one of them cannot be taken as planned or is dark."""
        self._renderer.start(self.name.split("/")[1], seed)
        frames = []
        for eye, angle in zip(rig.eyes, rig.angles, strict=True):
            frame = self._renderer.render(eye[0], eye[1], angle)
            if frame is None or abs(frame.eye[2] - eye[2]) > 1:
                return None
            if frame.image.mean() / 255 < self.options.accept.min_view_brightness:
                return None
            frames.append(frame)
        shot = Shot(frames, np.stack([frame.depth for frame in frames]) / UNITS_PER_METRE)
        return Shot(frames, refine_depth(self._cast(shot.rig, self.options.image_size), shot.depths))

    def _write(self, folder: Path, shot: Shot) -> None:
        options, rig, size = self.options, shot.rig, self.options.image_size
        centre = rig.eyes[:NUM_SOURCE_VIEWS].mean(axis=0)
        bev = self.geometry.bev(centre, self._aabb[:, :2] * UNITS_PER_METRE, options.bev_size)
        poses = level_poses((rig.eyes - centre) / UNITS_PER_METRE, rig.angles)
        depths = np.where((shot.depths >= options.near) & (shot.depths <= options.far), shot.depths, 0)
        focal, middle = size / 2 / HALF_FOV_TANGENT, size / 2
        views = Views(
            make_cameras(torch.from_numpy(poses), focal, focal, middle, middle, size, size),
            torch.from_numpy(shot.images).permute(0, 3, 1, 2).float() / 255,
            torch.from_numpy(depths).float()[:, None],
        )
        place = {"map": self.name, "origin": (centre / UNITS_PER_METRE).tolist()}
        source, target = slice(None, NUM_SOURCE_VIEWS), slice(NUM_SOURCE_VIEWS, None)
        write_scene(folder, views[source], views[target], bev, BEV_CLASSES, {"place": place})


def refine_depth(
    exact: Float[np.ndarray, "*shape"], buffer: Float[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    """The ray cast's depth where it agrees with the render's coarse buffer, the buffer's elsewhere; metres.

    The ray cast knows walls, floors and ceilings exactly; the buffer alone knows sprites and gratings.
    """
    with np.errstate(invalid="ignore"):
        agree = np.abs(exact - buffer) < _BUFFER_TOLERANCE / UNITS_PER_METRE + _BUFFER_RELATIVE_TOLERANCE * buffer
    return np.where(agree, exact, buffer)
