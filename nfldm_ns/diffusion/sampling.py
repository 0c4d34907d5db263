"""Samples scenes into folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch

from nfldm_ns.diffusion.pipeline import NFLDMPipeline, scene_generators
from nfldm_ns.generated.writing import write_generated_scene
from nfldm_ns.latents.voxel_store import model_hash
from nfldm_ns.scenes.views import index_cameras


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
) -> Iterator[Path]:
    """Samples scenes and writes each as a folder `scene_<seed + i>`, as it becomes ready.

    Args:
        source: where the pipeline is from, for the record.

    Yields:
        the folders.
    """
    pipeline.set_progress_bar_config(disable=True)
    record = {"command": "nfldm-sample", **sampling_record(pipeline, num_inference_steps, source)}
    for first in range(0, num_scenes, batch_size):
        count = min(batch_size, num_scenes - first)
        output = pipeline(count, scene_generators(seed + first, count), num_inference_steps=num_inference_steps)
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
            )
            yield folder
