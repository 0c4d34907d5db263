"""What it helps to tell denoisers what is known of a scene, beside resampling (RePaint) of others.

    python benchmarks/outpainting.py --voxels V --pipeline OUTPAINTER [--plain GENERATOR] --output-dir OUT

Held-out places, of whose c and f a part is known: a side, two sides or all but a box. The rest is sampled with the
place's own g and cameras by both generators. Reported are

- error of v: mean squared, in the unknown cells of c, over ten levels of noise, of either generator, told and untold;
- error at the seam: of the sampled c beside the known part, in units of its variance over places (1: the mean place,
  2: any other place), and farther away, where no method can know;
- step at the seam: mean absolute difference of the occupancy of neighbouring columns of V on both sides of the border,
  as a multiple of that of the real place's V there;
- processor seconds.

Writes `outpainting.json`, `outpainting.md` and `outpainting.png`: for some places the real one, the known part, and
what each method makes of it, from above.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nfldm_ns.choice import evenly
from nfldm_ns.diffusion.inpainting import Inpainting
from nfldm_ns.diffusion.latent_memory import LatentMemory, encode_latents
from nfldm_ns.diffusion.outpainting import Kind, draw_known_cells, to_columns
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, load_pipeline, scene_generators
from nfldm_ns.diffusion.training import NOISE_LEVELS, DiffusionTrainingConfig, training_scheduler
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.scene_latents import SceneLatents
from nfldm_ns.latents.voxel_store import VoxelStore
from nfldm_ns.models import GENERATOR
from nfldm_ns.reports.galleries import density_from_above, stack, strip, write_png
from nfldm_ns.reports.report import Table
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.scenes.writing import require_writable, write_json
from shared.comparisons import use_threads
from shared.running import run, write_tables

KINDS: tuple[Kind, ...] = ("side", "l_shape", "all_but_a_box")
SHOWN = 6


@dataclass
class Options:
    """Measure an outpainter."""

    voxels: Path
    """encoded scenes, whose held-out ones are completed"""
    pipeline: Path
    """a generator trained with --outpainting"""
    output_dir: Path
    """folder for the results"""
    plain: Path = Path(GENERATOR)
    """the generator that is resampled instead"""
    num_scenes: int = 24
    """held-out places; each has a known part of one kind"""
    num_inference_steps: int = 20
    """denoising steps of c and f"""
    walks: tuple[int, ...] = (1, 2, 3)
    """resamplings of the generator that is not told"""
    seed: int = 0
    """of known parts and noise"""
    threads: int = 1
    """CPU threads"""


def velocity_error(
    pipeline: NFLDMPipeline, memory: LatentMemory, known: Bool[Tensor, "places yc xc"], told: bool, seed: int
) -> float:
    """Mean squared error of v in unknown cells of c, at the middles of ten equal parts of the noise's schedule."""
    denoiser = pipeline.coarse_denoiser
    scheduler = training_scheduler(DiffusionTrainingConfig())
    clean = memory.coarse[:, 0].float().flatten(1, 2)
    extra = {"known": clean, "known_cells": known} if told else {}
    unknown = (~known)[:, None].expand_as(clean)
    errors = []
    for level in range(NOISE_LEVELS):
        timestep = torch.full((len(clean),), (2 * level + 1) * 1000 // (2 * NOISE_LEVELS))
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed + level))
        noisy = scheduler.add_noise(denoiser.latent(clean), noise, timestep)
        predicted = denoiser(noisy, timestep, scene_code=memory.scene_code[:, 0], **extra)
        target = scheduler.get_velocity(denoiser.latent(clean), noise, timestep)
        errors.append(float((predicted - target)[unknown].square().mean()))
    return sum(errors) / len(errors)


def beside(known: Bool[Tensor, "yc xc"]) -> Bool[Tensor, "yc xc"]:
    """Unknown cells with a known one beside them."""
    near = F.max_pool2d(known[None].float(), 3, 1, 1)[0] > 0
    return near & ~known


def seam_step(grid: VoxelGrid, known: Bool[Tensor, "yc xc"], scale: int) -> float:
    """Sum of absolute differences of occupancies over the border of the known part."""
    columns = to_columns(known, scale)
    occupancy = 1 - torch.exp(-grid.density[0, 0].float() * float(grid.voxel_size[2]))
    total = 0.0
    for axis in (0, 1):
        first, second = (columns.narrow(axis, i, columns.shape[axis] - 1) for i in (0, 1))
        border = first != second
        low, high = (occupancy.narrow(axis + 1, i, columns.shape[axis] - 1) for i in (0, 1))
        total += float((high - low).abs()[:, border].sum())
    return total


@torch.inference_mode()
def complete(
    pipeline: NFLDMPipeline, latents: SceneLatents, code: Tensor, known: Tensor, seed: int, walks: int, steps: int
) -> tuple[SceneLatents, VoxelGrid]:
    """A place of which a part is known."""
    scale = pipeline.latent_autoencoder.downsampling
    inpainting = Inpainting(latents, ~known, to_columns(~known, scale), resamplings=walks)
    output = pipeline(1, scene_generators(seed, 1), num_inference_steps=steps, scene_code=code, inpainting=inpainting)
    assert output.grids is not None
    return output.latents, output.grids


