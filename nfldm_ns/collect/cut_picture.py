"""A capture from above: its surfaces, its path, and the boxes that it was cut into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nfldm_ns.collect.cutting import Aabb, Place, Survey
from nfldm_ns.scenes.writing import atomic_path

COLOURS = {"train": "#1f77b4", "val": "#e8a33d", "test": "#d62728"}
_DROPPED = "#777777"
_CELLS = 240  # of surfaces along the longer side
_TALLEST, _WIDEST = 9.0, 9.0


def write_plan(path: Path, survey: Survey, places: Sequence[Place], aabb: Aabb, title: str) -> None:
    """Writes a PNG: surfaces near the cameras' height darker where more of them are, the path with its beginning, the
    boxes in the colours of their splits, and a cross for each place that was dropped. North (y) is up; metres."""
    low, high = _limits(survey, places, aabb)
    width, height = np.maximum(high - low, 1e-3)
    scale = min(_WIDEST / width, _TALLEST / height)
    figure = Figure(figsize=(max(4.0, width * scale) + 0.8, max(3.0, height * scale) + 1.1), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_surfaces(axes, survey, low, high)
    for place in places:
        if place.split:
            _draw_box(axes, place, aabb)
    axes.plot(*survey.eyes[:, :2].T, color="black", linewidth=1.2, label="path")
    axes.plot(*survey.eyes[0, :2], marker="o", color="black", markersize=6, linestyle="", label="beginning")
    dropped = np.array([place.origin[:2] for place in places if place.dropped]).reshape(-1, 2)
    if len(dropped):
        axes.plot(*dropped.T, marker="x", color=_DROPPED, linestyle="", markersize=7, label="dropped place")
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal", xlabel="x (m)", ylabel="y (m)")
    axes.set_title(title, fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(list(unique.values()), list(unique), fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")


def _limits(survey: Survey, places: Sequence[Place], aabb: Aabb) -> tuple[np.ndarray, np.ndarray]:
    """Corners of all that is drawn: boxes and path, with a margin."""
    corners = [survey.eyes[:, :2].min(axis=0), survey.eyes[:, :2].max(axis=0)]
    corners += [place.origin[:2] + np.array(corner[:2]) for place in places for corner in aabb]
    margin = 0.05 * max(aabb[1][0] - aabb[0][0], 1e-3)
    return np.min(corners, axis=0) - margin, np.max(corners, axis=0) + margin


def _draw_surfaces(axes, survey: Survey, low: np.ndarray, high: np.ndarray) -> None:
    """How many surfaces are seen at each spot, without floors and ceilings as far as cameras' height tells those."""
    height = survey.camera_height()
    drops = survey.eyes[:, None, 2] - survey.points[:, :, 2]
    shown = survey.known & (np.abs(drops) < (np.inf if height is None else 0.8 * height))
    points = survey.points[shown][:, :2]
    cell = float((high - low).max()) / _CELLS
    bins = np.maximum(np.ceil((high - low) / cell).astype(int), 1)
    counts, *_ = np.histogram2d(points[:, 0], points[:, 1], bins=bins.tolist(), range=np.stack([low, high], axis=1))
    extent = (low[0], high[0], low[1], high[1])
    axes.imshow(np.log1p(counts).T, origin="lower", extent=extent, cmap="Greys", vmax=np.log1p(counts).max() * 1.3 or 1)


def _draw_box(axes, place: Place, aabb: Aabb) -> None:
    corner = place.origin[:2] + np.array(aabb[0][:2])
    size = np.array(aabb[1][:2]) - np.array(aabb[0][:2])
    colour = COLOURS[place.split]
    axes.add_patch(Rectangle(tuple(corner), *size, fill=False, edgecolor=colour, linewidth=0.8, alpha=0.7))
    axes.plot(*place.origin[:2], marker=".", color=colour, linestyle="", markersize=7, label=place.split)
