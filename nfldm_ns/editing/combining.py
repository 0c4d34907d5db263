"""Joins scenes (paper, Sec. 4: combining voxels), and harmonises their seams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nfldm_ns.diffusion.pipeline import NFLDMPipeline
from nfldm_ns.editing.blending import blend_voxels
from nfldm_ns.editing.region import Region, union
from nfldm_ns.editing.resampling import SEAM_M, resample_region
from nfldm_ns.editing.scenes import encode_again, require_joinable
from nfldm_ns.generated.scene_files import GeneratedScene


def combine_scenes(
    scenes: Sequence[GeneratedScene], regions: Sequence[Region], seam_m: float = SEAM_M
) -> GeneratedScene:
    """The first scene with each further one in its region; where regions overlap, the later scene is seen.

    Beyond `seam_m` metres from all regions V is that of the first scene bit for bit, and in a region that of its scene
    (beyond the seams of later ones). The background and the cameras are those of the first scene. Voxels alone are
    joined: the result has no latents (see `encode_again`).

    Args:
        scenes: generated, real, refined: any of one box and one decoder.
        regions: one for each scene but the first.
        seam_m: width of the soft seam around each region, in metres.

    Raises:
        UserInputError: if the scenes are of different boxes or decoders.
        ValueError: unless there is a region for each further scene.
    """
    if len(scenes) < 2 or len(regions) != len(scenes) - 1:
        raise ValueError(f"{len(scenes)} scenes need {max(1, len(scenes) - 1)} regions, not {len(regions)}")
    require_joinable(scenes)
    grid = scenes[0].grid
    for scene, region in zip(scenes[1:], regions, strict=True):
        grid = blend_voxels(grid, scene.grid, region.weights(seam_m))
    record = {
        "command": "nfldm-edit combine",
        "regions": [{**region.description, "share": region.share} for region in regions],
        "seam_m": seam_m,
        "sources": [scene.provenance for scene in scenes],
    }
    return replace(scenes[0], grid=grid, latents={}, provenance=record)


def harmonise_seams(
    pipeline: NFLDMPipeline,
    scene: GeneratedScene,
    regions: Sequence[Region],
    seed: int = 0,
    *,
    strength: float = 0.4,
    seam_m: float = SEAM_M,
    **settings: Any,
) -> GeneratedScene:
    """Denoises the seams of joined scenes for a short while, so that the two sides grow together.

    The joined V is encoded by stage 2; c, then f, are noised to a small time and denoised where a seam is; V is blended
    in there. Elsewhere it stays bit for bit.

    Args:
        scene: what `combine_scenes` returned.
        regions: its regions.
        strength: share of the denoising steps that are walked: how far the seams may move away from what was joined.
        seam_m: as for joining; what is denoised reaches so far to both sides, and at least one voxel.
        settings: of `resample_region`.
    """
    voxel = float(scene.grid.voxel_size[:2].max())
    seams = union([region.border(max(seam_m, 1.01 * voxel)) for region in regions])
    harmonised = resample_region(
        pipeline, encode_again(pipeline, scene), seams, seed, strength=strength, seam_m=seam_m, **settings
    )
    harmony = {k: v for k, v in harmonised.provenance.items() if k not in ("command", "sources", "region")}
    return replace(harmonised, provenance={**scene.provenance, "harmonised": harmony})
