"""Captures as their readers give them: posed frames with lenses, before they become scenes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import BevClass

Points = Float[np.ndarray, "points 3"]


@dataclass(frozen=True)
class Lens:
    """How a frame's pixels look into the world.

    Attributes:
        fisheye: of OpenCV's fisheye model, else of its perspective one.
        distortion: k1, k2, k3, k4, p1, p2, as nerfstudio orders them.
        size: (width, height) in pixels that the others are for; None: of the image.
        focal: (fx, fy) in pixels; None where only angles are known.
        centre: (cx, cy) in pixels; None: the middle of the image.
        angles: fields of view (x, y) in radians, for where there is no focal length.
        radius: pixels from the centre beyond which the lens shows nothing; None: it fills the image.
    """

    fisheye: bool
    distortion: tuple[float, ...]
    size: tuple[float, float] | None
    focal: tuple[float, float] | None
    centre: tuple[float, float] | None
    angles: tuple[float | None, float | None]
    radius: float | None = None

    def intrinsics(self, size: tuple[int, int], where: str) -> Float[np.ndarray, " 4"]:
        """fx, fy, cx, cy in pixels of an image of this (width, height).

        Raises:
            UserInputError: if the image is not the one that the numbers are for, made smaller or larger as a whole.
        """
        scale = self._scale(size)
        if self.size is not None:
            error = max(abs(given * scale - found) for given, found in zip(self.size, size, strict=True))
            if error > 1:
                raise UserInputError(
                    f"{where} is {size[0]} x {size[1]} pixels, but its intrinsics are for {self.size[0]:g} x "
                    f"{self.size[1]:g}, another aspect: is it turned or cropped? Give w, h and intrinsics that fit it."
                )
        if self.focal is not None:
            fx, fy = (value * scale for value in self.focal)
        else:
            fx, fy = self._focal_from_angles(size)
        return np.array([fx, fy, *self._centre(size)])

    def seen(self, size: tuple[int, int]) -> Bool[np.ndarray, "height width"] | None:
        """Which pixels of an image of this (width, height) lie within `radius`; None for all."""
        if self.radius is None:
            return None
        cx, cy = self._centre(size)
        rows, columns = np.mgrid[: size[1], : size[0]] + 0.5
        return np.hypot(columns - cx, rows - cy) <= self.radius * self._scale(size)

    def _scale(self, size: tuple[int, int]) -> float:
        return 1.0 if self.size is None else max(size) / max(self.size)

    def _centre(self, size: tuple[int, int]) -> tuple[float, float]:
        if self.centre is None:
            return size[0] / 2, size[1] / 2
        return self.centre[0] * self._scale(size), self.centre[1] * self._scale(size)

    def _focal_from_angles(self, size: tuple[int, int]) -> tuple[float, float]:
        """Square pixels where one angle is given."""
        found = [n / 2 / math.tan(angle / 2) for n, angle in zip(size, self.angles, strict=True) if angle is not None]
        return found[0], found[-1]


@dataclass(frozen=True)
class CapturedFrame:
    """One frame.

    Attributes:
        name: what its format calls it.
        image, depth, mask: files; no depth or mask is None.
        pose: camera-to-world of OpenGL, `[3, 4]`, in the file's units.
        depth_unit: units per unit of the depth file, where the capture says so.
        depth_lens: of the depth file, where it is another camera's at the same place; None: that of the image.
        coarse_depth: whether 8 bits will do for the depth file.
        depth_size: (width, height) of the depth file, where it does not say so itself.
        camera: of several that move together, which of them.
        points: sparse depth in place of a file: points that the image sees, in the file's units, by the camera's axes
            of OpenCV (x right, y down, z forward); or a function of no arguments that reads them, where there are many.
    """

    name: str
    image: Path
    depth: Path | None
    mask: Path | None
    pose: Float[np.ndarray, "3 4"]
    lens: Lens
    depth_unit: float | None = None
    depth_lens: Lens | None = None
    coarse_depth: bool = False
    points: Points | Callable[[], Points] | None = None
    depth_size: tuple[int, int] | None = None
    camera: str = ""

    @property
    def has_depth(self) -> bool:
        return self.depth is not None or self.points is not None

    def read_points(self) -> Points:
        """The points themselves; none where there are none."""
        if self.points is None:
            return np.zeros((0, 3))
        return self.points() if callable(self.points) else self.points


@dataclass(frozen=True)
class GroundMap:
    """What the ground of a capture's world is, for semantic maps from above.

    Attributes:
        classes: all that `draw` may give.
        draw: class ids `[size, size]`, north up, of a square in x and y: its minimum and maximum corner `[2, 2]` in the
            capture's world and units, and the number of cells a side. Its world must have z up.
    """

    classes: tuple[BevClass, ...]
    draw: Callable[[Float[np.ndarray, "2 2"], int], UInt8[np.ndarray, "size size"]]


@dataclass(frozen=True)
class Capture:
    """A capture's checked description, whatever format it was in.

    Attributes:
        file: what describes the capture, for sentences.
        splits: frames by `train`, `val` and `test`, as indices; empty where the file does not say.
        units: the capture's own units per unit of its poses, as of an `applied_scale` that is to be undone.
        unread: keys that are not known, which somebody may have meant.
        notes: what was left out, for people.
        ground: maps of the ground, where the format has them.
    """

    folder: Path
    frames: list[CapturedFrame]
    file: Path
    splits: dict[str, list[int]] = field(default_factory=lambda: {"train": [], "val": [], "test": []})
    units: float = 1.0
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    ground: GroundMap | None = None
