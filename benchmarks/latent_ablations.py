"""Variants of stage 2 trained equally long on the same encoded scenes, judged on held-out places.

    python benchmarks/latent_ablations.py --voxels VOXELS --group levels --steps 250 --output-dir OUT [--seeds 0 1]

Every variant of a group is the preset (`--base`) with a few changes: `GROUPS` below. It is trained with the preset's
losses and its schedule shortened to `--steps`; seeds and batches are the same for all. Each variant leaves
`<group>-<variant>-seed<seed>.json`, and its run in `runs/`; an interrupted run continues, and what is in two groups is
trained once. Prints a table, beside V as stage 1 made it.

Needs the weights of LPIPS (`nfldm-weights get lpips-vgg`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nfldm_ns.choice import evenly
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder
from nfldm_ns.latents.round_trip import evaluate_round_trip
from nfldm_ns.latents.training import LatentLossConfig, LatentTrainingConfig, train_latent_autoencoder, voxel_loss
from nfldm_ns.latents.voxel_store import VoxelStore
from nfldm_ns.method_configs.latent_presets import LATENT_PRESETS, LatentPreset
from nfldm_ns.pretrained.weights import load_lpips
from nfldm_ns.reports.report import Table
from nfldm_ns.training.options import precision_here
from shared.comparisons import VariantOptions, find_result, stored
from shared.running import run

Change = Callable[[dict[str, Any]], dict[str, Any]]


def downsampling(factor: int) -> Change:
    """c coarser than V by `factor`: the networks' lowest resolutions are repeated or left out."""

    def change(model: dict[str, Any]) -> dict[str, Any]:
        levels = factor.bit_length()
        finest_first = tuple(model[ENCODER]), tuple(reversed(model[DECODER]))
        encoder, decoder = ((widths + widths[-1:] * levels)[:levels] for widths in finest_first)
        return {ENCODER: encoder, DECODER: tuple(reversed(decoder))}

    return change


def settings(**changes: Any) -> Change:
    """Other arguments of `LatentAutoencoder`."""
    return lambda model: changes


ENCODER, DECODER = "encoder_channels", "decoder_channels"
GROUPS: dict[str, dict[str, Change]] = {
    "downsampling": {f"c / {factor}": downsampling(factor) for factor in (16, 8, 4)},
    "levels": {
        "c": settings(use_fine=False, use_global=False),
        "c + f": settings(use_global=False),
        "c + f + g": settings(),
    },
    "density": {
        "log": settings(density_transform="log"),
        "alpha": settings(density_transform="alpha"),
        "linear": settings(density_transform="none"),
    },
}


@dataclass(kw_only=True)
class Options(VariantOptions):
    """Train and compare variants of stage 2."""

    voxels: Path
    """encoded scenes, from nfldm-encode"""
    steps: int = 250
    """training steps of each"""
    num_eval_scenes: int | None = None
    """test scenes, evenly chosen; by default all"""


def model_arguments(preset: LatentPreset, change: Change) -> dict[str, Any]:
    """All arguments of a variant, those that are left to their defaults included."""
    with torch.device("meta"):
        model = dict(LatentAutoencoder(**preset.model).config)  # type: ignore[arg-type]
    given = {name: value for name, value in model.items() if not name.startswith("_")}
    return {**given, **change(given)}


def train(
    store: VoxelStore, folder: Path, model_config: dict[str, Any], preset: LatentPreset, lpips: nn.Module
) -> tuple[LatentAutoencoder, dict[str, Any]]:
    """A trained variant, how long this took since it was started or resumed, and its size."""
    start = time.monotonic()
    model = train_latent_autoencoder(store, folder, model_config, preset.training, lpips=lpips)
    parameters = sum(p.numel() for p in model.parameters())
    return model, {"seconds": round(time.monotonic() - start, 1), "parameters": parameters}


