"""Pictures of generated scenes on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from nfldm_ns.choice import evenly
from nfldm_ns.metrics.image_sets import read_picture
from nfldm_ns.reports.galleries import image_grid, strip

FEW, MANY = 4, 12


def contact_sheet(folders: Sequence[Path], views: int = 4) -> Image.Image:
    """A strip of views of each scene, spread over its sampled cameras; down the columns in the order given.

    Args:
        folders: of generated scenes.
        views: of each.
    """
    num_columns = 1 if len(folders) <= FEW else 2 if len(folders) <= MANY else 4
    num_rows = -(-len(folders) // num_columns)
    columns = {}
    for first in range(0, len(folders), num_rows):
        column = folders[first : first + num_rows]
        label = column[0].name if len(column) == 1 else f"{column[0].name} to {column[-1].name}"
        columns[label] = [_views_of(folder, views) for folder in column]
    return image_grid(columns, tile_size=1 if len(folders) > MANY else 96, gap=8)


def _views_of(folder: Path, views: int) -> Float[Tensor, "3 height total_width"]:
    return strip([read_picture(path) for path in evenly(sorted((folder / "images").glob("source_*.png")), views)])