def only_known(grid: VoxelGrid, known: Bool[Tensor, "yc xc"], scale: int) -> VoxelGrid:
    return replace(grid, density=grid.density * to_columns(known, scale))


def main(options: Options) -> None:
    use_threads(options.threads)
    require_writable(options.output_dir)
    told, plain = (load_pipeline(folder) for folder in (options.pipeline, options.plain))
    if not told.outpaints:
        raise UserInputError(f"{options.pipeline} is no outpainter: train one with --outpainting.")
    for pipeline in (told, plain):
        pipeline.set_progress_bar_config(disable=True)
    store = VoxelStore.open(options.voxels)
    scenes = evenly(store.splits["test"], options.num_scenes)
    if len(scenes) < 2:
        raise UserInputError("Errors are compared with how places differ: give at least 2, by --num-scenes and voxels.")
    stage2 = told.latent_autoencoder
    cameras = told.global_denoiser.config.num_cameras
    with torch.inference_mode():
        memory = encode_latents(store, stage2, scenes, False, cameras)
    generator = torch.Generator().manual_seed(options.seed)
    size = (stage2.coarse_shape[2], stage2.coarse_shape[3])
    known = torch.stack([draw_known_cells(size, generator, KINDS[i % len(KINDS)]) for i in range(len(scenes))])
    methods = {f"not told, {walks} walks": (plain, walks) for walks in options.walks} | {"told, 1 walk": (told, 1)}
    found: dict[str, Any] = {"scenes": len(scenes), "num_inference_steps": options.num_inference_steps}
    with torch.inference_mode():
        variants = {"plain": (plain, False), "outpainter, untold": (told, False), "outpainter, told": (told, True)}
        found["velocity_error"] = {
            name: velocity_error(pipeline, memory, known, tell, options.seed)
            for name, (pipeline, tell) in variants.items()
        }
    results, rows = _completions(methods, memory, known, stage2.downsampling, options)
    found["methods"] = results
    names = ("error at the seam", "error farther", "step at the seam", "processor seconds")
    table = [[name, *(values[key] for key in names)] for name, values in results.items()]
    told_of_v = ", ".join(f"{name} {value:.4f}" for name, value in found["velocity_error"].items())
    caption = f"{len(scenes)} held-out places. Mean squared error of v in unknown cells: {told_of_v}."
    wanted = Table(("method", *names), table, caption, digits=(0, 3, 3, 3, 2))
    write_json(options.output_dir / "outpainting.json", found)
    write_png(options.output_dir / "outpainting.png", stack(rows))
    write_tables(options.output_dir / "outpainting.md", [wanted])


def _completions(
    methods: dict[str, tuple[NFLDMPipeline, int]],
    memory: LatentMemory,
    known: Bool[Tensor, "places yc xc"],
    scale: int,
    options: Options,
) -> tuple[dict[str, dict[str, float]], list[Float[Tensor, "3 height width"]]]:
    """What each method makes of each place, the methods in turns; and a row of pictures of the first places."""
    variance = memory.coarse[:, 0].float().var(0).mean()
    sums: dict[str, list[Tensor]] = {name: [] for name in methods}
    rows = []
    for place in range(len(memory)):
        latents = SceneLatents(
            memory.scene_code[place : place + 1, 0, : memory.scene_code.shape[-1] - 5 * memory.num_cameras],
            memory.coarse[place : place + 1, 0].float(),
            memory.fine[place : place + 1, 0].float(),
        )
        seam = beside(known[place])
        far = ~known[place] & ~seam
        pictures = []
        for name, (pipeline, walks) in methods.items():
            if not pictures:
                with torch.inference_mode():
                    real = pipeline.latent_autoencoder.decode(latents)
                pictures = [density_from_above(real)[0], density_from_above(only_known(real, known[place], scale))[0]]
                true_step = seam_step(real, known[place], scale)
            begun = time.process_time()
            code, seed = memory.scene_code[place : place + 1, 0], options.seed + place
            made, grid = complete(pipeline, latents, code, known[place], seed, walks, options.num_inference_steps)
            seconds = time.process_time() - begun
            error = (made.coarse - latents.coarse)[0].square().mean((0, 1)) / variance
            step = seam_step(grid, known[place], scale)
            values = [error[seam].sum(), seam.sum(), error[far].sum(), far.sum(), step, true_step, seconds]
            sums[name].append(torch.tensor([float(value) for value in values]))
            pictures.append(density_from_above(grid)[0])
        if place < SHOWN:
            rows.append(strip([F.interpolate(p[None], scale_factor=3.0)[0] for p in pictures]))
    results = {}
    for name, values in sums.items():
        total = torch.stack(values).sum(0)
        results[name] = {
            "error at the seam": float(total[0] / total[1].clamp(min=1)),
            "error farther": float(total[2] / total[3].clamp(min=1)),
            "step at the seam": float(total[4] / total[5].clamp(min=1e-9)),
            "processor seconds": float(total[6]) / len(values),
        }
    return results, rows


if __name__ == "__main__":
    run(main, Options, __doc__)
