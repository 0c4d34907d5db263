"""Samples scenes into folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from jaxtyping import UInt8

from nfldm_ns.diffusion.pipeline import NFLDMPipeline, NFLDMPipelineOutput, scene_generators
from nfldm_ns.errors import UserInputError
from nfldm_ns.plugin.generated_run import write_generated_scene
from nfldm_ns.processes import ALONE, Processes
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
    num_inference_steps: int | None = None,
    batch_size: int = 1,
    source: str = "",
    guidance_scale: float = 1.0,
    maps: Sequence[UInt8[np.ndarray, "height width"]] = (),
    processes: Processes = ALONE,
) -> Iterator[Path]:
    """Samples scenes and writes each as a folder `scene_<seed + i>`, as it becomes ready.

    A scene's views are rendered and written by a second thread while the next scenes are sampled.

    Args:
        num_inference_steps: of each latent; None for the pipeline's own number.
        source: where the pipeline is from, for the record.
        guidance_scale: of the pipeline's call.
        maps: semantic maps, north up: none, one for all scenes, or one per scene. A scene's folder gets its own as
            `bev.png`, as scenes of collections have them.
        processes: those that share the batches.

    Yields:
        the folders that this process wrote.

    Raises:
        UserInputError: if the pipeline refuses the call, or what it samples is not finite.
    """
    pipeline.set_progress_bar_config(disable=True)
    num_inference_steps = pipeline.default_steps if num_inference_steps is None else num_inference_steps
    record = {"command": "nfldm-sample", **sampling_record(pipeline, num_inference_steps, source)}
    if guidance_scale != 1:
        record["guidance_scale"] = guidance_scale
    if maps:
        record["bev"] = BEV_FILE
        maps = list(maps) * num_scenes if len(maps) == 1 else maps
    with ThreadPoolExecutor(1) as writer:
        written: Future[Path] | None = None
        for first in processes.share(range(0, num_scenes, batch_size)):
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
            for i in range(count):
                bev = bev_png(chosen[i], pipeline.bev_classes) if chosen else None
                if written is not None:
                    yield written.result()
                written = writer.submit(
                    _write, Path(output_dir), pipeline, output, i, {"seed": seed + first + i, **record}, bev
                )
        if written is not None:
            yield written.result()


def scene_folder(output_dir: Path | str, seed: int) -> Path:
    """Where the scene of a seed is."""
    return Path(output_dir) / f"scene_{seed:06d}"


def _write(
    output_dir: Path,
    pipeline: NFLDMPipeline,
    output: NFLDMPipelineOutput,
    i: int,
    provenance: dict[str, Any],
    bev: bytes | None,
) -> Path:
    """Writes scene i of a batch."""
    assert output.grids is not None
    folder = scene_folder(output_dir, provenance["seed"])
    write_generated_scene(
        folder,
        output.grids[i].to("cpu"),
        pipeline.scene_autoencoder,
        index_cameras(output.cameras.to("cpu"), i),
        {name: value[i] for name, value in output.latents.to("cpu").state_dict().items()},
        provenance,
        attachments=None if bev is None else {BEV_FILE: bev},
    )
    return folder
