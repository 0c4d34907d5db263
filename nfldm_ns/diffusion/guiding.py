"""Sampling that is guided by a loss of the denoised estimate.

A guide changes what a denoiser predicts, before the scheduler makes its step of it. It thinks of the noisy latent as
`x_t = alpha x_0 + sigma eps`, with alpha^2 + sigma^2 = 1 for a diffusion and alpha + sigma = 1 for a flow, whatever
scale the scheduler keeps its samples in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from diffusers import SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from nfldm_ns.diffusion.flow import FLOW, prediction_type_of, samples_flows

LEAST_SIGNAL = 1e-3  # below, x_t tells nothing of x_0, and nothing is divided by it


@dataclass(frozen=True)
class GuidedStep:
    """One step as a guide sees it.

    Attributes:
        stage: which latent is sampled: "global", "coarse" or "fine".
        latents: x_t in normalised units.
        predict: what the denoiser says of any x_t; differentiable.
        signal, noise: alpha and sigma.
        prediction_type: of the denoiser: "epsilon", "sample", "v_prediction" or "flow".
        conditions: what the denoiser sees besides, in their own units.
    """

    stage: str
    latents: Float[Tensor, " scenes *shape"]
    predict: Callable[[Tensor], Tensor]
    signal: float
    noise: float
    prediction_type: str
    conditions: dict[str, Tensor] = field(default_factory=dict)

    def estimate(self, predicted: Tensor, latents: Tensor | None = None) -> Tensor:
        """x_0 of a prediction for `latents` (by default those of the step)."""
        latents = self.latents if latents is None else latents
        if self.prediction_type == "sample":
            return predicted
        if self.prediction_type == "epsilon":
            return (latents - self.noise * predicted) / max(self.signal, LEAST_SIGNAL)
        if self.prediction_type == FLOW:
            return latents - self.noise * predicted
        return self.signal * latents - self.noise * predicted

    def prediction(self, estimate: Tensor) -> Tensor:
        """The inverse: what the denoiser would have predicted for that x_0."""
        if self.prediction_type == "sample":
            return estimate
        if self.prediction_type == "epsilon":
            return (self.latents - max(self.signal, LEAST_SIGNAL) * estimate) / self.noise
        if self.prediction_type == FLOW:
            return (self.latents - estimate) / self.noise
        return (self.signal * self.latents - estimate) / self.noise


class Guide(Protocol):
    """Returns the prediction to go on with; `step.predict(step.latents)` is unguided sampling."""

    def __call__(self, step: GuidedStep) -> Tensor: ...


def guided_prediction(
    guide: Guide,
    scheduler: SchedulerMixin,
    stage: str,
    latents: Float[Tensor, " scenes *shape"],
    timestep: Tensor,
    predict: Callable[[Tensor], Tensor],
    conditions: dict[str, Tensor],
) -> Float[Tensor, " scenes *shape"]:
    """What a guide makes of the prediction for a scheduler's sample.

    Args:
        latents: as the scheduler has them.
        predict: what the denoiser predicts for such.
    """
    signal, noise = _levels(scheduler, timestep)
    scale = 1.0 if samples_flows(scheduler) else (signal**2 + noise**2) ** 0.5
    if noise <= 0:  # nothing is left to be guided
        return predict(latents)
    step = GuidedStep(
        stage,
        latents if abs(scale - 1) < 1e-4 else latents / scale,
        predict if abs(scale - 1) < 1e-4 else lambda x: predict(x * scale),
        signal / scale,
        noise / scale,
        prediction_type_of(scheduler),
        conditions,
    )
    return guide(step)


def _levels(scheduler: SchedulerMixin, timestep: Tensor) -> tuple[float, float]:
    """Shares of the clean sample and of the noise in a scheduler's sample at a timestep of its schedule."""
    if samples_flows(scheduler):
        time = float(timestep) / scheduler.config.num_train_timesteps
        return 1 - time, time
    one, zero = (torch.full((1,), value, device=timestep.device) for value in (1.0, 0.0))
    at = timestep.reshape(1)
    return float(scheduler.add_noise(one, zero, at)), float(scheduler.add_noise(zero, one, at))
