"""Samples one canvas of c and f jointly through overlapping windows (MultiDiffusion, Bar-Tal et al., ICML 2023).

At every step the denoiser predicts in each window, and the canvas takes the mean of the predictions, weighted so that a
window has the less to say the nearer its edge is. The scheduler then steps on the canvas as a whole.

Denoisers know latents by their distance from a mean that depends on the place in the window (`Normaliser`): where the
cameras stand there is free space, at the edge hardly anything was seen. Windows that see the same cell from different
places therefore expect different means `m_w` of it. The canvas is normalised by the weighted mean `m` of these, and a
window sees `x - a (m_w - m) / std` of a sample `x = a x_0 + s eps`; what it predicts is moved back likewise. One window
alone is sampled as `NFLDMPipeline` does, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.diffusion.call_checks import check_sampled, check_start
from nfldm_ns.diffusion.flow import FLOW, initial_scale, levels_of, model_input, prediction_type_of
from nfldm_ns.diffusion.inpainting import Inpainting, inpaint
from nfldm_ns.diffusion.pipeline import NFLDMPipeline
from nfldm_ns.diffusion.windows import WindowGrid

WINDOWS_AT_ONCE = 4
Window = tuple[int, int]


@dataclass(frozen=True)
class CanvasNormaliser:
    """Mean and standard deviation of a latent on a canvas, called as a denoiser's `Normaliser`."""

    mean: Float[Tensor, "channels y x"]
    std: Float[Tensor, "channels 1 1"]

    def __call__(self, values: Float[Tensor, "batch channels y x"]) -> Float[Tensor, "batch channels y x"]:
        """To normalised units."""
        return (values - self.mean) / self.std

    def inverse(self, values: Float[Tensor, "batch channels y x"]) -> Float[Tensor, "batch channels y x"]:
        """Back to the latent's own units."""
        return values * self.std + self.mean


