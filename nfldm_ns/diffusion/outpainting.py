"""Denoisers that are told a part of the scene: what is known of c and f in training, and in sampling.

An outpainter sees the known part of its latent, free of noise, and which cells it has, as further channels beside the
noisy sample (as Palette does for images, Saharia et al. 2022). A share of its training scenes has no known part, so
that one model samples whole scenes, too. The loss is that of the other cells: sampling puts what is known in its place,
and repeating it would be most of what is learned.

The parts are those that are asked for: windows of a world have neighbours on a side, on two adjacent ones, or at a
corner (`sampling/worlds.py`), and edits keep everything but a box (`editing/resampling.py`). They are whole cells of
c; f is known in all columns of these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

Kind: TypeAlias = Literal["side", "corner", "l_shape", "all_but_a_box"]
KINDS: tuple[Kind, ...] = ("side", "corner", "l_shape", "all_but_a_box")


def draw_known_cells(
    size: tuple[int, int], generator: torch.Generator, kind: Kind | None = None
) -> Bool[Tensor, "rows columns"]:
    """Cells that are known, of which there is at least one, as is of others.

    - side: a band along one side.
    - corner: a rectangle in one corner.
    - l_shape: bands along two adjacent sides.
    - all_but_a_box: everything but a rectangle anywhere.

    Each band or rectangle is from one cell to all but one wide, evenly.

    Args:
        size: rows and columns, both at least 2.
        kind: one of `KINDS`; None for any of them, equally often.
    """
    rows, columns = size

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    kind = KINDS[whole(0, len(KINDS))] if kind is None else kind
    height, width = whole(1, rows), whole(1, columns)
    known = torch.zeros(rows, columns, dtype=torch.bool)
    if kind == "all_but_a_box":
        top, left = whole(0, rows - height + 1), whole(0, columns - width + 1)
        known[top : top + height, left : left + width] = True
        return ~known
    flips = [axis for axis in (0, 1) if whole(0, 2)]
    if kind == "corner":
        known[:height, :width] = True
    elif kind == "l_shape":
        known[:height] = True
        known[:, :width] = True
    elif whole(0, 2):
        known[:height] = True
    else:
        known[:, :width] = True
    return known.flip(flips)


def drawn_for(size: tuple[int, int], share: float) -> Callable[[torch.Generator], Bool[Tensor, "rows columns"]]:
    """Draws the known cells of one training scene, of which `share` have any.

    Args:
        size: rows and columns of c.
    """

    def draw(generator: torch.Generator) -> Bool[Tensor, "rows columns"]:
        told = float(torch.rand((), generator=generator)) < share
        return draw_known_cells(size, generator) if told else torch.zeros(size, dtype=torch.bool)

    return draw


def to_columns(cells: Bool[Tensor, "*batch rows columns"], scale: int) -> Bool[Tensor, "*batch y x"]:
    """Cells of c as columns of f, `scale` per axis."""
    return cells.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
