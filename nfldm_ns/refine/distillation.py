"""Score distillation: what a 2D diffusion prior wants changed in rendered images.

The gradient of the paper's post-optimisation, for renders x = r(V, k) of sampled cameras k:

    grad_V L = E_{eps, t, k} [ w(lambda_t) (eps_hat(x_t, t) - eps) dx / dV ],    x_t = sqrt(ab_t) x + sqrt(1 - ab_t) eps

where ab is alpha_bar. For a latent prior x is the latent of the render, and the gradient flows through its encoder.
Descending along it moves renders towards images that the prior finds likely.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nfldm_ns.errors import UserInputError
from nfldm_ns.refine.prior import Condition, ImagePrior

Guidance = Literal["none", "classifier_free", "negative"]
ObjectiveName = Literal["sds", "csd", "reconstruction", "multistep"]
TimeAnnealing = Literal["uniform", "decreasing", "widening"]


@dataclass
class DistillationConfig:
    """How a prior is listened to."""

    objective: ObjectiveName = "sds"
    """sds: the paper's gradient. csd: classifier score distillation (Yu et al. 2024), of the paper's gradient only what
    guidance adds, eps_hat(x | y) - eps_hat(x | y'): what tells wanted images from those that y' or the unconditional
    embedding stands for; steadier, and indifferent to the guidance scale. reconstruction: renders approach what the
    prior makes of their noisy versions in `reconstruction_steps` deterministic steps, by the square of the difference.
    multistep: the same by its absolute value and LPIPS, towards samples that are kept for `sample_every` steps
    (ReconFusion, Wu et al. 2024)."""
    guidance: Guidance = "negative"
    """none: eps_hat(x | y). classifier_free: away from what the prior believes without a condition (Ho & Salimans
    2022). negative, the paper's: away from y', embeddings of renders of the scene as it began."""
    guidance_scale: float = 30.0
    """gamma in `gamma eps_hat(x | y) + (1 - gamma) eps_hat(x | y')`; 1 is no guidance. In-domain priors want much."""
    weighting: Literal["noise_variance", "uniform"] = "noise_variance"
    """w(lambda_t): 1 - alpha_bar_t as in DreamFusion (Poole et al. 2023), or 1."""
    min_time: float = 0.02
    """Least noise, as a share of the prior's timesteps."""
    max_time: float = 0.4
    """Most noise. In-domain priors change textures; 0.98 also lets a strong prior change what is there."""
    time_annealing: TimeAnnealing = "uniform"
    """uniform: any time of the range in every step. decreasing: from the most to the least noise in the course of the
    training, `max - (max - min) sqrt(progress)` (HiFA, Zhu et al. 2024). widening: any time from `max - (max - min)
    progress` up to the most (ReconFusion, Wu et al. 2024)."""
    reconstruction_steps: int = 4
    """Of the objectives `reconstruction` and `multistep`."""
    sample_every: int = 5
    """Steps that a sample of the objective `multistep`, and the views that it is of, are kept."""
    sample_lpips_mult: float = 1.0
    """Weight of LPIPS beside the absolute difference in the objective `multistep`. Of priors of features, whose samples
    are no images, there is none: their features are those of LPIPS's network."""

    def check(self) -> None:
        """Raises `UserInputError` for values that make no sense."""
        if not 0 <= self.min_time < self.max_time <= 1:
            raise UserInputError(
                f"Times from {self.min_time} to {self.max_time} are no range: give 0 <= min-time < max-time <= 1."
            )
        if self.objective == "csd" and self.guidance == "none":
            raise UserInputError(
                "The objective csd compares two conditions: choose --guidance negative or classifier_free, or "
                "--objective sds."
            )
        if not math.isfinite(self.guidance_scale) or self.reconstruction_steps < 1:
            raise UserInputError("The guidance scale must be a number, and reconstruction steps at least 1.")
        if self.sample_every < 1 or not 0 <= self.sample_lpips_mult < math.inf:
            raise UserInputError("--sample-every must be at least 1 and --sample-lpips-mult at least 0.")


@dataclass
class Distilled:
    """One batch of renders, judged.

    Attributes:
        loss: its gradient with respect to what is diffused (pixels or latents) is `gradient` over the number of its
            elements, so that other losses weigh the same whatever the prior's size; its value is half the mean square
            of `gradient`. (Of the objective "multistep" see `MultistepReconstruction`.)
        gradient: `[B, c, h, w]`, w(lambda_t) (eps_hat - eps), or its counterpart of other objectives.
        skipped: images whose gradient was not finite; they take no part.
    """

    loss: Float[Tensor, ""]
    gradient: Float[Tensor, "batch channels h w"]
    skipped: int


def draw_timesteps(
    config: DistillationConfig,
    num_timesteps: int,
    count: int,
    progress: float,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " count"]:
    """Timesteps of a batch of images.

    Args:
        progress: share of the training done, in [0, 1].
        generator: on the CPU; not used for "decreasing".
    """
    low, high = config.min_time * (num_timesteps - 1), config.max_time * (num_timesteps - 1)
    if config.time_annealing == "uniform":
        share = torch.rand(count, generator=generator)
        return (low + (high - low) * share).round().long()
    progress = min(max(progress, 0.0), 1.0)
    if config.time_annealing == "widening":
        share = torch.rand(count, generator=generator)
        return (high - (high - low) * progress * share).round().long()
    return torch.full((count,), round(high - (high - low) * math.sqrt(progress)))


def guided_noise(
    prior: ImagePrior,
    noisy: Float[Tensor, "batch channels h w"],
    timestep: Int[Tensor, " batch"],
    condition: Condition,
    opposite: Condition | None,
    scale: float,
) -> Float[Tensor, "batch channels h w"]:
    """`scale eps_hat(x | y) + (1 - scale) eps_hat(x | y')`, in one pass of the network, or by the prior's `contrast`.

    Args:
        condition: y.
        opposite: y' (negative guidance) or the unconditional embedding; None for eps_hat(x | y) alone.
    """
    if opposite is None or scale == 1:
        return prior.predict_noise(noisy, timestep, condition)
    contrast = prior.contrast(noisy, timestep, condition, opposite)
    if contrast is not None:
        return prior.predict_noise(noisy, timestep, condition) + (scale - 1) * contrast
    towards, away = prior.predict_both(noisy, timestep, condition, opposite)
    return scale * towards + (1 - scale) * away


def difference_of_noise(
    prior: ImagePrior,
    noisy: Float[Tensor, "batch channels h w"],
    timestep: Int[Tensor, " batch"],
    condition: Condition,
    opposite: Condition,
) -> Float[Tensor, "batch channels h w"]:
    """eps_hat(x | y) - eps_hat(x | y'), in one pass of the network, or by the prior's `contrast`."""
    contrast = prior.contrast(noisy, timestep, condition, opposite)
    if contrast is not None:
        return contrast
    towards, away = prior.predict_both(noisy, timestep, condition, opposite)
    return towards - away


@dataclass
class Noised:
    """Renders as a prior diffuses them, and what it is asked about them.

    Attributes:
        prior: who is asked.
        encoded: x, `[B, c, h, w]`.
        noise: eps.
        noisy: x_t.
        timestep: t of each.
        condition, opposite: y, and y' or None.
        config: how.
    """

    prior: ImagePrior
    encoded: Float[Tensor, "batch channels h w"]
    noise: Float[Tensor, "batch channels h w"]
    noisy: Float[Tensor, "batch channels h w"]
    timestep: Int[Tensor, " batch"]
    condition: Condition
    opposite: Condition | None
    config: DistillationConfig

    @staticmethod
    def draw(
        prior: ImagePrior,
        encoded: Float[Tensor, "batch channels h w"],
        condition: Condition,
        opposite: Condition | None,
        config: DistillationConfig,
        progress: float,
        generator: torch.Generator | None,
    ) -> Noised:
        """With times and noise of a generator on the CPU."""
        timestep = draw_timesteps(config, prior.num_timesteps, len(encoded), progress, generator).to(encoded.device)
        noise = torch.randn(encoded.shape, generator=generator).to(encoded)
        signal, sigma = prior.signal_and_noise(timestep)
        opposite = None if config.guidance == "none" else opposite
        return Noised(prior, encoded, noise, signal * encoded + sigma * noise, timestep, condition, opposite, config)

    @property
    def weight(self) -> Float[Tensor, "batch 1 1 1"]:
        """w(lambda_t)."""
        sigma = self.prior.signal_and_noise(self.timestep)[1]
        return sigma.square() if self.config.weighting == "noise_variance" else torch.ones_like(sigma)

    def denoised(self) -> Float[Tensor, "batch channels h w"]:
        """What the prior makes of noisy images: DDIM (Song et al. 2021) in equal steps from their times to the end."""
        noisy, steps = self.noisy, self.config.reconstruction_steps
        for step in range(steps):
            now = (self.timestep * (steps - step) / steps).round().long()
            predicted = guided_noise(self.prior, noisy, now, self.condition, self.opposite, self.config.guidance_scale)
            signal, sigma = self.prior.signal_and_noise(now)
            clean = (noisy - sigma * predicted) / signal
            if step + 1 < steps:
                later = (self.timestep * (steps - step - 1) / steps).round().long()
                signal, sigma = self.prior.signal_and_noise(later)
                noisy = signal * clean + sigma * predicted
        return clean


def _score(noised: Noised) -> Tensor:
    scale = noised.config.guidance_scale
    asked = (noised.prior, noised.noisy, noised.timestep, noised.condition, noised.opposite)
    return guided_noise(*asked, scale) - noised.noise


def _classifier_score(noised: Noised) -> Tensor:
    assert noised.opposite is not None
    return difference_of_noise(noised.prior, noised.noisy, noised.timestep, noised.condition, noised.opposite)


def _to_reconstruction(noised: Noised) -> Tensor:
    return noised.encoded - noised.denoised()


GRADIENTS: dict[str, Callable[[Noised], Tensor]] = {
    "sds": _score,
    "csd": _classifier_score,
    "reconstruction": _to_reconstruction,
}
"""By objective, what is to be followed with respect to what is diffused, before it is weighted."""


def distill(
    prior: ImagePrior,
    images: Float[Tensor, "batch 3 height width"],
    condition: Condition,
    opposite: Condition | None,
    config: DistillationConfig,
    progress: float,
    generator: torch.Generator | None = None,
) -> Distilled:
    """The loss whose gradient is the paper's, or that of another of `GRADIENTS`.

    Args:
        images: renders in [0, 1], differentiable in what is refined.
        condition: y, one row per image.
        opposite: y' or the unconditional embedding, one row per image; not used without guidance.
        progress: share of the training done.
        generator: of times and noise, on the CPU; by default torch's own.
    """
    encoded = prior.encode(images)
    with torch.no_grad():
        noised = Noised.draw(prior, encoded, condition, opposite, config, progress, generator)
        gradient = noised.weight * GRADIENTS[config.objective](noised)
        finite = gradient.flatten(1).isfinite().all(1)
        gradient = torch.where(finite.view(-1, 1, 1, 1), gradient, torch.zeros_like(gradient))
    target = (encoded - gradient).detach()
    # An image left out must not bring its own NaN back through the difference.
    difference = torch.where(finite.view(-1, 1, 1, 1), encoded - target, torch.zeros_like(encoded))
    return Distilled(0.5 * difference.square().mean(), gradient, int((~finite).sum()))
