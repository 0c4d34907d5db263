"""Semantic maps that a user drew, in the palette of a collection."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import BevClass
from nfldm_ns.scenes.image_files import open_image

MODES = ("P", "RGB", "RGBA")


def palette_text(classes: Sequence[BevClass]) -> str:
    """Names and colours of classes, for people."""
    return ", ".join(f"{c.name} {tuple(c.color)}" for c in classes)


def read_drawn_map(
    path: Path | str, classes: Sequence[BevClass], size: tuple[int, int]
) -> UInt8[np.ndarray, "height width"]:
    """Class ids of a map, north up, by the colours of its pixels: paint programs may order a palette as they like.

    Args:
        path: an image in colours or with a palette, without transparency.
        classes: the colours that are allowed.
        size: (height, width) that it has to have.

    Raises:
        UserInputError: if it is of another mode or size, or the first pixel that is of no class.
    """
    path = Path(path)
    return drawn_map(_open(path), path, classes, size)


def drawn_map(
    image: Image.Image, path: Path | str, classes: Sequence[BevClass], size: tuple[int, int]
) -> UInt8[np.ndarray, "height width"]:
    """`read_drawn_map` of an image that is open; `path` names it in messages."""
    if image.mode not in MODES:
        raise UserInputError(
            f"{path} has mode {image.mode}, but a map is an RGB or palette image: save it in colours, with "
            f"{palette_text(classes)}."
        )
    height, width = size
    if image.size != (width, height):
        raise UserInputError(
            f"{path} is {image.width} x {image.height} pixels, but the generator's maps are {width} x {height}: resize "
            "it without smoothing."
        )
    pixels = np.asarray(image.convert("RGBA"))
    bev = np.full((height, width), -1)
    for bev_class in reversed(classes):
        bev[(pixels == (*bev_class.color, 255)).all(axis=-1)] = bev_class.id
    if (bev < 0).any():
        row, column = (int(n) for n in np.argwhere(bev < 0)[0])
        *colour, alpha = (int(n) for n in pixels[row, column])
        found = f"has the colour {tuple(colour)}" if alpha == 255 else "is transparent"
        raise UserInputError(
            f"The pixel in column {column}, row {row} of {path} (from 0, at the top left) {found}, which is no class: "
            f"paint without smoothing, with {palette_text(classes)}."
        )
    return bev.astype(np.uint8)


def _open(path: Path) -> Image.Image:
    if not path.is_file():
        raise UserInputError(f"There is no map {path}: fix the path.")
    return open_image(path, "save it again, as PNG")