@torch.inference_mode()
def voxel_errors(model: LatentAutoencoder, store: VoxelStore, scene_ids: list[str]) -> dict[str, float]:
    """Errors of V after the round trip.

    Returns:
        `voxel_loss`, the training loss of normalised voxels, and `opacity_error`, the mean absolute error of a voxel's
        opacity, which does not depend on how the density is transformed.
    """
    device = next(model.parameters()).device
    sums = {"voxel_loss": 0.0, "opacity_error": 0.0}
    for scene_id in scene_ids:
        grid = store.grid([scene_id]).to(device)
        result, code = model(grid, sample=False), model.voxel_code
        loss = voxel_loss(result.reconstruction, result.target, grid, code, LatentLossConfig())
        error = (code.alpha(result.grid.density) - code.alpha(grid.density)).abs().mean()
        sums["voxel_loss"] += float(loss) / len(scene_ids)
        sums["opacity_error"] += float(error) / len(scene_ids)
    return sums


def open_store(folder: Path) -> VoxelStore:
    """Encoded scenes; raises `UserInputError` if none are held out."""
    store = VoxelStore.open(folder)
    if not store.splits["test"]:
        raise UserInputError(f"{store.root} has no held-out scenes: encode a collection that has a test split.")
    return store


def main(options: Options) -> None:
    variants = options.begin(GROUPS, LATENT_PRESETS)
    store = open_store(options.voxels)
    scene_ids = evenly(store.splits["test"], options.num_eval_scenes or len(store.splits["test"]))
    scene_autoencoder, collection = store.load_autoencoder(), store.load_collection()
    lpips = load_lpips("vgg").to("cuda" if torch.cuda.is_available() else "cpu")
    preset = LATENT_PRESETS[options.base]
    judged = {"scene_autoencoder": store.autoencoder_hash, "scenes": store.splits["train"], "judged": scene_ids}

    def run(folder: Path, made_with: dict[str, Any], training: LatentTrainingConfig) -> dict[str, Any]:
        if (known := find_result(options.output_dir, made_with)) is not None:
            return known
        model_config = made_with["model"]
        model, measured = train(store, folder, model_config, replace(preset, training=training), lpips)
        views = evaluate_round_trip(
            scene_autoencoder, model, store, collection, scene_ids, lpips=lpips, ablations=False
        )
        return {"training": measured, "voxels": voxel_errors(model, store, scene_ids), **views}

    rows: list[list[Any]] = []
    for name, change in variants.items():
        model_config = model_arguments(preset, change)
        for seed in options.seeds:
            precision = precision_here(None) or preset.training.schedule.mixed_precision
            schedule = replace(preset.training.schedule, max_steps=options.steps, seed=seed, mixed_precision=precision)
            training = replace(preset.training, schedule=schedule)
            path = options.result(name, seed)
            made_with = {**judged, "model": model_config, "training": asdict(training)}
            result = stored(path, made_with, partial(run, options.output_dir / "runs" / path.stem, made_with, training))
            if not rows:
                rows.append(["V of stage 1", None, *cells(result["stage1"]), *[None] * 6])
            rows.append([name, seed, *cells(result["stage2"]), *other_cells(result)])
            print(f"{path}: PSNR {result['stage2']['psnr']:.2f} dB, {result['training']['seconds']} s", flush=True)
    caption = f"`{options.group}`: `{options.base}` for {options.steps} steps, {len(scene_ids)} held-out scenes."
    print("\n" + Table(COLUMNS, rows, caption, digits=DIGITS).markdown())


COLUMNS = (
    "",
    "seed",
    "PSNR (dB)",
    "SSIM",
    "LPIPS (VGG)",
    "depth error (m)",
    "voxel loss",
    "opacity error",
    "perplexity of c",
    "perplexity of f",
    "seconds",
    "parameters",
)
DIGITS = (0, 0, 2, 3, 3, 2, 4, 4, 0, 0, 0, 0)


def cells(scores: dict[str, float]) -> list[float | None]:
    """Scores of novel views in the order of the columns."""
    return [scores.get(metric) for metric in ("psnr", "ssim", "lpips", "depth_mae_m")]


def other_cells(result: dict[str, Any]) -> list[float | None]:
    """The rest of the columns."""
    codebooks = result.get("codebooks", {})
    return [
        *(result["voxels"][name] for name in ("voxel_loss", "opacity_error")),
        *(codebooks.get(f"{name}_perplexity") for name in ("coarse", "fine")),
        *(result["training"][name] for name in ("seconds", "parameters")),
    ]


if __name__ == "__main__":
    run(main, Options, __doc__)
