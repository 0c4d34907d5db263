"""The demo's numbers: novel views of held-out places through stages 1 and 2, and distances between sets of images."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.choice import evenly
from nfldm_ns.demo.budget import Clock
from nfldm_ns.demo.runner import Report
from nfldm_ns.demo.settings import DemoSettings
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, scene_generators
from nfldm_ns.evaluation.image_sets import IMAGE_SETS, MEAN_IMAGE_SCENES, features_of_sets, mean_image
from nfldm_ns.evaluation.novel_views import judge_novel_views
from nfldm_ns.evaluation.scenes import render_sampled_views
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder
from nfldm_ns.metrics.image_sets import Images, picture_features, set_distances, write_pictures
from nfldm_ns.sampling.scenes import sample_scenes
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.writing import atomic_path, write_json

SCENES_AT_ONCE = 4
TIMED_IMAGES = 8
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
    is_late: Callable[[], bool] = lambda: False,
) -> None:
    """Samples scenes with the seeds `seed`, `seed + 1`, ...: the first are written whole, of all there are pictures.

    Args:
        generated: for the scenes' folders, as `nfldm-sample` writes them.
        pictures: for `<scene>_<view>.png`, seen by cameras of the sampled trajectory.
        source: where the pipeline is from, for the record.
        is_late: ends it with fewer pictures, once all folders are written.
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
            if is_late():
                break
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
    clock: Clock | None = None,
) -> None:
    """Writes `metrics.json` with `novel_views` and `image_sets`, and the sets of images it compares.

    Args:
        folder: holds `samples/` from `render_samples`; gets `test/`, `train/`, `stage1/` and `stage2/` beside it.
        clock: judges fewer images where it runs out.
    """
    clock = clock or Clock()
    num_scenes = -(-settings.num_images // settings.views_per_scene)
    num_train = max(MEAN_IMAGE_SCENES, num_scenes)
    report(0.0, "mean image")
    mean = mean_image(collection, num_train)
    with atomic_path(folder / "train") as temporary:
        temporary.mkdir()
        for scene_id in evenly(evenly(collection.split("train"), num_train), num_scenes):
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
        lambda: clock.over(NOVEL_VIEWS_SHARE),
    )
    image_sets = compare_image_sets(
        folder,
        mean,
        affordable_images(inception, folder / "test", settings.num_images, clock),
        inception,
        lambda share: report(NOVEL_VIEWS_SHARE + (1 - NOVEL_VIEWS_SHARE) * share, "FID and KID"),
    )
    write_json(folder / METRICS, {"novel_views": novel_views, "image_sets": image_sets})


def affordable_images(inception: nn.Module, pictures: Path, most: int, clock: Clock) -> int:
    """How many images per set its network can look at until the time is over, by how fast it sees a few; 2 at least."""
    if clock.limit_s is None:
        return most
    few = sorted(pictures.glob("*.png"))[:TIMED_IMAGES]
    picture_features(inception, few[:1], None, lambda share: None)  # a GPU is slow at first
    begun = time.monotonic()
    picture_features(inception, few, None, lambda share: None)
    seconds = (time.monotonic() - begun) / len(few)
    return min(most, max(2, int((clock.left() or 0.0) / (len(IMAGE_SETS) * seconds))))


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
    paths = {name: sorted((folder / name).glob("*.png")) for name in IMAGE_SETS}
    count = min(num_images, *map(len, paths.values()))

    def show(name: str) -> Callable[[float], None]:
        return lambda share: report((IMAGE_SETS.index(name) + share) / len(IMAGE_SETS))

    features = features_of_sets(paths, count, inception, lambda: mean, show)
    return {"num_images": count, **set_distances(features)}
