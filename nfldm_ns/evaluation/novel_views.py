"""Novel views of held-out places through stages 1 and 2, and without parts of the latents, beside baselines."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder
from nfldm_ns.latents.round_trip import round_trip_variants
from nfldm_ns.metrics.image_sets import write_pictures
from nfldm_ns.metrics.images import ImageMetrics, nearest_source_view
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import SceneBatch

SCENES_AT_ONCE = 4


@torch.no_grad()
def judge_novel_views(
    collection: SceneCollection,
    scene_ids: Sequence[str],
    scene_autoencoder: SceneAutoencoder,
    latent_autoencoder: LatentAutoencoder,
    views: int,
    mean: Float[Tensor, "3 height width"],
    lpips: nn.Module,
    folder: Path,
    on_progress: Callable[[float], None],
    is_late: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Metrics of target views by method, and their pictures in `folder`.

    Args:
        scene_ids: held-out scenes.
        views: target views of each.
        mean: a baseline.
        is_late: ends it after a batch of scenes, with what was judged by then.

    Returns:
        `num_images`, and `ImageMetrics.compute()` of `stage1`, `stage2` (after the latents), `without_fine`,
        `without_coarse`, `without_global`, `not_quantised`, `nearest_view` and `mean_image`; LPIPS of the ablations is
        left out.
    """
    device = scene_autoencoder.device
    metrics: dict[str, ImageMetrics] = {}
    num_scenes = 0
    pictures = {name: folder / name for name in ("test", "stage1", "stage2")}
    for path in pictures.values():
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    for done, batch in enumerate(_batches(collection, scene_ids, views)):
        batch = batch.to(device)
        _save(pictures["test"], batch, batch.target.images)
        for name, grid in round_trip_variants(latent_autoencoder, scene_autoencoder.encode(batch.source)).items():
            judge = metrics.setdefault(name, ImageMetrics(lpips if name in pictures else None))
            rendered = scene_autoencoder.render(grid, batch.target.cameras)
            judge.update(rendered.rgb, batch.target.images, batch.target.masks)
            judge.update_depth(rendered.depth, batch.target, batch.aabb)
            if name in pictures:
                _save(pictures[name], batch, batch.target.covered(rendered.rgb))
        baselines = {
            "nearest_view": nearest_source_view(batch),
            "mean_image": mean.to(device).expand_as(batch.target.images),
        }
        for name, images in baselines.items():
            metrics.setdefault(name, ImageMetrics(lpips)).update(images, batch.target.images, batch.target.masks)
        num_scenes += len(batch.scene_ids)
        on_progress(min(1.0, (done + 1) * SCENES_AT_ONCE / len(scene_ids)))
        if is_late():
            break
    return {
        "num_scenes": num_scenes,
        "num_images": metrics["stage1"].num_images,
        **{name: judge.compute() for name, judge in metrics.items()},
    }


def _batches(collection: SceneCollection, scene_ids: Sequence[str], views: int) -> Iterator[SceneBatch]:
    """Scenes with their first target views."""
    for first in range(0, len(scene_ids), SCENES_AT_ONCE):
        batch = collection.batch([collection.load_scene(i) for i in scene_ids[first : first + SCENES_AT_ONCE]])
        yield SceneBatch(batch.scene_ids, batch.source, batch.target[:, :views], batch.aabb)


def _save(folder: Path, batch: SceneBatch, images: Float[Tensor, "batch views 3 height width"]) -> None:
    for scene_id, scene in zip(batch.scene_ids, images, strict=True):
        write_pictures(folder, scene_id, scene)
