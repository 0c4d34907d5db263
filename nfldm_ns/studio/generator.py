"""The generator behind a scene: where it is, whether it can be used, and what it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from nfldm_ns.diffusion.flow import samples_flows
from nfldm_ns.diffusion.pipeline import PIPELINE_INDEX, NFLDMPipeline, load_pipeline
from nfldm_ns.editing.scenes import pipeline_named_by, require_pipeline_of
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.scene_files import GeneratedScene
from nfldm_ns.models import resolve_model
from nfldm_ns.processes import chosen_device
from nfldm_ns.studio.jobs import Job

SOLVERS: dict[str, type[SchedulerMixin]] = {
    "DPM++": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
    "DDIM": DDIMScheduler,
    "Euler": EulerDiscreteScheduler,
}
FLOW_SOLVERS: dict[str, type[SchedulerMixin]] = {
    "Euler": FlowMatchEulerDiscreteScheduler,
    "Heun": FlowMatchHeunDiscreteScheduler,
}


@dataclass(frozen=True)
class Settings:
    """How scenes are sampled.

    Attributes:
        num_inference_steps: of each latent; None for those that the generator was made for.
        solver: a name of `Generator.solvers`; empty for the scheduler that the generator came with.
        temperatures: of g, c and f; None for the generator's own.
        guidance_scale: see `NFLDMPipeline.__call__`.
    """

    num_inference_steps: int | None = None
    solver: str = ""
    temperatures: tuple[float, float, float] | None = None
    guidance_scale: float = 1.0


DEFAULTS = Settings()


class Generator:
    """A trained generator, read when it is needed.

    Args:
        source: its folder, or the name of one that comes with the package; None if nobody knows it.
        device: where it samples; by default CUDA if that is there.
        pipeline: the generator itself, if it was read before.
    """

    def __init__(self, source: str | None, device: str | None = None, pipeline: NFLDMPipeline | None = None) -> None:
        self.source = source
        self.device = chosen_device(device)
        self._pipeline = pipeline
        if pipeline is not None:
            pipeline.set_progress_bar_config(disable=True)

    @staticmethod
    def of_scene(scene: GeneratedScene, device: str | None = None) -> Generator:
        """The one that a scene's record names."""
        return Generator(pipeline_named_by(scene.provenance), device)

    @property
    def why_not(self) -> str:
        """One sentence on why it cannot sample; empty if it can, as far as one can tell without reading it."""
        if self._pipeline is not None:
            return ""
        if self.source is None:
            return "Sampling is off: the scene does not say which generator made it."
        if not (resolve_model(self.source) / PIPELINE_INDEX).is_file():
            return f"Sampling is off: the generator {self.source}, which made the scene, is not there."
        return ""

    @property
    def ready(self) -> bool:
        """Whether it has been read."""
        return self._pipeline is not None

    @property
    def pipeline(self) -> NFLDMPipeline:
        """What has been read."""
        assert self._pipeline is not None
        return self._pipeline

    def read(self, scene: GeneratedScene) -> NFLDMPipeline:
        """Reads it, unless that was done before.

        Args:
            scene: that it has to fit.

        Raises:
            UserInputError: if it cannot be used.
        """
        if self.why_not:
            raise UserInputError(self.why_not)
        if self._pipeline is None:
            diffusers.utils.logging.disable_progress_bar()  # of loading, which takes a moment only
            assert self.source is not None
            pipeline = load_pipeline(self.source)
            require_pipeline_of(pipeline, scene)
            pipeline.set_progress_bar_config(disable=True)
            self._pipeline = pipeline.to(self.device)
        return self._pipeline

    @property
    def solvers(self) -> dict[str, type[SchedulerMixin]]:
        """Schedulers that it may sample with, by name; its own comes first."""
        own = type(self.pipeline.scheduler)
        known = FLOW_SOLVERS if samples_flows(self.pipeline.scheduler) else SOLVERS
        name = next((name for name, kind in known.items() if kind is own), own.__name__)
        return {name: own} | known

    @contextmanager
    def with_solver(self, name: str) -> Iterator[None]:
        """Samples with another scheduler for a while.

        Raises:
            UserInputError: if there is none of this name.
        """
        own = self.pipeline.scheduler
        if name not in ("", *self.solvers):
            raise UserInputError(f"There is no solver {name}: take one of {', '.join(self.solvers)}.")
        if name and self.solvers[name] is not type(own):
            self.pipeline.scheduler = self.solvers[name].from_config(own.config, clip_sample=False)
        try:
            yield
        finally:
            self.pipeline.scheduler = own


def step_reporter(
    job: Job, what: str, stages: tuple[str, ...], first: float = 0.0
) -> Callable[[NFLDMPipeline, int, int, dict[str, Any]], dict[str, Any]]:
    """A callback for the pipeline's steps that tells a job how far it is, and stops where that was cancelled.

    Args:
        stages: latents that are sampled, in their order.
        first: share of the job that was done before.
    """

    def report(pipeline: NFLDMPipeline, step: int, timestep: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        done = stages.index(pipeline.stage) + (step + 1) / max(1, pipeline.num_timesteps)
        job.progress(first + (1 - first) * done / len(stages), what)
        return {}

    return report
