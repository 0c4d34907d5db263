"""Images of lenses that bend straight lines, made into those of a pinhole camera by OpenCV."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from nfldm_ns.errors import UserInputError

LARGEST_ZOOM = 4.0  # a lens that leaves less of the image, or has to invent more, is not meant
HALF = 0.5  # OpenCV counts from the middle of the first pixel, nerfstudio from its corner


def undistort(
    image: UInt8[np.ndarray, "height width 3"],
    depth: Float[np.ndarray, "height width"] | None,
    mask: Bool[np.ndarray, "height width"] | None,
    intrinsics: Float[np.ndarray, " 4"],
    distortion: tuple[float, ...],
    fisheye: bool,
    where: str,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, Float[np.ndarray, " 4"]]:
    """A pinhole camera's image of the same size, whose pixels have the same aspect, and all of which the given one saw.

    Args:
        depth: planar, of the image's size; never averaged.
        mask: False for pixels that are not of the scene; None if all are.
        intrinsics: fx, fy, cx, cy in pixels.
        distortion: k1, k2, k3, k4, p1, p2.
        where: what the image is, for the sentence.

    Returns:
        image, depth, mask, and the intrinsics of the pinhole camera. What the given one did not see is masked.

    Raises:
        UserInputError: if the lens makes no sense for an image of this size.
    """
    if not fisheye and not any(distortion):
        return image, depth, mask, intrinsics
    fx, fy, cx, cy = intrinsics
    matrix = np.array([[fx, 0, cx - HALF], [0, fy, cy - HALF], [0, 0, 1]])
    size = (image.shape[1], image.shape[0])
    k1, k2, k3, k4, p1, p2 = distortion
    try:
        if fisheye:
            lens = np.array([k1, k2, k3, k4])
            new = cv2.fisheye.estimateNewCameraMatrixForUndistortRectify(matrix, lens, size, np.eye(3), balance=0)
        else:
            lens = np.array([k1, k2, p1, p2, k3])
            new, _ = cv2.getOptimalNewCameraMatrix(matrix, lens, size, 0)
    except cv2.error as error:
        raise UserInputError(f"The lens of {where} cannot be undone ({error.err}): check its distortion.") from None
    new = _same_aspect(matrix, new)
    if not np.isfinite(new).all() or not 1 / LARGEST_ZOOM < new[0, 0] / fx < LARGEST_ZOOM:
        raise UserInputError(f"The lens of {where} cannot be undone: check its distortion and focal length.")
    if fisheye:
        across, down = cv2.fisheye.initUndistortRectifyMap(matrix, lens, np.eye(3), new, size, cv2.CV_32FC1)
    else:
        across, down = cv2.initUndistortRectifyMap(matrix, lens, np.eye(3), new, size, cv2.CV_32FC1)
    if (np.diff(across, axis=1) <= 0).any() or (np.diff(down, axis=0) <= 0).any():
        raise UserInputError(f"The lens of {where} cannot be undone, for it folds the image: check its distortion.")
    image = cv2.remap(image, across, down, interpolation=cv2.INTER_LINEAR)
    if depth is not None:
        depth = cv2.remap(depth.astype(np.float32), across, down, interpolation=cv2.INTER_NEAREST, borderValue=(0,))
    mask = undistorted_mask(np.ones(image.shape[:2], bool) if mask is None else mask, across, down)
    return image, depth, mask, np.array([new[0, 0], new[1, 1], new[0, 2] + HALF, new[1, 2] + HALF])


def undistorted_mask(
    mask: Bool[np.ndarray, "height width"],
    across: Float[np.ndarray, "height width"],
    down: Float[np.ndarray, "height width"],
) -> Bool[np.ndarray, "height width"] | None:
    """The nearest value at each place, False outside; masked a pixel wider, as colours are mixed of neighbours."""
    clear = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8))
    moved = cv2.remap(clear, across, down, interpolation=cv2.INTER_NEAREST, borderValue=(0,)) > 0
    return None if moved.all() else moved


def _same_aspect(matrix: Float[np.ndarray, "3 3"], new: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "3 3"]:
    """OpenCV zooms further into one axis than into the other; here both take the larger zoom."""
    zoom = max(new[0, 0] / matrix[0, 0], new[1, 1] / matrix[1, 1])
    return np.array([[matrix[0, 0] * zoom, 0, new[0, 2]], [0, matrix[1, 1] * zoom, new[1, 2]], [0, 0, 1.0]])
