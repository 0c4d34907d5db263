"""Answers of a reconstruction as folders of generated scenes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.diffusion.pipeline import NFLDMPipeline
from nfldm_ns.plugin.generated_run import write_generated_scene
from nfldm_ns.reconstruction.prior_refinement import PriorRefinement
from nfldm_ns.reconstruction.reconstruction import ReconstructionConfig, SeenPlace, reconstruct_seen
from nfldm_ns.sampling.scenes import sampling_record
from nfldm_ns.scenes.views import Views


def write_answers(
    pipeline: NFLDMPipeline,
    views: Views,
    output_dir: Path,
    num_answers: int = 1,
    seed: int = 0,
    config: ReconstructionConfig | None = None,
    perceptual: PerceptualNetwork | None = None,
    record: Mapping[str, Any] | None = None,
    refinement: PriorRefinement | None = None,
) -> Iterator[Path]:
    """Reconstructs a place `num_answers` times and writes each answer as `answer_<seed + i>`, as it becomes ready.

    Args:
        views: see `reconstruct_scene`.
        refinement: of the voxels by a prior of images.
        record: what else belongs into the provenance: the source of the pipeline and of the images.

    Yields:
        the folders. Their training views are the given cameras and others around them, rendered.
    """
    config = config or ReconstructionConfig()
    seen = SeenPlace.of(pipeline, views, config)
    known = float(seen.visibility.columns.float().mean())
    for answer_seed in range(seed, seed + num_answers):
        answer = reconstruct_seen(pipeline, seen, answer_seed, config, perceptual, refinement)
        folder = output_dir / f"answer_{answer_seed:06d}"
        provenance = {
            "command": "nfldm-reconstruct",
            "seed": answer_seed,
            **sampling_record(pipeline, config.num_inference_steps),
            "images": views.shape[1],
            "seen_share": round(known, 4),
            **(record or {}),
        }
        latents = {name: value[0] for name, value in answer.latents.to("cpu").state_dict().items()}
        with torch.no_grad():
            write_generated_scene(
                folder, answer.grid.to("cpu"), pipeline.scene_autoencoder, answer.cameras, latents, provenance
            )
        yield folder
