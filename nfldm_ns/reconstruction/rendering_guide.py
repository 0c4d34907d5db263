"""Denoising guided by images of the place: the rendering loss of the denoised estimate (SSDNeRF, Chen et al. 2023).

SSDNeRF moves the estimate of x_0 against the gradient of the rendering loss with respect to the noisy code,

    x_0 <- x_0 - lambda (sigma^2 / alpha) grad_{x_t} [ (alpha / sigma)^(2 omega) L(x_0(x_t)) ].

Here lambda is relative: the step that would make L zero were it linear, `L / |grad L|^2`, times a share. So it does not
depend on the number of pixels, the units of the loss, or the sizes of a generator's latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nfldm_ns.autoencoder.losses import StageOneLossConfig, stage_one_losses
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.diffusion.guiding import GuidedStep
from nfldm_ns.diffusion.pipeline import NFLDMPipeline
from nfldm_ns.latents.scene_latents import SceneLatents
from nfldm_ns.scenes.views import Views
from nfldm_ns.scenes.voxel_grid import VoxelGrid

LARGEST_MOVE = 1.0  # root mean square, in standard deviations, of the latents that the loss depends on
GradientOf = Literal["noisy", "estimate"]


@dataclass(frozen=True)
class GuidanceConfig:
    """How much images guide.

    Attributes:
        scale: share of the step to a loss of zero; 0 does not guide.
        omega: of `(alpha / sigma)^(2 omega)`: the larger, the later images have their say.
        gradient_of: "noisy": with respect to x_t, through the denoiser, as SSDNeRF and DPS (Chung et al. 2023);
            "estimate": with respect to x_0 at a third of the time, as if x_0 followed x_t as a unit Gaussian's does.
        steps: moves per denoising step; more than one only for "estimate".
    """

    scale: float = 0.5
    omega: float = 0.5
    gradient_of: GradientOf = "estimate"
    steps: int = 1

    def __post_init__(self) -> None:
        if self.scale < 0 or self.omega < 0 or self.steps < 1:
            raise ValueError(f"scale and omega must be at least 0, and steps at least 1, not {self}")
        if self.steps > 1 and self.gradient_of == "noisy":
            raise ValueError("several moves per step need gradient_of='estimate'")

    def weight(self, signal: float, noise: float) -> float:
        """`(alpha / sigma)^(2 omega) sigma^2`, at most 1."""
        return min(1.0, (signal / noise) ** (2 * self.omega) * noise**2)


class RenderingLoss:
    """How far V is from showing some views of one scene.

    Args:
        autoencoder: stage 1, which renders.
        views: batch shape `[1, N]`.
        config: weights of the losses.
        perceptual: for `config.lpips_mult`.
    """

    def __init__(
        self,
        autoencoder: SceneAutoencoder,
        views: Views,
        config: StageOneLossConfig,
        perceptual: PerceptualNetwork | None = None,
    ) -> None:
        self.autoencoder, self.views, self.config, self.perceptual = autoencoder, views, config, perceptual

    def __call__(self, grid: VoxelGrid) -> Float[Tensor, ""]:
        rendered = self.autoencoder.render(grid, self.views.cameras)
        losses = stage_one_losses(self.config, rendered, self.views, grid, self.perceptual)
        return torch.stack(list(losses.values())).sum()


class RenderingGuide:
    """A guide of `NFLDMPipeline` by given views of the scene.

    Args:
        pipeline: that samples.
        loss: of V.
        latents: g, c and f where they are not (yet) sampled, batch size 1: those that the given views are encoded to.
        config: how much.
    """

    def __init__(
        self,
        pipeline: NFLDMPipeline,
        loss: Callable[[VoxelGrid], Tensor],
        latents: SceneLatents,
        config: GuidanceConfig,
    ) -> None:
        self.pipeline, self.loss, self.latents, self.config = pipeline, loss, latents, config

    def __call__(self, step: GuidedStep) -> Tensor:
        """The prediction of an estimate that was moved towards the views."""
        weight = self.config.scale * self.config.weight(step.signal, step.noise)
        if not weight:
            return step.predict(step.latents)
        if self.config.gradient_of == "noisy":
            estimate, loss, gradient = self.gradient(step)
            # of x_t to that of x_0 of a unit Gaussian, whose estimate is alpha x_t
            return step.prediction(estimate - weight * _step_to_zero(loss, gradient))
        with torch.no_grad():
            estimate = step.estimate(step.predict(step.latents))
        for _ in range(self.config.steps):
            loss, gradient = self.estimate_gradient(step, estimate)
            estimate = estimate - weight / self.config.steps * _step_to_zero(loss, gradient)
        return step.prediction(estimate)

    def gradient(self, step: GuidedStep) -> tuple[Tensor, Tensor, Tensor]:
        """The estimate of x_0, its loss, and the gradient of that with respect to x_t."""
        with torch.enable_grad():
            noisy = step.latents.detach().requires_grad_()
            estimate = step.estimate(step.predict(noisy), noisy)
            loss = self.loss(self.decode(step, estimate))
            (gradient,) = torch.autograd.grad(loss, noisy)
        return estimate.detach(), loss.detach(), gradient

    def estimate_gradient(self, step: GuidedStep, estimate: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of an estimate of x_0, and its gradient with respect to that."""
        with torch.enable_grad():
            free = estimate.detach().requires_grad_()
            loss = self.loss(self.decode(step, free))
            (gradient,) = torch.autograd.grad(loss, free)
        return loss.detach(), gradient

    def decode(self, step: GuidedStep, estimate: Tensor) -> VoxelGrid:
        """V of an estimate in normalised units, with what is known of the other latents."""
        stage2, pipeline = self.pipeline.latent_autoencoder, self.pipeline
        estimate = estimate.float()
        if step.stage == "global":
            code = pipeline.global_denoiser.code.inverse(estimate)
            return stage2.decode(replace(self.latents, global_latent=pipeline.global_denoiser.split(code)[0]))
        g = self.latents.global_latent
        if "scene_code" in step.conditions:
            g = pipeline.global_denoiser.split(step.conditions["scene_code"].float())[0]
        if step.stage == "coarse":
            coarse = pipeline.coarse_denoiser.latent.inverse(estimate).unflatten(1, stage2.coarse_shape[:2])
            return stage2.decode(SceneLatents(g, coarse, self.latents.fine))
        fine = pipeline.fine_denoiser.latent.inverse(estimate)
        return stage2.decode(SceneLatents(g, step.conditions["coarse"].float(), fine))


def _step_to_zero(loss: Tensor, gradient: Tensor) -> Tensor:
    """`L g / |g|^2`, no longer than `LARGEST_MOVE` in the root mean square of the entries that the loss depends on."""
    square = gradient.square().sum()
    if float(square) == 0:
        return torch.zeros_like(gradient)
    move = loss * gradient / square
    # As many entries as a gradient of equal ones with its first and second moment has.
    entries = gradient.abs().sum().square() / square
    size = (move.square().sum() / entries).sqrt()
    return move * min(1.0, LARGEST_MOVE / max(float(size), 1e-12))
