"""What is lost between V and its latents, judged by rendered novel views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder
from nfldm_ns.latents.quantizer import CodebookUsage
from nfldm_ns.latents.voxel_store import VoxelStore
from nfldm_ns.metrics.images import ImageMetrics
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import Views
from nfldm_ns.scenes.voxel_grid import VoxelGrid


@torch.no_grad()
def evaluate_round_trip(
    scene_autoencoder: SceneAutoencoder,
    latent_autoencoder: LatentAutoencoder,
    store: VoxelStore,
    collection: SceneCollection,
    scene_ids: Sequence[str],
    *,
    lpips: nn.Module | None = None,
    batch_size: int = 4,
    ablations: bool = True,
) -> dict[str, dict[str, float]]:
    """Metrics of the target views of scenes, before and after the latents.

    Args:
        scene_ids: scenes of the store, usually those of the test split.
        lpips: from `nfldm_ns.pretrained.weights.load_lpips`, moved to the models' device; None leaves LPIPS out.
        ablations: also judge without each of the latents, and with latents that are not quantised.

    Returns:
        by name `stage1` (V itself), `stage2` (V after the round trip), and what `round_trip_variants` names besides:
        `ImageMetrics.compute()`. Of a model that quantises also `codebooks`: `coarse_usage`, `coarse_perplexity`,
        `fine_usage`, `fine_perplexity` over all these scenes, see `CodebookUsage`.
    """
    device = next(latent_autoencoder.parameters()).device
    scene_autoencoder = scene_autoencoder.to(device).eval()
    latent_autoencoder = latent_autoencoder.eval()
    lpips = None if lpips is None else lpips.to(device)
    metrics: dict[str, ImageMetrics] = {}
    usage = {name: CodebookUsage() for name in latent_autoencoder.codebooks}
    for first in range(0, len(scene_ids), batch_size):
        batch_ids = list(scene_ids[first : first + batch_size])
        batch = collection.batch([collection.load_scene(scene_id) for scene_id in batch_ids])
        target = batch.target.to(device)
        grid = store.grid(batch_ids).to(device)
        for name, counts in latent_autoencoder.code_counts(latent_autoencoder.encode(grid)).items():
            usage[name].add(counts)
        for name, decoded in round_trip_variants(latent_autoencoder, grid, ablations).items():
            judge = metrics.setdefault(name, ImageMetrics(lpips))
            _judge(judge, scene_autoencoder, decoded, target)
    results = {name: judge.compute() for name, judge in metrics.items()}
    if usage:
        results["codebooks"] = {}
    for name, found in usage.items():
        results["codebooks"][f"{name}_usage"] = float(found.share)
        results["codebooks"][f"{name}_perplexity"] = float(found.perplexity)
    return results


def round_trip_variants(model: LatentAutoencoder, grid: VoxelGrid, ablations: bool = True) -> dict[str, VoxelGrid]:
    """V and what comes back from its latents.

    Args:
        ablations: also without what each latent contributes.

    Returns:
        `stage1` (V itself), `stage2` (V after the round trip), and with `ablations` `without_coarse`, `without_fine`,
        `without_global` (c, f, g set to zero, the mean of g's prior; with g goes the background's code), of those that
        the model has, and `not_quantised` if it quantises.
    """
    latents = model.encode(grid)
    variants = {"stage1": grid, "stage2": model.decode(latents)}
    if ablations:
        codes = model.quantise(latents)
        for name, field in (("fine", "fine"), ("coarse", "coarse"), ("global", "global_latent")):
            latent = getattr(codes, field)
            if latent.numel():
                zeroed = replace(codes, **{field: torch.zeros_like(latent)})
                variants[f"without_{name}"] = model.decode(zeroed, quantise=False)
        if model.config.quantize:
            variants["not_quantised"] = model.decode(latents, quantise=False)
    return variants


def _judge(judge: ImageMetrics, scene_autoencoder: SceneAutoencoder, grid: VoxelGrid, target: Views) -> None:
    rendered = scene_autoencoder.render(grid, target.cameras)
    judge.update(rendered.rgb.clamp(0, 1), target.images, target.masks)
    judge.update_depth(rendered.depth, target, grid.aabb)
