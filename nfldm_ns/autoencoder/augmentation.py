"""Differentiable augmentation of what a discriminator sees (DiffAugment, Zhao et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

AugmentPolicy = Literal["color", "translation", "cutout"]
MAX_SHIFT = 1 / 8  # of the image's size
CUTOUT_SIZE = 1 / 2

Images = Float[Tensor, "batch 3 height width"]


def augment(images: Images, policies: Sequence[AugmentPolicy]) -> Images:
    """Images changed at random, each with draws of its own; differentiable.

    Args:
        images: in [-1, 1]; 0 (grey) fills what translation and cutout leave empty. Colours may leave the range.
        policies: "color" (brightness, saturation and contrast), "translation" (by up to an eighth of the size) and
            "cutout" (a square of half the size), applied in that order whatever theirs.

    Raises:
        ValueError: for an unknown policy.
    """
    if unknown := set(policies) - {"color", "translation", "cutout"}:
        raise ValueError(f"unknown augmentations {sorted(unknown)}")
    batch, _, height, width = images.shape
    if "color" in policies:
        brightness, saturation, contrast = torch.rand(3, batch)
        images = recolor(images, brightness - 0.5, 2 * saturation, contrast + 0.5)
    if "translation" in policies:
        images = translate(images, _integers((height, width), MAX_SHIFT, batch))
    if "cutout" in policies:
        size = (round(height * CUTOUT_SIZE), round(width * CUTOUT_SIZE))
        centres = torch.stack([torch.randint(0, length, (batch,)) for length in (height, width)], dim=1)
        images = cut_out(images, centres, size)
    return images


def _integers(lengths: tuple[int, int], share: float, batch: int) -> Int[Tensor, "batch 2"]:
    """Numbers of pixels between plus and minus a share of the lengths."""
    limits = [round(length * share) for length in lengths]
    return torch.stack([torch.randint(-limit, limit + 1, (batch,)) for limit in limits], dim=1)


def recolor(
    images: Images,
    brightness: Float[Tensor, " batch"],
    saturation: Float[Tensor, " batch"],
    contrast: Float[Tensor, " batch"],
) -> Images:
    """Adds `brightness`, then scales the distance of colours from their grey and from the image's mean."""
    brightness, saturation, contrast = (
        values.to(images)[:, None, None, None] for values in (brightness, saturation, contrast)
    )
    images = images + brightness
    grey = images.mean(dim=1, keepdim=True)
    images = grey + saturation * (images - grey)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + contrast * (images - mean)


def translate(images: Images, shifts: Int[Tensor, "batch 2"]) -> Images:
    """Moves each image by its `(rows, columns)`, down and to the right; what comes in is 0."""
    height, width = images.shape[-2:]
    rows, columns = (int(limit) for limit in shifts.abs().amax(dim=0))
    padded = F.pad(images, (columns, columns, rows, rows))
    moved = [
        image[:, rows - down : rows - down + height, columns - right : columns - right + width]
        for image, (down, right) in zip(padded, shifts.tolist(), strict=True)
    ]
    return torch.stack(moved)


def cut_out(images: Images, centres: Int[Tensor, "batch 2"], size: tuple[int, int]) -> Images:
    """Sets a rectangle of `size` (rows, columns) around each image's centre (row, column) to 0."""
    inside = []
    for axis, (length, extent) in enumerate(zip(images.shape[-2:], size, strict=True)):
        first = centres[:, axis, None] - extent // 2
        positions = torch.arange(length)
        inside.append((positions >= first) & (positions < first + extent))
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images * (~hole).to(images)