class JointSampler:
    """Does what `inpaint` and a call of the pipeline do to one scene to a canvas.

    Args:
        pipeline: whose denoisers, scheduler and guidance are used.
        stage: "coarse" or "fine".
        windows: of the canvas.
        active: windows that are looked through; the rest of the canvas is to be kept by inpainting.
        conditions: of the denoiser by name, for each active window: `[windows, ...]`.
    """

    def __init__(
        self,
        pipeline: NFLDMPipeline,
        stage: str,
        windows: WindowGrid,
        active: Sequence[Window],
        conditions: dict[str, Tensor],
        guidance_scale: float = 1.0,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        self.pipeline, self.stage, self.windows, self.active = pipeline, stage, windows, list(active)
        self.given, self.guidance_scale, self.on_step = conditions, guidance_scale, on_step
        self.conditions = conditions
        self.denoiser: nn.Module = pipeline.coarse_denoiser if stage == "coarse" else pipeline.fine_denoiser
        self.scale = 1 if stage == "coarse" else pipeline.latent_autoencoder.downsampling
        self.scheduler: SchedulerMixin = pipeline.scheduler
        self._num_timesteps = 0
        self._levels_for: Tensor | None = None
        device = pipeline._execution_device
        down, across = (weights.to(device) for weights in windows.axes(self.scale))
        rows = {start: i for i, start in enumerate(windows.y_starts)}
        columns = {start: i for i, start in enumerate(windows.x_starts)}
        self._weights = []
        for y, x in self.active:
            part = windows.place((y, x), self.scale)
            self._weights.append(down[rows[y], part[0], None] * across[columns[x], None, part[1]])
        self.latent = self._normaliser()
        own: Any = self.denoiser.latent
        self._offsets = torch.stack([(own.mean - self.latent.mean[self._at(w)]) / own.std for w in self.active])

    def _at(self, window: Window) -> tuple[slice, slice, slice]:
        return (slice(None), *self.windows.place(window, self.scale))

    def _normaliser(self) -> CanvasNormaliser:
        """The denoiser's statistics on the canvas; its mean at places that no active window knows stays zero."""
        own: Any = self.denoiser.latent
        rows, columns = (size * self.scale for size in self.windows.shape)
        if len(self.active) == 1 and own.mean.shape[1:] == (rows, columns):
            return CanvasNormaliser(own.mean, own.std)
        total = own.mean.new_zeros(1, rows, columns)
        mean = own.mean.new_zeros(len(own.mean), rows, columns)
        for window, weight in zip(self.active, self._weights, strict=True):
            mean[self._at(window)] += weight * own.mean
            total[self._at(window)] += weight
        return CanvasNormaliser(mean / torch.where(total > 0, total, 1), own.std)

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> AbstractContextManager[Any]:
        """The pipeline's own."""
        return self.pipeline.progress_bar(iterable, total)

    def denoise(
        self,
        denoiser: Any,
        noise: Float[Tensor, "1 channels y x"],
        num_inference_steps: int,
        generator: Any = None,
        callback: Callable[..., Tensor] | None = None,
        **conditions: Tensor,
    ) -> Float[Tensor, "1 channels y x"]:
        """From noise to a sample on the canvas, in normalised units."""
        self.scheduler.set_timesteps(num_inference_steps, device=noise.device)
        for timestep in self.scheduler.timesteps:
            noise = self.denoise_step(denoiser, noise, timestep, generator, conditions)
        return noise

    def denoise_step(
        self, denoiser: Any, latents: Tensor, timestep: Tensor, generator: Any, conditions: dict[str, Tensor]
    ) -> Tensor:
        """One step of the scheduler, on the mean of what the windows predict."""
        predicted = self._predict(latents, timestep)
        extra = self.pipeline._step_arguments(generator)
        if self.on_step is not None:
            self.on_step()
        return self.scheduler.step(predicted, timestep, latents, **extra, return_dict=False)[0]

    def _predict(self, canvas: Float[Tensor, "1 channels y x"], timestep: Tensor) -> Float[Tensor, "1 channels y x"]:
        signal, factor = self._levels(timestep)
        self.pipeline._stage, self.pipeline._guidance_scale = self.stage, self.guidance_scale
        mean, total = torch.zeros_like(canvas), torch.zeros_like(canvas[:, :1])
        for first in range(0, len(self.active), WINDOWS_AT_ONCE):
            chosen = self.active[first : first + WINDOWS_AT_ONCE]
            part = slice(first, first + len(chosen))
            offsets = self._offsets[part].to(canvas.dtype)
            seen = torch.stack([canvas[0][self._at(window)] for window in chosen]) - signal * offsets
            conditions = {name: values[part] for name, values in self.conditions.items()}
            scaled = model_input(self.scheduler, seen, timestep)
            time = timestep.to(canvas.device).expand(len(chosen))
            found = self.pipeline._predict(self.denoiser, scaled, time, conditions) + factor * offsets
            for window, values, weight in zip(chosen, found, self._weights[part], strict=True):
                mean[0][self._at(window)] += weight * values
                total[0][self._at(window)] += weight
        return mean / torch.where(total > 0, total, 1)

    def _known(self, inpainting: Inpainting) -> dict[str, Tensor]:
        """What each window is told of the part of the canvas that is kept."""
        latent, cells = inpainting.known(self.stage, 1)
        places = [self._at(window) for window in self.active]
        told = {
            "known": torch.stack([latent[0][place] for place in places]).to(self.pipeline.dtype),
            "known_cells": torch.stack([cells[0][place[1:]] for place in places]),
        }
        return {name: values.to(self.pipeline._execution_device) for name, values in told.items()}

    def _levels(self, timestep: Tensor) -> tuple[float, float]:
        """Share a of x_0 in a sample, and what a prediction moves by when x_0 moves by one and the sample by a."""
        if self._levels_for is not self.scheduler.timesteps:
            self._levels_for, self._known_levels = self.scheduler.timesteps, levels_of(self.scheduler)
        signals, noises = self._known_levels
        index = int((self.scheduler.timesteps == timestep).nonzero()[0])
        signal, noise = float(signals[index]), float(noises[index])
        factors = {"epsilon": 0.0, "sample": 1.0, FLOW: -1.0}
        factors["v_prediction"] = -noise / (signal**2 + noise**2) ** 0.5
        return signal, factors[prediction_type_of(self.scheduler)]

    def __call__(
        self,
        noise: Float[Tensor, "1 channels y x"],
        num_inference_steps: int,
        generator: torch.Generator,
        temperature: float = 1.0,
        inpainting: Inpainting | None = None,
        contrast: float = 1.0,
    ) -> Float[Tensor, "1 channels y x"]:
        """A sample in the latent's own units.

        Args:
            noise: standard normal.
            temperature: its standard deviation.
            inpainting: what is kept, and what is sampled.
            contrast: factor of how far what is sampled lies from its mean, as the pipeline's `contrasts`.
        """
        self.conditions = {
            name: values.to(noise.dtype) if values.is_floating_point() else values
            for name, values in self.given.items()
        }
        if inpainting is not None and self.pipeline.outpaints:
            self.conditions |= self._known(inpainting)
        start = noise * initial_scale(self.scheduler) * temperature
        check_start(self.scheduler, start, self.stage)
        if inpainting is None:
            latents = self.denoise(self, start, num_inference_steps, generator)
        else:
            latents = inpaint(
                self,
                self,  # type: ignore[arg-type]  # of the denoiser `inpaint` wants to know the statistics alone
                start,
                num_inference_steps,
                generator,
                inpainting=inpainting,
                stage=self.stage,
                temperature=temperature,
            )
        check_sampled(self.scheduler, latents.float(), self.stage)
        latents = self.latent.inverse(latents.float() * contrast)
        return latents if inpainting is None else inpainting.merge(self.stage, latents)
