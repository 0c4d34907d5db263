"""CARLA's numbers as ours: depths, intrinsics and poses. Nothing here needs CARLA.

CARLA's world is Unreal's: left-handed, x forward, y to the right, z up, in metres; yaw turns from x to y, pitch lifts
the nose, roll leans to the right, all in degrees.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, UInt8

FAR_M = 1000.0
"""What the largest number of the depth camera stands for: its far plane."""
_MIRROR = np.diag([1.0, -1.0, 1.0, 1.0])
# Columns: the camera's right, up and back in its own axes forward, left, up.
_OPENGL = np.array([[0.0, 0, -1], [-1, 0, 0], [0, 1, 0]])


def depth_of_bgra(pixels: UInt8[np.ndarray, "height width 4"]) -> Float[np.ndarray, "height width"]:
    """Planar depth in metres of a picture of `sensor.camera.depth`; 0 (unknown) at its far plane, as for the sky.

    Red, green and blue are the bytes of a 24-bit number, the lowest first, of which the largest is `FAR_M`.
    """
    blue, green, red = (pixels[..., i].astype(np.float64) for i in range(3))
    share = (red + 256 * green + 65536 * blue) / (256**3 - 1)
    return np.where(share < 0.999, FAR_M * share, 0)


def rgb_of_bgra(pixels: UInt8[np.ndarray, "height width 4"]) -> UInt8[np.ndarray, "height width 3"]:
    """Colours of a picture of `sensor.camera.rgb`."""
    return np.ascontiguousarray(pixels[..., 2::-1])


def focal_length(fov: float, width: int) -> float:
    """In pixels, of a camera whose horizontal field of view is so many degrees; its pixels are square."""
    return width / 2 / math.tan(math.radians(fov) / 2)


def pose_of_transform(matrix: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "3 4"]:
    """OpenGL camera-to-world, right-handed with z up, of a camera's `carla.Transform.get_matrix()`."""
    turned = _MIRROR @ matrix @ _MIRROR
    return np.concatenate([turned[:3, :3] @ _OPENGL, turned[:3, 3:]], axis=1)


def unreal_yaw(angle: float) -> float:
    """CARLA's yaw, in degrees, of a camera that looks along `angle` in our world (degrees from x to y)."""
    return -angle
