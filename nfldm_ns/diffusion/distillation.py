"""Progressive distillation: denoisers that need few steps (Salimans & Ho 2022, arXiv 2202.00512).

A student learns to do in one step of DDIM what its teacher does in two; then it is the teacher of the next, until a few
steps are left. Every round is an ordinary regression on v with a fixed target, from pure noise (zero terminal SNR) to
none, for g, c and f alike; consistency models (Song et al. 2023) would need one round, but learn from a target that
moves with them.

Step i of N (N is the first, from pure noise) starts at the timestep `round(1000 i / N) - 1` and ends at that of i - 1,
which for i = 1 is the clean sample: the "trailing" timesteps of diffusers' DDIM wherever N divides 1000.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder
from nfldm_ns.latents.scene_latents import SceneLatents
from nfldm_ns.training.identity import public_config

if TYPE_CHECKING:
    from nfldm_ns.diffusion.pipeline import NFLDMPipeline

FIRST_TEACHER_STEPS = 32  # at least, of DDIM with the denoiser that is distilled
CONTRAST_SCENES = 32  # of each of both generators, whose latents' standard deviations are compared


@dataclass(frozen=True)
class Halving:
    """One round.

    Attributes:
        teacher: predicts v; on the device of the training.
        steps: of the student; the teacher takes twice as many.
        temperature: standard deviation of the initial noise that scenes are sampled with. Students see noise of this to
            that of the training, as the teacher's steps from reduced noise lead through such samples.
    """

    teacher: nn.Module
    steps: int
    temperature: float = 1.0


def rounds(steps: int, num_timesteps: int = 1000) -> list[int]:
    """Steps of the student of each round, of which the last has `steps`.

    Raises:
        UserInputError: for a number of steps that the samplers of diffusers take other timesteps for.
    """
    if steps < 1 or num_timesteps % steps:
        raise UserInputError(
            f"--distil-steps is {steps}, but must divide {num_timesteps}: take 4, or 1, 2, 5, 8, 10 or 20."
        )
    counts = [steps]
    while 2 * counts[0] < FIRST_TEACHER_STEPS:
        counts.insert(0, 2 * counts[0])
    return counts


def step_timestep(index: Int[Tensor, "*batch"], steps: int, num_timesteps: int = 1000) -> Int[Tensor, "*batch"]:
    """The timestep at which step `index` of `steps` starts; -1, no noise at all, for index 0."""
    return (index * num_timesteps / steps).round().long() - 1


def signal_and_noise(
    scheduler: DDPMScheduler, timestep: Int[Tensor, " batch"], ndim: int
) -> tuple[Float[Tensor, " batch *ones"], Float[Tensor, " batch *ones"]]:
    """alpha and sigma of timesteps, (1, 0) for -1, in the shape of samples of `ndim` axes."""
    levels = scheduler.alphas_cumprod.to(timestep.device)
    alpha_bar = torch.where(timestep < 0, 1.0, levels[timestep.clamp(min=0)]).view(-1, *[1] * (ndim - 1))
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def ddim_step(
    sample: Float[Tensor, " batch *shape"],
    velocity: Float[Tensor, " batch *shape"],
    start: tuple[Tensor, Tensor],
    end: tuple[Tensor, Tensor],
) -> Float[Tensor, " batch *shape"]:
    """The deterministic step of DDIM: `x = alpha z - sigma v`, `eps = sigma z + alpha v`, `z' = alpha' x + sigma' eps`.

    Args:
        start, end: alpha and sigma.
    """
    alpha, sigma = start
    return end[0] * (alpha * sample - sigma * velocity) + end[1] * (sigma * sample + alpha * velocity)


def velocity_between(
    sample: Float[Tensor, " batch *shape"],
    reached: Float[Tensor, " batch *shape"],
    start: tuple[Tensor, Tensor],
    end: tuple[Tensor, Tensor],
) -> Float[Tensor, " batch *shape"]:
    """The v with which one step of DDIM goes from `sample` to `reached`: `ddim_step`, solved for v.

    With the angles `alpha = cos a`, `sigma = sin a` a step is `z' = cos(a - a') z - sin(a - a') v`, so
    `v = (cos(a - a') z - z') / sin(a - a')`, also from pure noise and to none.
    """
    cosine = start[0] * end[0] + start[1] * end[1]
    sine = start[1] * end[0] - start[0] * end[1]
    return (cosine * sample - reached) / sine


@torch.no_grad()
def two_steps(
    halving: Halving,
    scheduler: DDPMScheduler,
    noisy: Float[Tensor, " batch *shape"],
    index: Int[Tensor, " batch"],
    conditions: dict[str, Any],
) -> Float[Tensor, " batch *shape"]:
    """The v that takes the student in one step where two steps take the teacher.

    Args:
        noisy: at the timesteps of the student's steps `index`, from 1.
        conditions: of the denoiser.
    """
    timesteps = [step_timestep(2 * index - half, 2 * halving.steps) for half in range(3)]
    start, middle, end = (signal_and_noise(scheduler, timestep, noisy.ndim) for timestep in timesteps)
    sample = ddim_step(noisy, halving.teacher(noisy, timesteps[0], **conditions).float(), start, middle)
    sample = ddim_step(sample, halving.teacher(sample, timesteps[1], **conditions).float(), middle, end)
    return velocity_between(noisy, sample, start, end)


def distillation_loss(
    student: nn.Module,
    halving: Halving,
    scheduler: DDPMScheduler,
    clean: Float[Tensor, " batch *shape"],
    noise: Float[Tensor, " batch *shape"],
    index: Int[Tensor, " batch"],
    conditions: dict[str, Any],
) -> Float[Tensor, " batch"]:
    """Squared error of the student's v for each sample.

    That is the paper's "SNR + 1" weighting of the error of the clean sample, which the error of v has by itself.
    """
    timestep = step_timestep(index, halving.steps)
    noisy = scheduler.add_noise(clean, noise, timestep)
    target = two_steps(halving, scheduler, noisy, index, conditions)
    return F.mse_loss(student(noisy, timestep, **conditions).float(), target, reduction="none").flatten(1).mean(1)


def few_step_sampler(trained: Any) -> DDIMScheduler:
    """What a distilled pipeline is saved with: DDIM, whose steps the denoisers learned.

    Args:
        trained: configuration of the scheduler that the teacher was saved with.
    """
    return DDIMScheduler.from_config(trained, clip_sample=False, set_alpha_to_one=True)


@torch.no_grad()
def matched_contrasts(
    student: NFLDMPipeline, teacher: NFLDMPipeline, num_scenes: int = CONTRAST_SCENES, seed: int = 0
) -> tuple[float, float, float]:
    """Contrasts of g, c and f with which the student's latents vary from scene to scene as its teacher's do.

    Each round of distillation learns means over what its teacher does, so that a student's scenes are nearer to each
    other. g comes first, as c is sampled by it, and f last. Scenes are sampled without a map.

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


def step_indices(shares: Float[Tensor, " count"], steps: int) -> Int[Tensor, " count"]:
    """Steps 1 to `steps` of numbers that cover [0, 1) evenly."""
    return (shares * steps).long().clamp(max=steps - 1) + 1


def check_teacher(name: str, config: Any) -> None:
    """Raises `UserInputError` unless a pipeline's denoisers predict v of a diffusion that ends in pure noise.

    Args:
        name: of the pipeline.
        config: of its scheduler.
    """
    if config.get("prediction_type") != "v_prediction" or not config.get("rescale_betas_zero_snr"):
        raise UserInputError(
            f"Only denoisers that predict v, trained with zero terminal SNR, are distilled, but those of {name} are "
            "others: train with the default --prediction-type."
        )


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
