"""Samples scenes into folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import diffusers
import numpy as np
import torch
from jaxtyping import UInt8

from nfldm_ns.baselines.folder import baseline_folder
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, StepCallback, Steps, load_pipeline, scene_generators
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.scene_files import GeneratedScene, half_precision, renderer_of
from nfldm_ns.plugin.generated_run import write_generated_scene
from nfldm_ns.processes import ALONE, Processes
from nfldm_ns.scenes.collection import BEV_FILE
from nfldm_ns.scenes.views import index_cameras
from nfldm_ns.scenes.writing import bev_png

if TYPE_CHECKING:
    from nfldm_ns.baselines.pipeline import BaselinePipeline

    ScenePipeline: TypeAlias = NFLDMPipeline | BaselinePipeline  # what samples scenes


def load_generator(folder: Path | str) -> ScenePipeline:
    """Reads a trained generator of any kind from a folder and checks it.

    Args:
        folder: of an `NFLDMPipeline`, the name of one that comes with this package, or of a baseline or its run.

    Raises:
        UserInputError: if a component is missing, truncated, or does not fit the others.
    """
    baseline = baseline_folder(folder)
    if baseline is None:
        return load_pipeline(folder)
    from nfldm_ns.baselines.pipeline import load_baseline

    return load_baseline(baseline)


def sampling_record(pipeline: ScenePipeline, num_inference_steps: Steps | None, source: str = "") -> dict[str, Any]:
    """What makes scenes besides seeds, for their provenance; `source`: where the pipeline is from."""
    if num_inference_steps is None:
        num_inference_steps = pipeline.default_steps
    return {
        "pipeline": source,
        **pipeline.provenance(),
        "num_inference_steps": num_inference_steps,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }


def sample_scenes(
    pipeline: ScenePipeline,
    output_dir: Path | str,
    num_scenes: int,
    seed: int = 0,
    *,
    num_inference_steps: Steps | None = None,
    batch_size: int = 1,
    source: str = "",
    guidance_scale: float = 1.0,
    maps: Sequence[UInt8[np.ndarray, "height width"]] = (),
    processes: Processes = ALONE,
    compact: bool = False,
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
        compact: rounds features so that files are about half as large, see `write_generated_scene`.

    Yields:
        the folders that this process wrote.

    Raises:
        UserInputError: if the pipeline refuses the call, or what it samples is not finite.
    """
    pipeline.set_progress_bar_config(disable=True)
    num_inference_steps = pipeline.default_steps if num_inference_steps is None else num_inference_steps
    if maps:
        maps = list(maps) * num_scenes if len(maps) == 1 else maps
    with ThreadPoolExecutor(1) as writer:
        written: Future[Path] | None = None
        for first in processes.share(range(0, num_scenes, batch_size)):
            count = min(batch_size, num_scenes - first)
            chosen = maps[first : first + count]
            scenes = draw_scenes(
                pipeline,
                count,
                seed + first,
                num_inference_steps=num_inference_steps,
                source=source,
                guidance_scale=guidance_scale,
                maps=chosen,
            )
            for i, scene in enumerate(scenes):
                bev = bev_png(chosen[i], pipeline.bev_classes) if chosen else None
                if written is not None:
                    yield written.result()
                written = writer.submit(_write, scene_folder(output_dir, seed + first + i), scene, bev, compact)
        if written is not None:
            yield written.result()


def scene_folder(output_dir: Path | str, seed: int) -> Path:
    """Where the scene of a seed is."""
    return Path(output_dir) / f"scene_{seed:06d}"


def _write(folder: Path, scene: GeneratedScene, bev: bytes | None, compact: bool) -> Path:
    assert scene.cameras is not None
    write_generated_scene(
        folder,
        scene.grid,
        scene.renderer,
        scene.cameras,
        scene.latents,
        scene.provenance,
        attachments=None if bev is None else {BEV_FILE: bev},
        compact=compact,
    )
    return folder


def draw_scenes(
    pipeline: ScenePipeline,
    num_scenes: int,
    seed: int = 0,
    *,
    num_inference_steps: Steps | None = None,
    source: str = "",
    guidance_scale: float = 1.0,
    temperatures: Sequence[float] | None = None,
    maps: Sequence[UInt8[np.ndarray, "height width"]] = (),
    callback_on_step_end: StepCallback | None = None,
    command: str = "nfldm-sample",
) -> list[GeneratedScene]:
    """Samples scenes of the seeds `seed`, `seed + 1`, ... together; with one renderer, on the CPU, as files hold them.

    Args:
        source: where the pipeline is from, for the record.
        num_inference_steps: of each latent, or of g, c and f; None for the pipeline's own number.
        guidance_scale, temperatures, callback_on_step_end: of the pipeline's call.
        maps: semantic maps, north up: none, or one per scene.
        command: what samples them, for the record.

    Raises:
        UserInputError: if the pipeline refuses the call, or what it samples is not finite.
    """
    num_inference_steps = pipeline.default_steps if num_inference_steps is None else num_inference_steps
    record = {"command": command, **sampling_record(pipeline, num_inference_steps, source)}
    if guidance_scale != 1:
        record["guidance_scale"] = guidance_scale
    if temperatures is not None:
        record["temperatures"] = list(temperatures)
    if maps:
        record["bev"] = BEV_FILE
    options = {
        "guidance_scale": None if guidance_scale == 1 else guidance_scale,
        "temperatures": temperatures,
        "bev": torch.from_numpy(np.stack(maps)) if maps else None,
        "callback_on_step_end": callback_on_step_end,
    }
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    generators = scene_generators(seed, num_scenes)
    try:
        output = pipeline(num_scenes, generators, num_inference_steps=num_inference_steps, **given)
    except ValueError as error:  # what a call must not be, or a scheduler that does not fit
        raise UserInputError(f"{source or 'The pipeline'} samples no scenes from seed {seed} on: {error}.") from error
    grids, renderer = output.grids, renderer_of(pipeline.scene_autoencoder)
    assert grids is not None
    cameras, latents = output.cameras.to("cpu"), output.latents.to("cpu").state_dict()
    return [
        GeneratedScene(
            half_precision(grids[i]),
            renderer,
            index_cameras(cameras, i),
            {name: value[i] for name, value in latents.items()},
            {"seed": seed + i, **record},
        )
        for i in range(num_scenes)
    ]
