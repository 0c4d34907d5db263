"""Volume rendering that looks only where density is, and reads features only where weight is.

It places its samples exactly as the dense way does (`render_feature_maps`), and leaves out those of which one of two is
sure: that their density is at most the threshold of `EmptySpace`, or that so much density lies before them that at most
`WEIGHT_BOUND` of the ray is left. So no sample of a weight above `WEIGHT_BOUND` is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nfldm_ns.autoencoder.lifting import EPS
from nfldm_ns.scenes.empty_space import EmptySpace, TensorCache, find_empty_space
from nfldm_ns.scenes.voxel_grid import VoxelGrid, sample_voxels

WEIGHT_BOUND = 5e-4
"""No sample whose weight in the dense rendering is larger is left out."""
RAYS_AT_ONCE = 2**14

_spaces, _densities, _tables = TensorCache(), TensorCache(), TensorCache()


@dataclass
class SampledRays:
    """Rays of one scene with samples at equal distances, in units of voxels.

    Attributes:
        first: `[3, N]` (z, y, x), where the first sample lies: voxel centres are at 1, 2, ..., so that the integer part
            is the number of the cell of `EmptySpace`.
        step: `[3, N]`, from one sample to the next; 0 for rays that miss the box.
        delta: `[N]`, metres between samples.
        num_samples: on each ray.
    """

    first: Float[Tensor, "3 rays"]
    step: Float[Tensor, "3 rays"]
    delta: Float[Tensor, " rays"]
    num_samples: int

    @property
    def count(self) -> int:
        return self.delta.shape[0]

    def at(self, ray: Int[Tensor, " n"], number: Float[Tensor, " n"]) -> Float[Tensor, "3 n"]:
        """Where samples lie."""
        return torch.addcmul(self.first[:, ray], self.step[:, ray], number)


@dataclass
class RaySamples:
    """Samples that matter, ray by ray and front to back.

    Attributes:
        ray: which ray each is of, ascending.
        number: which of the ray's samples it is, a whole number.
        weight: its share of what the ray sees.
    """

    ray: Int[Tensor, " n"]
    number: Float[Tensor, " n"]
    weight: Float[Tensor, " n"]


def sampled_rays(
    grid: VoxelGrid,
    start_points: Float[Tensor, "rays 3"],
    slopes: Float[Tensor, "rays 3"],
    start: Float[Tensor, " rays"],
    step: Float[Tensor, " rays"],
    delta: Float[Tensor, " rays"],
    num_samples: int,
) -> SampledRays:
    """The samples of rays that are given in normalised coordinates (x, y, z in [-1, 1]).

    Args:
        start_points: origins.
        slopes: directions.
        start: ray parameter where the first interval begins.
        step: of the ray parameter.
        delta: metres per step.
    """
    voxels = slopes.new_tensor(grid.shape)[:, None] / 2
    towards = slopes.flip(-1).T * voxels
    first = (start_points.flip(-1).T + 1) * voxels + 0.5 + towards * (start + step / 2)
    return SampledRays(first.contiguous(), (towards * step).contiguous(), delta, num_samples)


def threshold_for(delta: float) -> float:
    """Density (1/m) up to which an interval of so many metres weighs at most `WEIGHT_BOUND`."""
    return WEIGHT_BOUND / max(delta, 1e-6)


def empty_space(grid: VoxelGrid, num_samples: int) -> EmptySpace:
    """The empty space of a grid of one scene for rays of so many samples; kept while its density stays what it is."""
    longest = float((grid.aabb[1] - grid.aabb[0]).norm()) / num_samples
    threshold = threshold_for(longest)
    return _spaces.get(grid.density, threshold, lambda: find_empty_space(grid.density[0, 0], threshold))


def bordered_density(grid: VoxelGrid) -> Float[Tensor, "z y x"]:
    """The density of a grid of one scene with zeros around it, `[Z + 2, Y + 2, X + 2]`, kept likewise."""
    density = grid.density.detach()
    return _densities.get(grid.density, None, lambda: F.pad(density[0, 0].float(), (1,) * 6))


def feature_table(grid: VoxelGrid) -> Float[Tensor, "voxels channels"]:
    """Features of a grid of one scene with zeros around it, a row per voxel; kept while they stay what they are.

    Shape `[(Z + 2) (Y + 2) (X + 2), C]`. All voxels have a row, as rays can read nearly all of a generated scene.
    """
    features = grid.features

    def make() -> Float[Tensor, "voxels channels"]:
        return F.pad(features[0].float(), (1,) * 6).flatten(1).T.contiguous()

    if torch.is_grad_enabled() and features.requires_grad:
        return make()
    return _tables.get(features, None, make)


@torch.no_grad()
def march(density: Float[Tensor, "1 1 z y x"], space: EmptySpace, rays: SampledRays) -> RaySamples:
    """Goes along all rays at once, over empty space in as large steps as it is wide, until nothing more is seen."""
    parts = [
        _march_some(density, space, rays, first, min(first + RAYS_AT_ONCE, rays.count))
        for first in range(0, rays.count, RAYS_AT_ONCE)
    ]
    return RaySamples(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ray", "number", "weight")))


def _march_some(
    density: Float[Tensor, "1 1 z y x"], space: EmptySpace, rays: SampledRays, begin: int, end: int
) -> RaySamples:
    cells = space.distance.flatten()
    _, along_y, along_x = space.distance.shape
    opaque = -math.log(WEIGHT_BOUND)
    ray = torch.arange(begin, end, device=cells.device)
    # Whole cells per sample in the fastest axis; a little less, so that rounding never jumps over one.
    reach = (1 - 1e-4) / rays.step[:, begin:end].abs().amax(0).clamp(min=1e-6)
    ray = ray[rays.delta[begin:end] > 0]
    reach = reach[ray - begin]
    number = torch.zeros_like(reach)
    passed = torch.zeros_like(reach)
    first, step, delta = rays.first[:, ray], rays.step[:, ray], rays.delta[ray]
    counts = torch.zeros(end - begin, dtype=torch.int64, device=cells.device)
    seen: list[tuple[Tensor, ...]] = []
    while len(ray):
        place = torch.addcmul(first, step, number)
        z, y, x = place.to(torch.int32)
        distance = cells[(z * along_y + y) * along_x + x]
        here = (distance == 0).nonzero()[:, 0]
        if len(here):
            depth = density_at(density, place[:, here]) * delta[here]
            before, this = passed[here], ray[here]
            rank = counts[this - begin]
            counts[this - begin] = rank + 1
            seen.append((this, rank, number[here], torch.exp(-before) * -torch.expm1(-depth)))
            passed[here] = before + depth
        number += 1 + ((distance.float() - 1).clamp(min=0) * reach).floor()
        alive = (number < rays.num_samples) & (passed < opaque)
        if not bool(alive.all()):
            alive = alive.nonzero()[:, 0]
            ray, number, passed, delta, reach = (v[alive] for v in (ray, number, passed, delta, reach))
            first, step = first[:, alive], step[:, alive]
    return _in_order(seen, counts, begin)


def density_at(density: Float[Tensor, "1 1 z y x"], place: Float[Tensor, "3 n"]) -> Float[Tensor, " n"]:
    sizes = place.new_tensor(density.shape[2:])[:, None]
    points = ((place - 0.5) * (2 / sizes) - 1).flip(0).T
    return sample_voxels(density, points[None])[0, :, 0].float()


def _in_order(seen: list[tuple[Tensor, ...]], counts: Int[Tensor, " rays"], begin: int) -> RaySamples:
    """Samples that were found front to back for all rays at once, ray by ray."""
    if not seen:
        nothing = counts[:0]
        return RaySamples(nothing, nothing, nothing.float())
    ray, rank, number, weight = (torch.cat(values) for values in zip(*seen, strict=True))
    place = (counts.cumsum(0) - counts)[ray - begin] + rank
    return RaySamples(*(torch.empty_like(v).index_copy_(0, place, v) for v in (ray, number, weight)))


def largest(samples: RaySamples, num_rays: int, kept: int) -> RaySamples:
    """The `kept` largest weights of each ray, scaled to the whole weight of the ray."""
    counts = samples.ray.bincount(minlength=num_rays)
    rank = torch.arange(len(samples.ray), device=counts.device) - (counts.cumsum(0) - counts)[samples.ray]
    width = max(int(counts.max()), kept) if len(samples.ray) else kept
    weight = samples.weight.new_zeros(num_rays, width).index_put((samples.ray, rank), samples.weight)
    number = samples.number.new_zeros(num_rays, width).index_put((samples.ray, rank), samples.number)
    total = weight.sum(-1, keepdim=True)
    weight, index = weight.topk(kept, dim=-1)
    weight = weight * (total / (weight.sum(-1, keepdim=True) + EPS))
    ray = torch.arange(num_rays, device=counts.device)[:, None].expand_as(index)
    found = weight > 0
    return RaySamples(ray[found], number.gather(-1, index)[found], weight[found])


def significant(samples: RaySamples, num_rays: int) -> RaySamples:
    """The samples whose weight is above `WEIGHT_BOUND`, scaled to the whole weight of the ray."""
    kept = samples.weight.detach() > WEIGHT_BOUND
    total = _sum(samples.weight, samples.ray, num_rays)
    ray, number, weight = samples.ray[kept], samples.number[kept], samples.weight[kept]
    return RaySamples(ray, number, weight * (total / (_sum(weight, ray, num_rays) + EPS))[ray])


def _sum(values: Float[Tensor, " n"], ray: Int[Tensor, " n"], num_rays: int) -> Float[Tensor, " rays"]:
    return values.new_zeros(num_rays).index_add(0, ray, values)


def summed_features(
    table: Float[Tensor, "voxels channels"], shape: tuple[int, int, int], rays: SampledRays, samples: RaySamples
) -> Float[Tensor, "rays channels"]:
    """Sums of weights times trilinear features, read and summed at once.

    Args:
        shape: voxels (Z, Y, X) of the grid.
        samples: ray by ray.
    """
    counts = samples.ray.bincount(minlength=rays.count)
    ends = counts.cumsum(0)
    parts = []
    for first in range(0, rays.count, RAYS_AT_ONCE):
        last = min(first + RAYS_AT_ONCE, rays.count)
        begin, end = int(ends[first] - counts[first]), int(ends[last - 1])
        ray, number, weight = (v[begin:end] for v in (samples.ray, samples.number, samples.weight))
        rows, weights = _corners(rays.at(ray, number), shape, weight)
        offsets = (ends[first:last] - counts[first:last] - begin) * 8
        parts.append(F.embedding_bag(rows.flatten(), table, offsets, mode="sum", per_sample_weights=weights.flatten()))
    return torch.cat(parts)


def _corners(
    place: Float[Tensor, "3 n"], shape: tuple[int, int, int], weight: Float[Tensor, " n"]
) -> tuple[Int[Tensor, "n 8"], Float[Tensor, "n 8"]]:
    """The voxels around each sample, by their numbers in the grid with its border, and their shares of its weight."""
    cell = place.floor()
    along_y, along_x = shape[1] + 2, shape[2] + 2
    z, y, x = cell.long()
    corner = (z * along_y + y) * along_x + x
    z, y, x = place - cell
    rows, weights = [], []
    for k, from_z in enumerate((1 - z, z)):
        for j, from_y in enumerate((1 - y, y)):
            plane = weight * (from_z * from_y)
            for i, from_x in enumerate((1 - x, x)):
                rows.append(corner + ((k * along_y + j) * along_x + i))
                weights.append(plane * from_x)
    return torch.stack(rows, dim=1), torch.stack(weights, dim=1)


def what_rays_see(
    rays: SampledRays,
    samples: RaySamples,
    table: Float[Tensor, "voxels channels"],
    shape: tuple[int, int, int],
    num_feature_samples: int | None,
) -> tuple[Float[Tensor, "rays channels"], Float[Tensor, " rays"], Float[Tensor, " rays"]]:
    """Features, accumulation, and the sum of weights times numbers of samples (from 0.5 on)."""
    accumulation = _sum(samples.weight, samples.ray, rays.count)
    ended = _sum(samples.weight * (samples.number + 0.5), samples.ray, rays.count)
    if num_feature_samples is not None and num_feature_samples < rays.num_samples:
        read = largest(samples, rays.count, num_feature_samples)
    else:
        read = significant(samples, rays.count)
    return summed_features(table, shape, rays, read), accumulation, ended
