"""The demo's numbers: novel views of held-out places through stages 1 and 2, and distances between sets of images."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.autoencoder.novel_views import mean_training_image
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.choice import evenly
from nfldm_ns.demo.runner import Report
from nfldm_ns.demo.settings import DemoSettings
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, scene_generators
from nfldm_ns.diffusion.sampling import sample_scenes
from nfldm_ns.evaluation.image_sets import (
    Images,
    picture_features,
    same_picture_features,
    set_distances,
    write_pictures,
)
from nfldm_ns.evaluation.metrics import ImageMetrics, nearest_source_view
from nfldm_ns.judging.scenes import render_sampled_views
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder
from nfldm_ns.latents.round_trip import round_trip_variants
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import SceneBatch
from nfldm_ns.scenes.writing import atomic_path, write_json

SCENES_AT_ONCE = 4
MEAN_IMAGE_SCENES = 128
NOVEL_VIEWS_SHARE = 0.4  # of the time of the evaluation
METRICS = "metrics.json"


# Pictures of generated scenes


def render_samples(
    pipeline: NFLDMPipeline,
    generated: Path,
    pictures: Path,
    settings: DemoSettings,
    seed: int,
    source: str,
    report: Report,
) -> None:
    """Samples scenes with the seeds `seed`, `seed + 1`, ...: the first are written whole, of all there are pictures.

    Args:
        generated: for the scenes' folders, as `nfldm-sample` writes them.
        pictures: for `<scene>_<view>.png`, seen by cameras of the sampled trajectory.
        source: where the pipeline is from, for the record.
    """
    views, steps = settings.views_per_scene, settings.num_inference_steps
    total = max(settings.num_scenes, -(-settings.num_images // views))
    with atomic_path(pictures) as temporary:
        temporary.mkdir()
        scenes = sample_scenes(pipeline, generated, settings.num_scenes, seed, num_inference_steps=steps, source=source)
        for i, folder in enumerate(scenes):
            for view, path in enumerate(evenly(sorted((folder / "images").glob("source_*.png")), views)):
                shutil.copyfile(path, temporary / f"{i:04d}_{view}.png")
            report((i + 1) / total, f"{i + 1} scenes")
        for first in range(settings.num_scenes, total, SCENES_AT_ONCE):
            count = min(SCENES_AT_ONCE, total - first)
            images = _sample_images(pipeline, seed + first, count, views, steps)
            for i, scene in enumerate(images):
                write_pictures(temporary, f"{first + i:04d}", scene)
            report((first + count) / total, f"{first + count} scenes")


def _sample_images(pipeline: NFLDMPipeline, seed: int, count: int, views: int, steps: int) -> list[Images]:
    output = pipeline(count, scene_generators(seed, count), num_inference_steps=steps)
    return [rendered.rgb[0] for rendered in render_sampled_views(pipeline, output, views)]


# Numbers


def evaluate(
    collection: SceneCollection,
    scene_autoencoder: SceneAutoencoder,
    latent_autoencoder: LatentAutoencoder,
    folder: Path,
    settings: DemoSettings,
    lpips: nn.Module,
    inception: nn.Module,
    report: Report,
) -> None:
    """Writes `metrics.json` with `novel_views` and `image_sets`, and the sets of images it compares.

    Args:
        folder: holds `samples/` from `render_samples`; gets `test/`, `train/`, `stage1/` and `stage2/` beside it.
    """
    num_scenes = -(-settings.num_images // settings.views_per_scene)
    train = evenly(collection.split("train"), max(MEAN_IMAGE_SCENES, num_scenes))
    report(0.0, "mean image")
    mean = mean_training_image(collection.batch([collection.load_scene(i)]) for i in train)
    with atomic_path(folder / "train") as temporary:
        temporary.mkdir()
        for scene_id in evenly(train, num_scenes):
            scene = collection.load_scene(scene_id)
            write_pictures(temporary, scene_id, scene.target.images[: settings.views_per_scene])
    test = evenly(collection.split("test"), num_scenes)
    novel_views = judge_novel_views(
        collection,
        test,
        scene_autoencoder,
        latent_autoencoder,
        settings.views_per_scene,
        mean,
        lpips,
        folder,
        lambda share: report(NOVEL_VIEWS_SHARE * share, "novel views"),
    )
    image_sets = compare_image_sets(
        folder,
        mean,
        settings.num_images,
        inception,
        lambda share: report(NOVEL_VIEWS_SHARE + (1 - NOVEL_VIEWS_SHARE) * share, "FID and KID"),
    )
    write_json(folder / METRICS, {"novel_views": novel_views, "image_sets": image_sets})


@torch.inference_mode()
def judge_novel_views(
    collection: SceneCollection,
    scene_ids: Sequence[str],
    scene_autoencoder: SceneAutoencoder,
    latent_autoencoder: LatentAutoencoder,
    views: int,
    mean: Float[Tensor, "3 height width"],
    lpips: nn.Module,
    folder: Path,
    report: Callable[[float], None],
) -> dict[str, Any]:
    """Metrics of target views by method, and their pictures in `folder`.

    Args:
        scene_ids: held-out scenes.
        views: target views of each.
        mean: a baseline.

    Returns:
        `num_images`, and `ImageMetrics.compute()` of `stage1`, `stage2` (after the latents), `without_fine`,
        `without_coarse`, `without_global`, `not_quantised`, `nearest_view` and `mean_image`; LPIPS of the ablations is
        left out.
    """
    device = scene_autoencoder.device
    metrics: dict[str, ImageMetrics] = {}
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
        report(min(1.0, (done + 1) * SCENES_AT_ONCE / len(scene_ids)))
    return {
        "num_scenes": len(scene_ids),
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


def compare_image_sets(
    folder: Path,
    mean: Float[Tensor, "3 height width"],
    num_images: int,
    inception: nn.Module,
    report: Callable[[float], None],
) -> dict[str, Any]:
    """FID and KID of all sets of pictures to the real test views, with equally many images each.

    Returns:
        `num_images`, and `fid` and `kid` by set: `samples`, `stage1`, `stage2`, `mean_image`, `train` (real views of
        training places: about the best there can be); `samples_to_train` compares with those instead.
    """
    names = ("test", "train", "stage1", "stage2", "samples")
    paths = {name: sorted((folder / name).glob("*.png")) for name in names}
    count = min(num_images, *map(len, paths.values()))
    features = {}
    for i, name in enumerate(names):
        part = partial(_report_part, report, i, len(names))
        features[name] = picture_features(inception, evenly(paths[name], count), on_progress=part)
    features["mean_image"] = same_picture_features(inception, mean, count)
    return {"num_images": count, **set_distances(features)}


def _report_part(report: Callable[[float], None], index: int, count: int, share: float) -> None:
    """Tells the share of all of `count` parts when `share` of one of them is done."""
    report((index + share) / count)
