"""Samples a part of c and f anew while the rest stays: RePaint (Lugmayr et al., CVPR 2022) with any scheduler.

At every step the part to keep is noised to the step's level and put in place of what the denoiser made of it (paper,
Sec. 4: editing without training). So that the new part agrees with it, short stretches of steps are walked several
times: noise takes the sample back, and the denoiser, which now sees both parts, walks on again. Denoisers that were
trained for it are also told what is kept (`outpainting.py`), and need no second walk.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nfldm_ns.diffusion.flow import initial_scale, levels_of
from nfldm_ns.latents.scene_latents import SceneLatents


class Denoising(Protocol):
    """What inpainting needs of the pipeline that samples."""

    scheduler: SchedulerMixin
    _num_timesteps: int

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> AbstractContextManager[Any]: ...

    def denoise(
        self,
        denoiser: nn.Module,
        noise: Tensor,
        num_inference_steps: int,
        generator: Any = None,
        callback: Callable[..., Tensor] | None = None,
        **conditions: Tensor,
    ) -> Tensor: ...

    def denoise_step(
        self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, generator: Any, conditions: dict[str, Tensor]
    ) -> Tensor: ...


@dataclass(frozen=True)
class Inpainting:
    """What of a scene is sampled anew, for `NFLDMPipeline.__call__`.

    Attributes:
        latents: c and f of the scene before quantisation, of one scene or as many as are sampled.
        coarse_region, fine_region: cells of c and f that are sampled anew; rows grow with y.
        strength: share of the denoising steps that the new part walks: 1 begins with noise alone, less begins with the
            scene itself, noised, and keeps something of it.
        resamplings: how often each stretch of steps is walked; 1 is once.
        jump_length: steps of a stretch.
    """

    latents: SceneLatents
    coarse_region: Bool[Tensor, "yc xc"]
    fine_region: Bool[Tensor, "y x"]
    strength: float = 1.0
    resamplings: int = 3
    jump_length: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, not {self.strength}")
        if self.resamplings < 1 or self.jump_length < 1:
            raise ValueError(
                f"resamplings and jump_length must be at least 1, not {self.resamplings}, {self.jump_length}"
            )
        for name, latent in (("coarse", self.latents.coarse), ("fine", self.latents.fine)):
            region = getattr(self, f"{name}_region")
            if region.shape != latent.shape[-2:]:
                raise ValueError(f"{name}_region is {tuple(region.shape)}, but the latent {tuple(latent.shape[-2:])}")

    def part(self, stage: str) -> tuple[Tensor, Bool[Tensor, "*space"]]:
        """The latent of a stage ("coarse" with z folded into channels, "fine"), and the region in it."""
        if stage == "coarse":
            return self.latents.coarse.flatten(1, 2), self.coarse_region
        return self.latents.fine, self.fine_region

    def known(self, stage: str, count: int) -> tuple[Tensor, Bool[Tensor, "scenes ..."]]:
        """The latent of a stage for so many scenes, in its own units, and where it is kept, for outpainters."""
        latent, region = self.part(stage)
        return latent.expand(count, *latent.shape[1:]), (~region).expand(count, *region.shape)

    def merge(self, stage: str, sampled: Float[Tensor, " scenes *shape"]) -> Float[Tensor, " scenes *shape"]:
        """What was sampled, in its own units, with what is kept in its place, bit for bit."""
        latent, region = self.part(stage)
        return torch.where(region.to(sampled.device), sampled, latent.to(sampled))


@dataclass(frozen=True)
class NoiseLevels:
    """How much of the sample and of the noise there is before each step and after the last.

    Attributes:
        signal, noise: `[steps + 1]`; a sample at level i is `signal[i] x_0 + noise[i] eps`.
    """

    signal: Float[Tensor, " levels"]
    noise: Float[Tensor, " levels"]

    @staticmethod
    def of(scheduler: SchedulerMixin) -> NoiseLevels:
        """The levels of a scheduler right after `set_timesteps`, as its own `add_noise` (or `scale_noise`) has them."""
        signal, noise = levels_of(scheduler)
        one, zero = signal.new_ones(1), noise.new_zeros(1)
        return NoiseLevels(torch.cat([signal, one]).float(), torch.cat([noise, zero]).float())

    def add(self, clean: Tensor, noise: Tensor, level: int) -> Tensor:
        """A sample at a level."""
        return (self.signal[level] * clean + self.noise[level] * noise).to(clean.dtype)

    def back(self, sample: Tensor, noise: Tensor, level: int, target: int) -> Tensor:
        """A sample at a level noised further, to an earlier one: the forward process between the two."""
        ratio = self.signal[target] / self.signal[level]
        variance = self.noise[target].square() - (ratio * self.noise[level]).square()
        return (ratio * sample + variance.clamp(min=0).sqrt() * noise).to(sample.dtype)


def stretches(num_steps: int, order: int, jump_length: int, strength: float = 1.0) -> list[range]:
    """Consecutive steps, cut into stretches.

    Args:
        num_steps: of the scheduler's schedule.
        order: steps of the schedule that belong together; none of these groups is cut.
        strength: the share of the steps that is walked, the last ones; at least one group.
    """
    groups = -(-num_steps // order)
    first = groups - max(1, round(groups * strength))
    starts = range(first, groups, jump_length)
    return [range(start * order, min((start + jump_length) * order, num_steps)) for start in starts]


def inpaint(
    pipeline: Denoising,
    denoiser: nn.Module,
    noise: Float[Tensor, " scenes *shape"],
    num_inference_steps: int,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    callback: Callable[..., Tensor] | None = None,
    *,
    inpainting: Inpainting,
    stage: str,
    temperature: float = 1.0,
    **conditions: Tensor,
) -> Float[Tensor, " scenes *shape"]:
    """As `NFLDMPipeline.denoise`, in a region only; what is sampled nowhere or everywhere needs no inpainting.

    Args:
        noise: initial noise as the scheduler wants it.
        stage: "coarse" or "fine".
        temperature: standard deviation of the noise that is added on the way, as of the initial one.
    """
    latent, region = inpainting.part(stage)
    known = denoiser.latent(latent.to(noise.device)).to(noise).expand_as(noise)  # type: ignore[operator]
    region = region.to(noise.device)
    if not bool(region.any()):
        return known
    if bool(region.all()) and inpainting.strength == 1:
        return pipeline.denoise(denoiser, noise, num_inference_steps, generator, callback, **conditions)
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    levels = NoiseLevels.of(scheduler)
    plan = stretches(len(scheduler.timesteps), scheduler.order, inpainting.jump_length, inpainting.strength)
    generators = generator if generator is None or isinstance(generator, torch.Generator) else list(generator)

    def draw() -> Tensor:
        drawn = randn_tensor(noise.shape, generator=generators, device=noise.device, dtype=noise.dtype)
        return drawn * temperature

    def keep(latents: Tensor, level: int) -> Tensor:
        return torch.where(region, latents, levels.add(known, draw(), level))

    first = plan[0].start
    latents = keep(noise if first == 0 else levels.add(known, noise / initial_scale(scheduler), first), first)
    pipeline._num_timesteps = inpainting.resamplings * sum(len(stretch) for stretch in plan)
    with pipeline.progress_bar(total=pipeline._num_timesteps) as progress:
        done = 0
        for stretch in plan:
            state = _state(scheduler)
            for walk in range(inpainting.resamplings):
                if walk > 0:
                    _restore(scheduler, state)
                    latents = levels.back(latents, draw(), stretch.stop, stretch.start)
                for step in stretch:
                    timestep = scheduler.timesteps[step]
                    latents = pipeline.denoise_step(denoiser, latents, timestep, generator, conditions)
                    if (step + 1) % scheduler.order == 0 or step + 1 == stretch.stop:
                        latents = keep(latents, step + 1)  # within a group of steps levels are the scheduler's own
                    if callback is not None:
                        latents = callback(pipeline, done, timestep, latents, conditions)
                    done += 1
                    progress.update()
    return latents


def _state(scheduler: SchedulerMixin) -> dict[str, Any]:
    """What a scheduler remembers of the steps it has done."""
    return copy.deepcopy({name: value for name, value in vars(scheduler).items() if name != "_internal_dict"})


def _restore(scheduler: SchedulerMixin, state: dict[str, Any]) -> None:
    vars(scheduler).update(copy.deepcopy(state))
    if hasattr(scheduler, "last_sample"):
        scheduler.last_sample = None  # UniPC's corrector would begin from it and so undo the added noise
