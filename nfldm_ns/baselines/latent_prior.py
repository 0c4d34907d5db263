"""GAUDI's second stage: one diffusion model of the latents of scenes and cameras together."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.diffusion.denoisers import GlobalDenoiser
from nfldm_ns.diffusion.training import (
    DiffusionTrainingConfig,
    diffusion_target,
    spread_timesteps,
    training_scheduler,
)
from nfldm_ns.training.draws import BatchShare
from nfldm_ns.training.identity import public_config
from nfldm_ns.training.loop import ProgressCallback, moving_averages, train
from nfldm_ns.training.run import RunFolder
from nfldm_ns.training.schedule import Schedule, batch_share, joint_batch_size, new_accelerator


@dataclass
class PriorLosses:
    """Mean squared errors of velocities of latents.

    Attributes:
        wrapped: the denoiser, as an accelerator wraps it.
        latents: `[S, D]`, in normalised units, of the training scenes.
        share: what this process works on.
    """

    wrapped: nn.Module
    latents: Float[Tensor, "scenes dim"]
    share: BatchShare

    def __post_init__(self) -> None:
        self.scheduler = training_scheduler(DiffusionTrainingConfig())

    def __call__(self, number: int) -> dict[str, Tensor]:
        step, part = self.share.place(number)
        steps = self.scheduler.config.num_train_timesteps
        timestep = spread_timesteps(self.share.joint_batch_size, steps, self.share.seed + step)[part]
        timestep = timestep.to(self.latents.device)
        clean = self.latents[self.share.items(len(self.latents), number)]
        noise = self.share.draws(number, self.latents.device).normal(clean)
        target = diffusion_target(self.scheduler, clean, noise, timestep)
        predicted = self.wrapped(self.scheduler.add_noise(clean, noise, timestep), timestep)
        return {"loss": F.mse_loss(predicted.float(), target)}


def train_latent_prior(
    latents: Float[Tensor, "scenes dim"],
    output_dir: Path,
    model_config: dict[str, Any],
    schedule: Schedule,
    identity: dict[str, Any],
    ema_decay: float,
    on_progress: ProgressCallback | None = None,
) -> GlobalDenoiser:
    """Trains a diffusion model of latents, continuing an interrupted run; its averaged weights, on the CPU.

    Args:
        model_config: sizes of `GlobalDenoiser`, which knows no cameras here.
        identity: of the training that made the latents.

    Raises:
        UserInputError: if the folder holds the training of other latents.
    """
    accelerator = new_accelerator(schedule, output_dir)
    torch.manual_seed(schedule.seed)
    denoiser = GlobalDenoiser(global_dim=latents.shape[1], num_cameras=0, **model_config)
    denoiser.code.fit(latents)
    denoiser.to(accelerator.device)
    fingerprint = hashlib.sha256(latents.cpu().numpy().tobytes()).hexdigest()[:16]
    sizes = {"latents": fingerprint, "seed": schedule.seed, "batch_size": joint_batch_size(schedule, accelerator)}
    folder = RunFolder(output_dir, {**identity, "prior": public_config(denoiser), **sizes}, accelerator)
    ema = moving_averages(denoiser, ema_decay)
    normalised = denoiser.code(latents.to(accelerator.device)).detach()

    def make_losses(wrapped: nn.Module) -> PriorLosses:
        return PriorLosses(wrapped, normalised, batch_share(schedule, accelerator))

    description = "Diffusion of the latents"
    train(
        folder,
        denoiser,
        make_losses,
        schedule,
        accelerator,
        ema=ema,
        description=description,
        on_progress=on_progress,
    )
    ema.copy_to(denoiser.parameters())
    return denoiser.cpu()
