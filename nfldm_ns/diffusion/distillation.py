"""Distillation to few steps: a denoiser learns to sample in few steps what its teacher samples in more.

Both start from the same noise and are run by the solver of the generator's pipeline; the student's few steps are
differentiated together, so that it also learns to make up for what the solver gets wrong in long steps (as knowledge
distillation of iterative generators, Luhman & Luhman 2021, arXiv 2101.02388, for more steps than one). Scenes are
needed for what the denoisers are conditioned by alone. Rounds that halve the steps (Salimans & Ho 2022, arXiv
2202.00512) were tried before: they need a solver of first order, whose teacher is worse to begin with, and took four
steps further from their teacher (docs/results.md).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from nfldm_ns.diffusion.pipeline import STAGES, NFLDMPipeline
from nfldm_ns.diffusion.solver import draws_noise, sample_latents
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder
from nfldm_ns.latents.scene_latents import SceneLatents
from nfldm_ns.training.identity import public_config

CONTRAST_SCENES = 32  # of each of both generators, whose latents' standard deviations are compared


@dataclass(frozen=True)
class Shortening:
    """How the sampling of a latent is made shorter.

    Attributes:
        teacher: a denoiser of any prediction type.
        scheduler: that of its pipeline, which draws no noise on its way.
        teacher_steps: what it takes.
        steps: what the student takes, fewer.
        temperature: standard deviation of the initial noise that scenes are sampled with. Students learn from noise of
            this to that of the training, so that they can be sampled at both.
    """

    teacher: nn.Module
    scheduler: SchedulerMixin
    teacher_steps: int
    steps: int
    temperature: float = 1.0

    @classmethod
    def of(cls, pipeline: NFLDMPipeline, stage: str, steps: int) -> Shortening:
        """Of a denoiser of a generator, from its default steps.

        Args:
            stage: "global", "coarse" or "fine".
        """
        temperature = min(1.0, float(pipeline.config.temperatures[STAGES.index(stage)]))
        teacher = getattr(pipeline, f"{stage}_denoiser")
        return cls(teacher, pipeline.scheduler, pipeline.default_steps, steps, temperature)

    def sample(
        self, denoiser: nn.Module, noise: Float[Tensor, " batch *shape"], steps: int, conditions: dict[str, Any]
    ) -> Float[Tensor, " batch *shape"]:
        """Its samples of some noise, in normalised units."""
        return sample_latents(denoiser, copy.deepcopy(self.scheduler), noise, steps, **conditions)

    def error(
        self, student: nn.Module, noise: Float[Tensor, " batch *shape"], conditions: dict[str, Any]
    ) -> Float[Tensor, " batch *shape"]:
        """The squared difference of the student's sample from its teacher's."""
        with torch.no_grad():
            wanted = self.sample(self.teacher, noise, self.teacher_steps, conditions)
        return (self.sample(student, noise, self.steps, conditions) - wanted).square()


def check_distillable(name: str, pipeline: NFLDMPipeline, steps: int) -> None:
    """Raises `UserInputError` unless a generator can be sampled in fewer steps.

    Args:
        name: of the generator.
        steps: that are wanted.
    """
    if not 1 <= steps < pipeline.default_steps:
        raise UserInputError(
            f"--distil-steps is {steps}, but {name} takes {pipeline.default_steps} steps: give fewer, and at least 1."
        )
    if draws_noise(pipeline.scheduler):
        raise UserInputError(
            f"{name} is sampled by {type(pipeline.scheduler).__name__}, which draws noise on its way, so that a sample "
            "does not follow from its first noise: give a generator with another scheduler, such as UniPC."
        )


@torch.no_grad()
def matched_contrasts(
    student: NFLDMPipeline, teacher: NFLDMPipeline, num_scenes: int = CONTRAST_SCENES, seed: int = 0
) -> tuple[float, float, float]:
    """Contrasts of g, c and f with which the student's latents vary from scene to scene as its teacher's do.

    A student learns means over what it cannot tell apart, and long steps of a solver stop short, so that a student's
    scenes are nearer to each other. g comes first, as c is sampled by it, and f last. Scenes are sampled without a map.

    Args:
        student, teacher: on one device, the teacher with contrasts of its own.
        num_scenes: of each, by the noise of the seeds from `seed` on.
    """
    wanted = _deviations(teacher, teacher.config.contrasts, num_scenes, seed)
    contrasts = [1.0, 1.0, 1.0]
    for i, deviation in enumerate(wanted):
        found = _deviations(student, contrasts, num_scenes, seed)[i]
        if found > 0 and deviation > 0:  # stages 2 without g have it all the same, of zeros
            contrasts[i] = round(deviation / found, 3)
    return contrasts[0], contrasts[1], contrasts[2]


def _deviations(pipeline: NFLDMPipeline, contrasts: Sequence[float], num_scenes: int, seed: int) -> list[float]:
    """Standard deviations of g, c and f over scenes, root mean squares over their values; without f where none is."""
    pipeline.set_progress_bar_config(disable=True)
    device = pipeline._execution_device
    scenes = [
        pipeline(1, torch.Generator(device).manual_seed(seed + i), contrasts=contrasts, output_type="latent").latents
        for i in range(num_scenes)
    ]
    parts = SceneLatents.cat(scenes).state_dict().values()
    sampled = list(parts)[: 2 if pipeline.fine_denoiser is None else 3]
    return [float(part.float().var(0).mean().sqrt()) for part in sampled]


def require_same_latents(name: str, of_teacher: LatentAutoencoder, given: LatentAutoencoder) -> None:
    """Raises `UserInputError` unless both stages 2 encode alike; their decoders may differ, as by a later tuning.

    Weights may differ by what storing in half precision rounds.

    Args:
        name: of the teacher's pipeline.
    """

    def alike(theirs: Tensor, ours: Tensor) -> bool:
        return torch.allclose(ours.cpu().float(), theirs.cpu().float(), rtol=2**-10, atol=2**-24)

    if public_config(of_teacher) != public_config(given) or not all(
        alike(of_teacher.encoding[part].state_dict()[key], value)
        for part, module in given.encoding.items()
        for key, value in module.state_dict().items()
    ):
        raise UserInputError(
            f"{name} samples latents of another stage 2 than --latent-autoencoder: give the run that its denoisers "
            "were trained on."
        )


def randomly_cooled(
    noise: Float[Tensor, " batch *shape"], temperature: float, shares: Shaped[Tensor, " batch"]
) -> Float[Tensor, " batch *shape"]:
    """Noise of a standard deviation between `temperature` and 1, evenly by numbers in [0, 1)."""
    scale = 1 + (temperature - 1) * shares.to(noise.device)
    return noise * scale.view(-1, *[1] * (noise.ndim - 1))
