"""Pictures of scenes side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from nerfstudio.cameras.cameras import Cameras
from PIL import Image, ImageDraw

from nfldm_ns.scenes.collection import BevClass, Scene, SceneCollection
from nfldm_ns.scenes.views import view_yaws
from nfldm_ns.scenes.writing import atomic_path

_MARGIN = 2
_LABEL_HEIGHT = 14
_LABEL_WIDTH = 150
_MAX_SOURCE, _MAX_TARGET, _MAX_DEPTH = 8, 2, 3


def to_uint8(image: Float[np.ndarray, "3 height width"]) -> UInt8[np.ndarray, "height width 3"]:
    """An image in [0, 1], channels first, as 8 bit, channels last."""
    return (np.clip(np.asarray(image), 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)


def colour_depth(
    depth: Float[np.ndarray, "height width"], near: float, far: float, colormap: str = "turbo"
) -> UInt8[np.ndarray, "height width 3"]:
    """Depth in false colours, logarithmic from near (red) to far (blue), in metres; unknown (0) is black."""
    depth = np.asarray(depth)
    nearness = np.log(far / np.maximum(depth, 1e-6)) / np.log(far / near)
    colours = matplotlib.colormaps[colormap](np.clip(nearness, 0, 1))[..., :3]
    return np.where(depth[..., None] > 0, (colours * 255).round(), 0).astype(np.uint8)


def colour_bev(bev: UInt8[np.ndarray, "height width"], classes: Sequence[BevClass]) -> UInt8[np.ndarray, "h w 3"]:
    """A bird's-eye-view map in the colours of its classes."""
    palette = np.zeros((256, 3), np.uint8)
    for bev_class in classes:
        palette[bev_class.id] = bev_class.color
    return palette[bev]


def image_grid(
    rows: Sequence[Sequence[UInt8[np.ndarray, "height width 3"]]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    cell: int = 96,
) -> Image.Image:
    """Images in rows; each is scaled to `cell` pixels of height, keeping its aspect.

    Args:
        row_labels: one for each row, written at its left, or none.
        column_labels: one for each column of the first row, written above, or none.
    """
    scaled = [[_scale(image, cell) for image in row] for row in rows]
    left, top = (_LABEL_WIDTH if row_labels else 0), (_LABEL_HEIGHT if column_labels else 0)
    width = left + max((sum(image.width + _MARGIN for image in row) for row in scaled), default=0)
    sheet = Image.new("RGB", (width, top + len(scaled) * (cell + _MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(scaled):
        x, y = left, top + r * (cell + _MARGIN)
        if row_labels:
            draw.text((2, y + cell // 2 - 6), row_labels[r], fill="black")
        for c, image in enumerate(row):
            if r == 0 and c < len(column_labels):
                draw.text((x + 2, 1), column_labels[c], fill="black")
            sheet.paste(image, (x, y))
            x += image.width + _MARGIN
    return sheet


def _scale(image: UInt8[np.ndarray, "height width 3"], height: int) -> Image.Image:
    width = max(1, round(image.shape[1] * height / image.shape[0]))
    method = Image.Resampling.NEAREST if height >= image.shape[0] else Image.Resampling.BOX
    return Image.fromarray(np.ascontiguousarray(image)).resize((width, height), method)


def scene_row(collection: SceneCollection, scene: Scene) -> tuple[list[np.ndarray], list[str]]:
    """Pictures of one scene and what they are: source views, target views, depth of the first sources, BEV map."""
    sources, targets = scene.source.images.numpy(), scene.target.images.numpy()
    pictures = [to_uint8(image) for image in (*sources[:_MAX_SOURCE], *targets[:_MAX_TARGET])]
    labels = [f"source {i}" for i in range(len(sources[:_MAX_SOURCE]))]
    labels += [f"target {i}" for i in range(len(targets[:_MAX_TARGET]))]
    if scene.source.depths is not None:
        depths = scene.source.depths[:_MAX_DEPTH, 0].numpy()
        pictures += [colour_depth(depth, max(collection.near, 0.5), collection.far) for depth in depths]
        labels += [f"depth {i}" for i in range(len(depths))]
    if scene.bev is not None:
        pictures.append(colour_bev(scene.bev, collection.bev_classes))
        labels.append("BEV")
    return pictures, labels


def panorama_order(cameras: Cameras) -> list[int]:
    """Indices of cameras `[N]` from left to right, in a panorama whose middle is the direction of the first one."""
    behind = math.pi - 1e-3  # so that a camera straight behind is always at the left
    turn = (view_yaws(cameras) - view_yaws(cameras)[0] + behind).remainder(2 * math.pi)
    return turn.argsort(descending=True).tolist()


def write_panoramas(
    collection: SceneCollection, path: Path, num_views: int = 6, num_scenes: int = 8, cell: int = 128
) -> None:
    """Writes a PNG of scenes taken evenly from all splits: their first source views all around, depths, and map."""
    named = [(split, scene_id) for split, ids in collection.splits.items() for scene_id in ids]
    rows, labels = [], []
    for i in np.linspace(0, len(named) - 1, min(num_scenes, len(named))).round().astype(int):
        split, scene_id = named[i]
        scene = collection.load_scene(scene_id)
        views = scene.source[: min(num_views, scene.source.shape[0])]
        order = panorama_order(views.cameras)
        rows.append([to_uint8(views.images[k].numpy()) for k in order])
        labels.append(f"{scene_id}\n{split}")
        if scene.bev is not None:
            rows[-1].append(colour_bev(scene.bev, collection.bev_classes))
        if views.depths is not None:
            rows.append([colour_depth(views.depths[k, 0].numpy(), collection.near, collection.far) for k in order])
            labels.append("depth")
    sheet = image_grid(rows, labels, cell=cell)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def write_contact_sheet(collection: SceneCollection, path: Path, num_scenes: int = 16, cell: int = 72) -> None:
    """Writes a PNG of scenes taken evenly from all splits, one row each."""
    named = [(split, scene_id) for split, ids in collection.splits.items() for scene_id in ids]
    chosen = [named[i] for i in np.linspace(0, len(named) - 1, min(num_scenes, len(named))).round().astype(int)]
    rows = [scene_row(collection, collection.load_scene(scene_id)) for _, scene_id in chosen]
    sheet = image_grid(
        [pictures for pictures, _ in rows], [f"{scene_id}\n{split}" for split, scene_id in chosen], rows[0][1], cell
    )
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
