"""Latents optimised for given images and under the prior together (SSDNeRF's fine-tuning of codes).

The loss is that of rendering plus the denoisers' `w(t) |x_0(x_t) - x|^2 / 2` at random noise, with w(t) of
`GuidanceConfig`. Its gradient counts x_0(x_t) as constant, is computed in every so many steps and kept for those
between (SSDNeRF's cached prior gradient), as a denoiser costs more than it changes from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.diffusion.flow import NUM_TIMESTEPS, prediction_type_of, samples_flows
from nfldm_ns.diffusion.guiding import GuidedStep
from nfldm_ns.diffusion.pipeline import NFLDMPipeline
from nfldm_ns.latents.scene_latents import SceneLatents
from nfldm_ns.scenes.voxel_grid import VoxelGrid


@dataclass(frozen=True)
class FineTuningConfig:
    """How latents are optimised.

    Attributes:
        steps: of Adam; 0 leaves them as they were sampled.
        learning_rate: in standard deviations of the latents.
        prior_mult: weight of the denoisers' losses beside that of rendering.
        prior_every: steps from one gradient of the prior to the next.
        min_time, max_time: range of the noise, as shares of the timesteps.
    """

    steps: int = 20
    learning_rate: float = 0.03
    prior_mult: float = 0.3
    prior_every: int = 4
    min_time: float = 0.02
    max_time: float = 0.5

    def __post_init__(self) -> None:
        if self.steps < 0 or self.prior_every < 1 or self.prior_mult < 0 or self.learning_rate <= 0:
            raise ValueError(f"steps, learning_rate, prior_mult and prior_every cannot be {self}")
        if not 0 <= self.min_time < self.max_time <= 1:
            raise ValueError(f"{self.min_time} to {self.max_time} is no range of times")


class DenoisingGradient:
    """Gradients of the denoisers' losses at codes, in normalised units.

    Args:
        pipeline: whose denoisers and scheduler.
        scene_code: that they are told.
        config: the range of the noise.
    """

    def __init__(self, pipeline: NFLDMPipeline, scene_code: Float[Tensor, "1 code"], config: FineTuningConfig) -> None:
        self.pipeline, self.scene_code, self.config = pipeline, scene_code, config

    @torch.no_grad()
    def __call__(self, free: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Mean gradients of each latent ("coarse" with z folded into channels, "fine") at one draw of noise."""
        conditions = {"scene_code": self.scene_code}
        found = {"coarse": self._of(self.pipeline.coarse_denoiser, "coarse", free["coarse"], conditions, generator)}
        if "fine" in free:
            stage2 = self.pipeline.latent_autoencoder
            coarse = self.pipeline.coarse_denoiser.latent.inverse(free["coarse"]).unflatten(1, stage2.coarse_shape[:2])
            conditions = {**conditions, "coarse": stage2.quantise_coarse(coarse)}
            found["fine"] = self._of(self.pipeline.fine_denoiser, "fine", free["fine"], conditions, generator)
        return found

    def _of(
        self, denoiser: nn.Module, stage: str, clean: Tensor, conditions: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        low, high = self.config.min_time, self.config.max_time
        share = low + (high - low) * float(torch.rand(1, generator=generator))
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        step = noised_step(self.pipeline, denoiser, stage, clean, noise, share, conditions)
        estimate = step.estimate(step.predict(step.latents))
        weight = min(1.0, step.signal / step.noise)
        return weight * (clean - estimate) / clean.numel()


def noised_step(
    pipeline: NFLDMPipeline,
    denoiser: nn.Module,
    stage: str,
    clean: Float[Tensor, " scenes *shape"],
    noise: Float[Tensor, " scenes *shape"],
    share: float,
    conditions: dict[str, Tensor],
) -> GuidedStep:
    """A latent in normalised units before its denoiser, noised to a share of the training's timesteps."""
    scheduler = pipeline.scheduler
    if samples_flows(scheduler):
        signal, sigma, time = 1 - share, share, share * NUM_TIMESTEPS
    else:
        alphas = scheduler.alphas_cumprod
        time = float(min(int(share * len(alphas)), len(alphas) - 1))
        signal, sigma = float(alphas[int(time)]) ** 0.5, float(1 - alphas[int(time)]) ** 0.5

    def predict(noisy: Tensor) -> Tensor:
        return denoiser(noisy, noisy.new_full((len(noisy),), time), **conditions)

    noisy = signal * clean + sigma * noise
    return GuidedStep(stage, noisy, predict, signal, sigma, prediction_type_of(scheduler), conditions)


def fine_tune(
    pipeline: NFLDMPipeline,
    latents: SceneLatents,
    scene_code: Float[Tensor, "1 code"],
    loss: Callable[[VoxelGrid], Tensor],
    config: FineTuningConfig,
    generator: torch.Generator,
    also: Sequence[tuple[Tensor, float]] = (),
) -> SceneLatents:
    """c, f and g of one scene, optimised.

    Args:
        latents: as sampled, batch size 1.
        loss: of V, see `RenderingLoss`.
        generator: of the noise, on the CPU.
        also: what else is optimised in place for the loss, and the learning rates, such as a pose.
    """
    if not config.steps:
        return latents
    free = _normalised(pipeline, latents)
    others = [tensor.requires_grad_() for tensor, _ in also]
    groups = [{"params": [tensor], "lr": rate} for tensor, rate in also]
    groups += [{"params": [tensor.requires_grad_() for tensor in free.values()], "lr": config.learning_rate}]
    optimiser = torch.optim.Adam(groups)
    prior = DenoisingGradient(pipeline, scene_code, config)
    cached: dict[str, Tensor] = {}
    with torch.enable_grad():
        for step in range(config.steps):
            value = loss(pipeline.latent_autoencoder.decode(_latents(pipeline, free, latents)))
            optimised = [*others, *free.values()]
            gradients = torch.autograd.grad(value, optimised, allow_unused=True)
            if config.prior_mult and step % config.prior_every == 0:
                cached = prior({name: tensor.detach() for name, tensor in free.items()}, generator)
            pulls = [None] * len(others) + [cached.get(name) for name in free]
            for tensor, gradient, pull in zip(optimised, gradients, pulls, strict=True):
                tensor.grad = torch.zeros_like(tensor) if gradient is None else gradient
                if pull is not None:
                    tensor.grad += config.prior_mult * pull
            optimiser.step()
    for tensor in others:
        tensor.requires_grad_(False)
    return _latents(pipeline, {name: tensor.detach() for name, tensor in free.items()}, latents)


def _normalised(pipeline: NFLDMPipeline, latents: SceneLatents) -> dict[str, Tensor]:
    """The latents that there are, in the denoisers' units; g in its own."""
    free = {"coarse": pipeline.coarse_denoiser.latent(latents.coarse.flatten(1, 2))}
    if pipeline.fine_denoiser is not None:
        free["fine"] = pipeline.fine_denoiser.latent(latents.fine)
    if latents.global_latent.numel():
        free["global"] = latents.global_latent
    return {name: tensor.detach().float().clone() for name, tensor in free.items()}


def _latents(pipeline: NFLDMPipeline, free: dict[str, Tensor], otherwise: SceneLatents) -> SceneLatents:
    coarse = pipeline.coarse_denoiser.latent.inverse(free["coarse"])
    fine = pipeline.fine_denoiser.latent.inverse(free["fine"]) if "fine" in free else otherwise.fine
    coarse = coarse.unflatten(1, pipeline.latent_autoencoder.coarse_shape[:2])
    return SceneLatents(free.get("global", otherwise.global_latent), coarse, fine)
