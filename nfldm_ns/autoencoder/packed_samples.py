"""The samples of rays that lie where density is, by nerfstudio's sampler over nerfacc's occupancy grid, on CUDA."""

from __future__ import annotations

import math
from functools import cache

import torch
from jaxtyping import Float, Int
from nerfacc.estimators.occ_grid import OccGridEstimator
from nerfstudio.cameras.rays import RayBundle
from torch import Tensor

from nfldm_ns.autoencoder.skipping import WEIGHT_BOUND, RaySamples, SampledRays, density_at
from nfldm_ns.scenes.empty_space import EmptySpace, TensorCache

_estimators = TensorCache()


@cache
def nerfacc_works() -> bool:
    """Whether nerfacc's CUDA code is there; it needs a CUDA device and a compiler, or a wheel that has it."""
    if not torch.cuda.is_available():
        return False
    try:
        from nerfacc.cuda._backend import _C
    except Exception:  # whatever compilers raise
        return False
    return _C is not None


def occupancy_grid(space: EmptySpace) -> OccGridEstimator:
    """The cells that hold density as nerfacc's occupancy grid, in units of voxels as `SampledRays` has them.

    They are made from V's density itself, not estimated from random points: nothing above the threshold is missed.
    """
    z, y, x = space.distance.shape
    estimator = OccGridEstimator([0.0, 0.0, 0.0, float(x), float(y), float(z)], [x, y, z])
    estimator = estimator.to(space.distance.device).eval()
    estimator.binaries = space.occupied.permute(2, 1, 0)[None].contiguous()
    estimator.occs = estimator.binaries.flatten().float()
    return estimator


def traversed_samples(density: Float[Tensor, "1 1 z y x"], space: EmptySpace, rays: SampledRays) -> RaySamples:
    """All samples in occupied cells that a ray still gets to; their weights carry gradients to density.

    A ray's direction is one step between samples, so that the sampler's own steps, of length 1, are ours, and its
    samples lie where those of the dense way do.
    """
    ray, number = _traverse(space, rays)
    depth = density_at(density, rays.at(ray, number.to(rays.step))) * rays.delta[ray]
    passed = _passed(depth, ray, rays.count)
    seen = passed.detach() < -math.log(WEIGHT_BOUND)
    weight = torch.exp(-passed) * -torch.expm1(-depth)
    return RaySamples(ray[seen], number[seen], weight[seen])


@torch.no_grad()
def _traverse(space: EmptySpace, rays: SampledRays) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Rays and numbers of the samples in occupied cells, ray by ray and front to back."""
    from nerfstudio.model_components.ray_samplers import VolumetricSampler

    hits = (rays.delta > 0).nonzero()[:, 0]
    if not len(hits):
        return hits, rays.delta[hits]
    step = rays.step[:, hits].T.flip(-1).contiguous()
    ahead = torch.full_like(step[:, :1], 0.5)  # a first sample lies half a step behind where its interval begins
    bundle = RayBundle(
        origins=rays.first[:, hits].T.flip(-1) - ahead * step,
        directions=step,
        pixel_area=torch.ones_like(ahead),
        nears=torch.zeros_like(ahead),
        fars=torch.full_like(ahead, rays.num_samples),
    )
    sampler = VolumetricSampler(_estimators.get(space.distance, None, lambda: occupancy_grid(space))).eval()
    samples, index = sampler(bundle, render_step_size=1.0, alpha_thre=0.0)
    starts, ends = samples.frustums.starts[:, 0], samples.frustums.ends[:, 0]
    real = ends > starts  # where there is nothing, the sampler invents a sample of no length
    return hits[index[real]], starts[real].round()


def _passed(depth: Float[Tensor, " n"], ray: Int[Tensor, " n"], num_rays: int) -> Float[Tensor, " n"]:
    """Optical depth that lies before each sample on its ray."""
    before = depth.double().cumsum(0) - depth.double()
    counts = ray.bincount(minlength=num_rays)
    first = (counts.cumsum(0) - counts)[ray]
    return (before - before[first]).to(depth)
