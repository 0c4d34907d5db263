"""Dense depth of single images by a pretrained network, brought to the scale of sparse depths that are known."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from nfldm_ns.errors import UserInputError

MIN_POINTS = 12  # fewer do not tell scale and shift from outliers
_ROUNDS = 20
_BEYOND = 1.5  # times the farthest point: the network's guess of what is farther is not measured by anything
_Predict = Callable[[Image.Image], Float[np.ndarray, "height width"]]


def completed_depth(
    image: Image.Image, sparse: Float[np.ndarray, "height width"], model: str
) -> Float[np.ndarray, "height width"]:
    """Depth of every pixel that a network can tell, aligned to sparse depths; these stay as they are.

    Networks give depth, or its inverse, up to scale and shift; whichever fits the points better is taken.

    Args:
        image: RGB, of the same view as `sparse`, of any size.
        sparse: planar depth in metres, 0 where unknown.
        model: name or folder of a model of transformers for `AutoModelForDepthEstimation`.

    Returns:
        Planar depth, 0 where unknown; `sparse` itself where it has fewer than `MIN_POINTS` points.

    Raises:
        UserInputError: if the model cannot be loaded.
    """
    known = sparse > 0
    if known.sum() < MIN_POINTS:
        return sparse
    guess = torch.from_numpy(load_predictor(model)(image).astype(np.float32))[None, None]
    guess = torch.nn.functional.interpolate(guess, sparse.shape, mode="bilinear", align_corners=False)
    aligned = aligned_depth(guess[0, 0].double().numpy(), sparse)
    return sparse if aligned is None else np.where(known, sparse, aligned)


def aligned_depth(
    guess: Float[np.ndarray, "height width"], sparse: Float[np.ndarray, "height width"]
) -> Float[np.ndarray, "height width"] | None:
    """A guess, taken for depth or for inverse depth, whichever fits better, scaled and shifted onto the known depths.

    Returns:
        Depth, 0 where it would be negative or far beyond all that is known; None if the guess has nothing in common
        with the known depths.
    """
    known = sparse > 0
    x, depth = guess[known], sparse[known]
    farthest = _BEYOND * float(depth.max())
    best, least = None, np.inf
    for inverse in (False, True):
        line = robust_line(x, 1 / depth if inverse else depth)
        if line is None:
            continue
        values = line[0] * guess + line[1]
        with np.errstate(divide="ignore"):
            values = np.where(values > 0, 1 / values if inverse else values, 0)
        error = float(np.median(np.abs(values[known] - depth) / depth))
        if error < least:
            best, least = np.where(np.isfinite(values) & (values <= farthest), values, 0), error
    return best


def robust_line(x: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"]) -> tuple[float, float] | None:
    """Scale and shift of the line with the least absolute deviations, by reweighted least squares.

    Returns:
        None if the line does not rise, or x is constant.
    """
    if len(x) < 2 or np.ptp(x) <= 1e-9 * max(1.0, float(np.abs(x).max())):
        return None
    matrix = np.stack([x, np.ones_like(x)], axis=1)
    weights = np.ones_like(y)
    floor = 1e-4 * float(np.abs(y).mean())
    scale, shift = 0.0, 0.0
    for _ in range(_ROUNDS):
        root = np.sqrt(weights)[:, None]
        scale, shift = np.linalg.lstsq(matrix * root, y * root[:, 0], rcond=None)[0].tolist()
        weights = 1 / np.maximum(np.abs(scale * x + shift - y), floor)
    return (scale, shift) if scale > 0 else None


@lru_cache(maxsize=1)
def load_predictor(model: str) -> _Predict:
    """A function from an image to the network's depth or inverse depth, in its own units and size.

    Raises:
        UserInputError: if there is no such model, it is for another task, or transformers is missing.
    """
    try:
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        processor = AutoImageProcessor.from_pretrained(model)
        network = AutoModelForDepthEstimation.from_pretrained(model).eval()
    except ImportError as error:
        raise UserInputError(
            f"The depth model {model} needs a package that is not installed ({error}): install it, or leave "
            "--monocular-depth out."
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # no such folder, no hub, another kind of model
        reason = str(error).strip().splitlines()
        raise UserInputError(
            f"The depth model {model} cannot be loaded ({reason[0] if reason else type(error).__name__}): give the "
            "folder or the name of a depth estimation model of transformers."
        ) from None

    @torch.no_grad()
    def predict(image: Image.Image) -> Float[np.ndarray, "height width"]:
        inputs = processor(images=image, return_tensors="pt")
        return network(**inputs).predicted_depth[0].double().numpy()

    return predict
