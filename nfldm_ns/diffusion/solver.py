"""A denoiser run by a scheduler of diffusers, from noise to a sample."""

from __future__ import annotations

import copy

import torch
from diffusers import SchedulerMixin
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.diffusion.flow import initial_scale, model_input

PROBE_STEPS = 4


def sample_latents(
    denoiser: nn.Module,
    scheduler: SchedulerMixin,
    noise: Float[Tensor, " batch *shape"],
    steps: int,
    **conditions: Tensor,
) -> Float[Tensor, " batch *shape"]:
    """Denoises from noise to a sample, in normalised units, with a scheduler that draws nothing."""
    scheduler.set_timesteps(steps, device=noise.device)
    sample = noise * initial_scale(scheduler)
    for timestep in scheduler.timesteps:
        scaled = model_input(scheduler, sample, timestep)
        predicted = denoiser(scaled, timestep.to(noise.device).expand(len(noise)), **conditions)
        sample = scheduler.step(predicted.float(), timestep, sample, return_dict=False)[0]
    return sample


class _Constant(nn.Module):
    """Predicts the same everywhere."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return torch.full_like(sample, 0.1)


def draws_noise(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler draws noise on its way, so that its samples do not follow from their first noise alone."""
    noise, probe = torch.ones(1, 8), _Constant()
    with torch.random.fork_rng(devices=[]):
        samples = []
        for seed in range(2):
            torch.manual_seed(seed)
            samples.append(sample_latents(probe, copy.deepcopy(scheduler), noise, PROBE_STEPS))
    return not samples[0].equal(samples[1])
