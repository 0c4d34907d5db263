"""Rectified flow, the other way to train denoisers (Liu et al. 2023, arXiv 2209.03003; Lipman et al. 2023).

A sample goes on a straight line from data to noise, `x_t = (1 - t) x_0 + t eps` with t in (0, 1), and a denoiser
predicts where it goes, `eps - x_0`. Networks see the time as 1000 t, as numbers of the size of a diffusion's timesteps.
Sampling follows the prediction from t = 1 to 0, by the schedulers of diffusers in `FLOW_SCHEDULERS`, which know neither
`init_noise_sigma` nor `scale_model_input` nor `add_noise`: the functions here stand for these, for any scheduler.
"""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from nfldm_ns.autoencoder.model_configs import FLOW_SCHEDULERS
from nfldm_ns.errors import UserInputError

FLOW = "flow"
NUM_TIMESTEPS = 1000
MIN_TIME = 1e-5  # t and 1 - t are at least this in training


class FlowNoise:
    """The noise of a flow's training; stands where `DDPMScheduler` does in that of a diffusion.

    Args:
        shift: s of `t -> s t / (1 + (s - 1) t)` (Esser et al. 2024, Eq. 23): above 1 training and sampling spend more
            on noisy samples, as large latents need.
    """

    num_timesteps = NUM_TIMESTEPS

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = shift

    def timesteps(self, shares: Float[Tensor, " count"]) -> Float[Tensor, " count"]:
        """Timesteps of numbers that cover [0, 1) evenly."""
        time = shares.clamp(MIN_TIME, 1 - MIN_TIME)
        return NUM_TIMESTEPS * self.shift * time / (1 + (self.shift - 1) * time)

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: Float[Tensor, " batch"]) -> Tensor:
        """x_t of x_0 and eps."""
        time = (timestep / NUM_TIMESTEPS).to(clean).view(-1, *[1] * (clean.ndim - 1))
        return (1 - time) * clean + time * noise

    def get_velocity(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What a denoiser is to predict, the same at all times."""
        return noise - clean


def make_flow_scheduler(shift: float = 1.0) -> FlowMatchEulerDiscreteScheduler:
    """Euler's method, the sampler that pipelines of flows are saved with.

    Raises:
        UserInputError: for a shift that is none.
    """
    if not 0 < shift < float("inf"):
        raise UserInputError(f"--flow-shift is {shift}, but must be a finite number above 0: 1 shifts nothing.")
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TIMESTEPS, shift=shift)


def samples_flows(scheduler: object) -> bool:
    """Whether a scheduler is for denoisers of flows."""
    return isinstance(scheduler, FLOW_SCHEDULERS)


def prediction_type_of(scheduler: SchedulerMixin) -> str:
    """What the denoisers of a scheduler predict."""
    return FLOW if samples_flows(scheduler) else scheduler.config.prediction_type


def initial_scale(scheduler: SchedulerMixin) -> float | Tensor:
    """Standard deviation of the noise that a scheduler begins with."""
    return 1.0 if samples_flows(scheduler) else scheduler.init_noise_sigma


def model_input(scheduler: SchedulerMixin, sample: Tensor, timestep: Tensor) -> Tensor:
    """What a denoiser sees of a sample."""
    return sample if samples_flows(scheduler) else scheduler.scale_model_input(sample, timestep)


def levels_of(scheduler: SchedulerMixin) -> tuple[Float[Tensor, " steps"], Float[Tensor, " steps"]]:
    """Shares of the clean sample and of the noise before each step, right after `set_timesteps`."""
    timesteps = scheduler.timesteps
    if samples_flows(scheduler):  # their `scale_noise` of Heun's would move its step
        time = timesteps.float() / scheduler.config.num_train_timesteps
        return 1 - time, time
    one, zero = torch.ones(1, device=timesteps.device), torch.zeros(1, device=timesteps.device)
    signal = [scheduler.add_noise(one, zero, t[None]) for t in timesteps]
    noise = [scheduler.add_noise(zero, one, t[None]) for t in timesteps]
    return torch.cat(signal), torch.cat(noise)
