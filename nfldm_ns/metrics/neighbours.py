"""What nearest neighbours tell of two sets: precision, recall, density, coverage, and whether one copies the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

ROWS_AT_ONCE = 512
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
COPY_RATIO = 0.5
CANDIDATES = 4

Features = Float[Tensor, "images features"]


# Fidelity and variety


def _distances(rows: Features, columns: Features) -> Iterator[tuple[slice, Float[Tensor, "rows columns"]]]:
    """Euclidean distances, some rows at a time, so that memory grows with one set only."""
    for first in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(first, min(first + ROWS_AT_ONCE, len(rows)))
        yield part, torch.cdist(rows[part].double(), columns.double())


def neighbour_radii(features: Features, k: int) -> Float[Tensor, " images"]:
    """Distance of each point to its k-th nearest neighbour in the same set, itself not counted."""
    if not 1 <= k < len(features):
        raise ValueError(f"k must be from 1 to {len(features) - 1} for {len(features)} images, not {k}")
    radii = torch.empty(len(features), dtype=torch.float64)
    for part, distances in _distances(features, features):
        own = torch.arange(part.start, part.stop)
        distances[torch.arange(len(own)), own] = torch.inf
        radii[part] = distances.kthvalue(k, dim=1).values
    return radii


def precision_recall(real: Features, fake: Features, k: int = 3) -> dict[str, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019).

    `precision` is the share of fake points inside the manifold of the real ones, which is the union of balls that
    reach from each point to its k-th neighbour; `recall` the share of real points inside that of the fake ones.
    """
    real_radii, fake_radii = neighbour_radii(real, k), neighbour_radii(fake, k)
    covered = torch.zeros(len(fake), dtype=torch.bool)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    for part, distances in _distances(real, fake):
        covered |= (distances <= real_radii[part, None]).any(dim=0)
        recalled[part] = (distances <= fake_radii).any(dim=1)
    return {"precision": float(covered.double().mean()), "recall": float(recalled.double().mean())}


def density_coverage(real: Features, fake: Features, k: int = 5) -> dict[str, float]:
    """Density and coverage (Naeem et al. 2020).

    `density` is the mean number of real balls that a fake point lies in, divided by k: 1 is expected for equal
    distributions, and more is possible. `coverage` is the share of real balls that hold a fake point; equal
    distributions and large sets of one size reach 1 - 2^-k.
    """
    radii = neighbour_radii(real, k)
    inside, held = 0, 0
    for part, distances in _distances(real, fake):
        hits = distances <= radii[part, None]
        inside += int(hits.sum())
        held += int(hits.any(dim=1).sum())
    return {"density": inside / (k * len(fake)), "coverage": held / len(real)}


# Copies


@dataclass
class Nearest:
    """The nearest of a set for each query.

    Attributes:
        distance: to the nearest.
        second: to the second nearest; infinite if there is only one.
        index: of the nearest.
    """

    distance: Float[Tensor, " queries"]
    second: Float[Tensor, " queries"]
    index: Int[Tensor, " queries"]


def nearest(
    queries: Float[Tensor, "queries turns size"],
    points: Float[Tensor, "points size"],
    queries_at_once: int = 32,
    points_at_once: int = 256,
) -> Nearest:
    """Euclidean nearest neighbours; a query counts in whichever of its turns is the closest.

    Args:
        queries: each thing in all turns it may be recognised in, in any precision.
        points: what to look among.
    """
    if len(points) == 0:
        raise ValueError("there is nothing to look for neighbours in")
    parts = queries.split(queries_at_once)
    found = [_nearest(part, points, points_at_once) for part in parts]
    return Nearest(*(torch.cat([getattr(part, name) for part in found]) for name in ("distance", "second", "index")))


def _nearest(queries: Tensor, points: Tensor, points_at_once: int) -> Nearest:
    """Finds candidates by fast matrix products, whose rounding blurs small distances, then measures these exactly."""
    count, turns, _ = queries.shape
    flat = queries.flatten(0, 1).double()
    best = torch.full((count, CANDIDATES), torch.inf, dtype=torch.float64)
    index = torch.zeros(count, CANDIDATES, dtype=torch.int64)
    for first in range(0, len(points), points_at_once):
        block = points[first : first + points_at_once].double()
        distances = torch.cdist(flat, block).view(count, turns, -1).amin(dim=1)
        together = torch.cat([best, distances], dim=1)
        numbers = torch.cat([index, torch.arange(first, first + len(block)).expand(count, -1)], dim=1)
        best, order = together.topk(CANDIDATES, dim=1, largest=False)
        index = numbers.gather(1, order)
    exact = torch.stack([_exact_distances(q, points[i]) for q, i in zip(queries, index, strict=True)])
    exact[best.isinf()] = torch.inf
    exact, order = exact.sort(dim=1)
    return Nearest(exact[:, 0], exact[:, 1], index.gather(1, order)[:, 0])


def _exact_distances(turns: Float[Tensor, "turns size"], points: Float[Tensor, "points size"]) -> Tensor:
    return (turns.double()[:, None] - points.double()).norm(dim=-1).amin(dim=0)


def quantiles(values: Float[Tensor, " values"]) -> dict[str, float]:
    """`min`, `q05`, `q25`, `median`, `q75`, `q95`, `max` and `mean` of some values."""
    names = ("min", "q05", "q25", "median", "q75", "q95", "max")
    found = torch.quantile(values.double(), torch.tensor(QUANTILES, dtype=torch.float64))
    return {**dict(zip(names, found.tolist(), strict=True)), "mean": float(values.double().mean())}


def compare_nearest(generated: Nearest, held_out: Nearest) -> dict[str, Any]:
    """How near generated scenes are to training scenes, beside held-out scenes, which cannot be copies.

    Returns:
        `generated` and `held_out`: quantiles of the distances to the nearest training scene.
        `generated_closer_than_q05`: share of generated scenes nearer than the 5 % quantile of held-out scenes; 0.05 is
        expected for scenes that are as far from the training scenes as those.
        `generated_copies` and `held_out_copies`: share of scenes whose nearest training scene is at less than half the
        distance of the second nearest: one training scene, and no other, is almost met.
    """
    threshold = float(torch.quantile(held_out.distance.double(), 0.05))
    return {
        "generated": quantiles(generated.distance),
        "held_out": quantiles(held_out.distance),
        "generated_closer_than_q05": float((generated.distance < threshold).double().mean()),
        "generated_copies": copy_rate(generated),
        "held_out_copies": copy_rate(held_out),
    }


def copy_rate(found: Nearest) -> float:
    """Share of queries at less than `COPY_RATIO` of the distance to the second nearest; exact copies count."""
    known = found.second.isfinite()
    copies = known & ((found.distance < COPY_RATIO * found.second) | (found.distance == 0))
    return float(copies.double().mean())
