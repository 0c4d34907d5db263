"""Scenes between two scenes, through the noise they were sampled from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.diffusion.call_checks import check_steps
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, Steps, scene_generators
from nfldm_ns.diffusion.windows import slerp
from nfldm_ns.editing.scenes import latents_of, require_pipeline_of, with_latents
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.cameras import fly_through
from nfldm_ns.generated.scene_files import GeneratedScene, half_precision
from nfldm_ns.plugin.generated_run import render_views
from nfldm_ns.sampling.scenes import sampling_record
from nfldm_ns.scenes.views import index_cameras

SAME = 0.05  # largest difference of latents, whose unit is about their standard deviation, that rounding may make


@torch.no_grad()
def interpolate_scenes(
    pipeline: NFLDMPipeline,
    first: GeneratedScene,
    second: GeneratedScene,
    num_frames: int,
    *,
    num_inference_steps: Steps | None = None,
    source: str = "",
) -> Iterator[GeneratedScene]:
    """Scenes from `first` to `second`, whose noise of g, c and f lies between theirs on a great circle.

    The first and the last are the given scenes themselves.

    Args:
        first, second: sampled by this pipeline, whose seeds are in their provenance.
        num_frames: at least 2, with both ends.
        num_inference_steps: that they were sampled with; None for what the first one's record says, or the pipeline's
            own.
        source: where the pipeline is from, for the record.

    Raises:
        UserInputError: if a scene is not what its seed gives, so that its noise is unknown.
    """
    if num_frames < 2:
        raise UserInputError(f"{num_frames} frames do not reach from one scene to the other: give at least 2.")
    steps = _steps_of(first, pipeline) if num_inference_steps is None else num_inference_steps
    ends = [_noise_of(pipeline, scene, steps) for scene in (first, second)]
    record = {
        "command": "nfldm-edit interpolate",
        "seeds": [scene.provenance["seed"] for scene in (first, second)],
        **sampling_record(pipeline, steps, source),
        "sources": [first.provenance, second.provenance],
    }
    yield first
    for i in range(1, num_frames - 1):
        share = i / (num_frames - 1)
        noise = [slerp(a, b, share) for a, b in zip(*ends, strict=True)]
        output = pipeline(1, noise=noise, num_inference_steps=steps)
        assert output.grids is not None
        scene = GeneratedScene(
            half_precision(output.grids),
            first.renderer,
            index_cameras(output.cameras.to("cpu"), 0),
            provenance={**record, "share": share},
        )
        yield with_latents(scene, output.latents)
    yield second


def _steps_of(scene: GeneratedScene, pipeline: NFLDMPipeline) -> Steps:
    """What its record says, which is a list for other steps of each latent."""
    found = scene.provenance.get("num_inference_steps", pipeline.default_steps)
    try:
        check_steps(found)
    except (TypeError, ValueError) as error:
        name = scene.provenance.get("folder", "a scene")
        raise UserInputError(f"The record of {name} is damaged ({error}): give --num-inference-steps.") from None
    return tuple(found) if isinstance(found, list) else found


def _noise_of(pipeline: NFLDMPipeline, scene: GeneratedScene, num_inference_steps: Steps) -> list[Tensor]:
    """The noise that a scene was sampled from, made sure of by sampling its latents again."""
    require_pipeline_of(pipeline, scene)
    latents, seed = latents_of(pipeline, scene), scene.provenance.get("seed")
    if "bev" in scene.provenance:
        name = scene.provenance.get("folder", "A scene")
        raise UserInputError(f"{name} was sampled with a map, which has no way to another: give scenes without maps.")
    known = isinstance(seed, int)
    if known:
        noise = pipeline.draw_noise(1, scene_generators(seed, 1))  # type: ignore[arg-type]
        again = pipeline(1, noise=noise, num_inference_steps=num_inference_steps, output_type="latent").latents
        known = all(
            torch.allclose(value, expected, atol=SAME, rtol=SAME)
            for value, expected in zip(again.state_dict().values(), latents.state_dict().values(), strict=True)
        )
    if not known:
        name = scene.provenance.get("folder", "A scene")
        raise UserInputError(
            f"{name} is not what this pipeline makes of the seed {seed} in {num_inference_steps} steps, so its noise "
            "is unknown: give scenes of nfldm-sample, their pipeline and their --num-inference-steps."
        )
    return noise


def interpolation_frames(
    scenes: Iterable[GeneratedScene], cameras: Cameras, num_frames: int, turn: bool
) -> Iterator[Float[Tensor, "3 height width"]]:
    """One picture of each of some scenes, all seen by the first of the cameras, or by one that turns once around.

    Args:
        cameras: batch shape `[N]`, those of one of the scenes.
        num_frames: how many scenes there are.
    """
    path = fly_through(cameras, num_frames) if turn else None
    for i, scene in enumerate(scenes):
        camera = index_cameras(cameras if path is None else path, slice(0, 1) if path is None else slice(i, i + 1))
        yield render_views(replace(scene, cameras=None), camera).images[0]
