"""How long a paper-size room takes to sample."""

from __future__ import annotations

import torch

from gpu.findings import Bar, Findings
from gpu.measuring import Memory, median_seconds
from gpu.sizes import Sizes
from gpu.trainings import latent_autoencoder, random_latents, scene_autoencoder
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, assemble_pipeline, scene_generators
from nfldm_ns.diffusion.training import STAGES, make_scheduler, new_denoiser
from nfldm_ns.method_configs.latent_presets import DIFFUSION_PRESETS
from nfldm_ns.method_configs.presets import SCENE_AUTOENCODER

SECONDS = 2.0  # bar, of a room sampled alone
TOGETHER = 4  # rooms


def sample(findings: Findings, device: str, sizes: Sizes) -> None:
    """Rooms by networks of the preset's sizes with random weights, decoded to voxels.

    Numbers by the denoisers' precision, `fp32` and `bf16`: `seconds` of a room, `seconds_together` (a room of four
    sampled together), `peak_gib`.
    """
    pipeline = None
    with findings.attempt("networks"):
        pipeline = random_pipeline(sizes).to(device)
        pipeline.set_progress_bar_config(disable=True)
    if pipeline is None:
        return
    findings.numbers["steps"] = sizes.num_inference_steps
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with findings.attempt(name):
            findings.numbers[name] = seconds_of_rooms(pipeline.to(dtype), device, sizes)
    found = [findings.numbers[name]["seconds"] for name in ("fp32", "bf16") if name in findings.numbers]
    if found:
        findings.bars.append(Bar("seconds of a room", min(found), SECONDS, at_most=True))


def random_pipeline(sizes: Sizes) -> NFLDMPipeline:
    """All stages of the preset, untrained, on the CPU."""
    torch.manual_seed(0)
    preset, stage1, latents = DIFFUSION_PRESETS[sizes.preset], scene_autoencoder(sizes), latent_autoencoder(sizes)
    memory = random_latents(2, latents, SCENE_AUTOENCODER[sizes.preset].num_source_views)
    denoisers = [new_denoiser(stage, preset.models[stage], memory, latents) for stage in STAGES]
    return assemble_pipeline(stage1, latents, *denoisers, scheduler=make_scheduler())  # type: ignore[arg-type]


@torch.no_grad()
def seconds_of_rooms(pipeline: NFLDMPipeline, device: str, sizes: Sizes) -> dict[str, float]:
    """Of a room alone and of one among four; what is measured is bounded by `budget_s`, the first room not."""
    memory = Memory(device)

    def rooms(count: int) -> None:
        output = pipeline(count, scene_generators(0, count), num_inference_steps=sizes.num_inference_steps)
        if output.grids is None or not bool(output.grids.density.isfinite().all()):
            raise ValueError("the densities of a sampled room are not finite")

    alone = median_seconds(lambda: rooms(1), device, sizes.repeats, sizes.budget_s)
    together = median_seconds(lambda: rooms(TOGETHER), device, 1, sizes.budget_s) / TOGETHER
    return {"seconds": alone, "seconds_together": together, "peak_gib": memory.peak_gib()}
