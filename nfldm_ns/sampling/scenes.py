"""Samples scenes into folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from jaxtyping import UInt8

from nfldm_ns.diffusion.pipeline import NFLDMPipeline, scene_generators
from nfldm_ns.errors import UserInputError
from nfldm_ns.plugin.generated_run import write_generated_scene
from nfldm_ns.scenes.collection import BEV_FILE
from nfldm_ns.scenes.views import index_cameras
from nfldm_ns.scenes.writing import bev_png
from nfldm_ns.training.identity import model_hash


def sampling_record(pipeline: NFLDMPipeline, num_inference_steps: int, source: str = "") -> dict[str, Any]:
    """What makes scenes besides seeds, for their provenance; `source`: where the pipeline is from."""
    return {
        "pipeline": source,
        "fine_denoiser": None if pipeline.fine_denoiser is None else model_hash(pipeline.fine_denoiser),
        "num_inference_steps": num_inference_steps,
        "scheduler": type(pipeline.scheduler).__name__,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }


def sample_scenes(
    pipeline: NFLDMPipeline,
    output_dir: Path | str,
    num_scenes: int,
    seed: int = 0,
    *,
    num_inference_steps: int = 30,
    batch_size: int = 1,
    source: str = "",
    guidance_scale: float = 1.0,
    maps: Sequence[UInt8[np.ndarray, "height width"]] = (),
    compact: bool = False,
) -> Iterator[Path]:
    """Samples scenes and writes each as a folder `scene_<seed + i>`, as it becomes ready.

    Args:
        source: where the pipeline is from, for the record.
        guidance_scale: of the pipeline's call.
        maps: semantic maps, north up: none, one for all scenes, or one per scene. A scene's folder gets its own as
            `bev.png`, as scenes of collections have them.
        compact: rounds features so that files are about half as large, see `write_generated_scene`.

    Yields:
        the folders.

    Raises:
        UserInputError: if the pipeline refuses the call, or what it samples is not finite.
    """
    pipeline.set_progress_bar_config(disable=True)
    record = {"command": "nfldm-sample", **sampling_record(pipeline, num_inference_steps, source)}
    if guidance_scale != 1:
        record["guidance_scale"] = guidance_scale
    if maps:
        record["bev"] = BEV_FILE
        maps = list(maps) * num_scenes if len(maps) == 1 else maps
    for first in range(0, num_scenes, batch_size):
        count = min(batch_size, num_scenes - first)
        chosen = maps[first : first + count]
        try:
            output = pipeline(
                count,
                scene_generators(seed + first, count),
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                bev=torch.from_numpy(np.stack(chosen)) if chosen else None,
            )
        except ValueError as error:  # what a call must not be, or a scheduler that does not fit
            raise UserInputError(
                f"{source or 'The pipeline'} samples no scenes from seed {seed + first} on: {error}."
            ) from error
        grids = output.grids
        assert grids is not None
        for i in range(count):
            scene_seed = seed + first + i
            folder = Path(output_dir) / f"scene_{scene_seed:06d}"
            write_generated_scene(
                folder,
                grids[i].to("cpu"),
                pipeline.scene_autoencoder,
                index_cameras(output.cameras.to("cpu"), i),
                {name: value[i] for name, value in output.latents.to("cpu").state_dict().items()},
                {"seed": scene_seed, **record},
                attachments={BEV_FILE: bev_png(chosen[i], pipeline.bev_classes)} if chosen else None,
                compact=compact,
            )
            yield folder
