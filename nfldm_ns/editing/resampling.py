"""Samples a region of a scene anew (paper, Sec. 4: editing without training)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import UInt8

from nfldm_ns.diffusion.inpainting import Inpainting
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, StepCallback, Steps, scene_generators
from nfldm_ns.editing.blending import blend_voxels
from nfldm_ns.editing.region import Region
from nfldm_ns.editing.scenes import latents_of, require_pipeline_of, scene_code_of, with_latents
from nfldm_ns.generated.scene_files import GeneratedScene
from nfldm_ns.sampling.scenes import sampling_record
from nfldm_ns.scenes.collection import BEV_FILE

SEAM_M = 1.0
RESAMPLINGS = 3


def resample_region(
    pipeline: NFLDMPipeline,
    scene: GeneratedScene,
    region: Region,
    seed: int = 0,
    *,
    seam_m: float = SEAM_M,
    num_inference_steps: Steps | None = None,
    strength: float = 1.0,
    resamplings: int | None = None,
    jump_length: int = 3,
    source: str = "",
    bev: UInt8[np.ndarray, "height width"] | None = None,
    temperatures: Sequence[float] | None = None,
    callback_on_step_end: StepCallback | None = None,
) -> GeneratedScene:
    """Samples c in a region anew, then f given the new c, and blends the new V into the old one.

    g, the cameras and the background stay. Beyond `seam_m` metres from the region V stays bit for bit, and so do c and
    f in cells that the region does not touch.

    Args:
        scene: generated, or real as `encode_real_scene` makes it.
        seam_m: width of the soft seam around the region, in metres.
        num_inference_steps: of c and of f; None for the pipeline's own.
        strength, resamplings, jump_length: see `Inpainting`; `resamplings` are by default 3, or 1 of an outpainter.
        source: where the pipeline is from, for the record.
        bev: a semantic map of the whole scene, north up, that the new part is to follow.
        temperatures, callback_on_step_end: of the pipeline's call.

    Raises:
        UserInputError: if the scene has no latents, or is of another pipeline.
    """
    require_pipeline_of(pipeline, scene)
    latents = latents_of(pipeline, scene)
    resamplings = pipeline.default_resamplings(RESAMPLINGS) if resamplings is None else resamplings
    record = {
        "command": "nfldm-edit resample",
        "seed": seed,
        "region": {**region.description, "share": region.share},
        "seam_m": seam_m,
        "strength": strength,
        "resamplings": resamplings,
        "jump_length": jump_length,
        **sampling_record(pipeline, num_inference_steps, source),
        "sources": [scene.provenance],
    }
    if bev is not None:
        record["bev"] = BEV_FILE
    if temperatures is not None:
        record["temperatures"] = list(temperatures)
    if region.covers_nothing:
        return replace(scene, provenance=record)
    inpainting = region_inpainting(
        pipeline, scene, region, strength=strength, resamplings=resamplings, jump_length=jump_length
    )
    output = pipeline(
        1,
        scene_generators(seed, 1),
        num_inference_steps=num_inference_steps,
        scene_code=scene_code_of(pipeline, scene),
        inpainting=inpainting,
        bev=None if bev is None else torch.from_numpy(bev),
        temperatures=temperatures,
        callback_on_step_end=callback_on_step_end,
    )
    assert output.grids is not None
    grid = blend_voxels(scene.grid, output.grids.to("cpu"), region.weights(seam_m))
    sampled = replace(output.latents, global_latent=latents.global_latent)
    return with_latents(replace(scene, grid=grid, provenance=record), sampled)


def region_inpainting(pipeline: NFLDMPipeline, scene: GeneratedScene, region: Region, **settings: float) -> Inpainting:
    """What the pipeline has to sample anew for a region: the cells of c that it touches, and all of f in these.

    f is the detail that is left over of the c there, so that it cannot stay where c does not.
    """
    factor = pipeline.latent_autoencoder.downsampling
    coarse = region.cells(factor)
    fine = coarse.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    return Inpainting(latents_of(pipeline, scene), coarse, fine, **settings)  # type: ignore[arg-type]
