"""The pipeline as diffusers' users know it: another scheduler, a callback at each step, latents instead of voxels.

    python examples/schedulers_and_callbacks.py

Samples the same noise with three of diffusers' schedulers, and prints how far f is from its mean at each step.
"""

from __future__ import annotations

from typing import Any

import tyro
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from nfldm_ns.diffusion.pipeline import NFLDMPipeline, load_pipeline, scene_generators
from nfldm_ns.models import GENERATOR

SCHEDULERS = (DPMSolverMultistepScheduler, UniPCMultistepScheduler, DDIMScheduler)


def main(pipeline: str = GENERATOR, seed: int = 0, num_inference_steps: int = 12) -> None:
    generator = load_pipeline(pipeline)
    generator.set_progress_bar_config(disable=True)
    spread: list[float] = []

    def watch(_: NFLDMPipeline, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        spread.append(float(tensors["latents"].std()))
        return tensors

    for scheduler in SCHEDULERS:
        generator.scheduler = scheduler.from_config(generator.scheduler.config)
        spread.clear()
        scenes = generator(
            1,
            scene_generators(seed, 1),
            num_inference_steps=num_inference_steps,
            output_type="latent",
            callback_on_step_end=watch,
        )
        fine = [round(value, 2) for value in spread[-num_inference_steps:]]
        print(f"{scheduler.__name__}: f {tuple(scenes.latents.fine.shape)}, standard deviation by step {fine}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
