"""The evaluation of a trained generator: `eval.json` and `index.html`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from nfldm_ns.choice import evenly
from nfldm_ns.diffusion.pipeline import NFLDMPipeline
from nfldm_ns.errors import UserInputError
from nfldm_ns.evaluation.image_sets import IMAGE_SETS, features_of_sets, mean_image
from nfldm_ns.evaluation.numbers import (
    Records,
    check_copies,
    depth_histograms,
    depth_numbers,
    floating_numbers,
    image_numbers,
    video_numbers,
)
from nfldm_ns.evaluation.page import write_page
from nfldm_ns.evaluation.scenes import FIXED_VIEWS, PictureFolder, SceneJudge, judge_generated, judge_real
from nfldm_ns.evaluation.settings import SETTINGS, EvaluationSettings, RealScenes, choose_real_scenes, claim_folder
from nfldm_ns.metrics.image_sets import picture_features, read_picture
from nfldm_ns.processes import ALONE, Processes
from nfldm_ns.reports.galleries import write_png
from nfldm_ns.reports.resources import device_info, package_versions
from nfldm_ns.scenes.collection import SceneCollection, read_json
from nfldm_ns.scenes.writing import write_json

NUMBERS = "eval.json"
PAGE = "index.html"
MEAN_IMAGE_FILE = "mean_image.png"


def evaluate_pipeline(
    pipeline: NFLDMPipeline,
    collection: SceneCollection,
    output_dir: Path,
    settings: EvaluationSettings,
    inception: nn.Module,
    source: str = "",
    i3d: nn.Module | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any] | None:
    """Samples, measures and writes the report; an interrupted run goes on where it stopped.

    Several processes share the scenes and the pictures' features; the first of them compares and reports.

    Args:
        pipeline: on the device to work on.
        collection: what it was trained on; images of its test split are the reference.
        inception: from `weights.load_inception`, on the same device.
        source: where the pipeline is from, for the record.
        i3d: from `weights.load_i3d`, on the same device; needed if the settings ask for FVD.

    Returns:
        the content of `eval.json` (docs/evaluation.md); None in other processes than the first.

    Raises:
        UserInputError: if the collection and the pipeline do not fit, a split has too few views, or the folder holds
            something else.
    """
    check_fit(pipeline, collection, settings)
    if settings.fvd and i3d is None:
        raise ValueError("the settings ask for FVD, but no I3D was given")
    real = {split: choose_real_scenes(collection, split, settings) for split in ("test", "train")}
    if processes.is_first:
        claim_folder(output_dir, pipeline, collection, settings)
    processes.wait()
    folder = PictureFolder(output_dir)
    filmed = _filmed_scenes(real, settings)
    width, height = collection.image_size
    judge = SceneJudge(pipeline, i3d, (height, width))
    with progress_bars(processes.is_first) as show:
        title = show(f"Sampling {settings.num_scenes} scenes")
        names = judge_generated(judge, folder, settings, title, len(filmed["test"]), processes)
        for split, scenes in real.items():
            title = show(f"Encoding {len(scenes.scene_ids)} {split} scenes")
            chosen = settings.with_source_views
            judge_real(judge, collection, folder, split, scenes, chosen, title, filmed[split], processes)
        if processes.is_first:
            _mean_image(folder, collection)
        processes.wait()
        features = _set_features(folder, real, names, settings, inception, collection, show, processes)
        scene_names = {"generated": names, **{split: scenes.scene_ids for split, scenes in real.items()}}
        fixed = _fixed_features(folder, scene_names, inception, show, processes)
        if not processes.is_first:
            return None
        done = show("Comparing")
        records = Records(folder, scene_names, judge.far)
        images = image_numbers(features, settings)
        done(0.5)
        histograms, copies = depth_histograms(records), check_copies(records, fixed)
        done(0.9)
        numbers = {
            **read_json(output_dir / SETTINGS),
            "collection": {"name": collection.name, "path": str(collection.root)},
            "source": source,
            "views_of_real_scenes": {split: scenes.num_views for split, scenes in real.items()},
            **images,
            "distances": {**images["distances"], **video_numbers(records)},
            "depth": depth_numbers(histograms),
            "floating": floating_numbers(records),
            "copies": copies.numbers(),
            "versions": package_versions(),
            "device": device_info(),
        }
        write_json(output_dir / NUMBERS, numbers)
        write_page(output_dir / PAGE, folder, numbers, histograms, copies, collection)
        done(1.0)
    return numbers


def _filmed_scenes(real: dict[str, RealScenes], settings: EvaluationSettings) -> dict[str, list[str]]:
    """Real scenes with fly-throughs: as many of each split, and of generated scenes, as there are of all."""
    if not settings.fvd:
        return {split: [] for split in real}
    count = min(settings.num_scenes, *(len(scenes.scene_ids) for scenes in real.values()))
    return {split: evenly(scenes.scene_ids, count) for split, scenes in real.items()}


def check_fit(pipeline: NFLDMPipeline, collection: SceneCollection, settings: EvaluationSettings) -> None:
    """Raises `UserInputError` unless a pipeline, a collection and what is to be measured fit together."""
    autoencoder = pipeline.scene_autoencoder
    if not torch.allclose(collection.aabb, autoencoder.aabb.cpu(), atol=1e-4):
        raise UserInputError(
            f"The pipeline was trained for the box {autoencoder.aabb.tolist()}, but {collection.root} has "
            f"{collection.aabb.tolist()}: give the collection it was trained on."
        )
    cameras = pipeline.global_denoiser.config.num_cameras
    if settings.views_per_scene > cameras:
        raise UserInputError(
            f"--views-per-scene is {settings.views_per_scene}, but sampled trajectories have {cameras} cameras: "
            "give no more than that."
        )
    if settings.fvd and cameras < 2:
        raise UserInputError("Sampled trajectories have one camera, which is no path for FVD: add --fvd no.")
    width, height = collection.image_size
    sizes = {autoencoder.encoded_size, autoencoder.image_size}
    if (height, width) not in sizes:
        known = " or ".join(f"{size[1]} x {size[0]}" for size in sorted(sizes))
        raise UserInputError(
            f"Generated images have {known} pixels, but those of {collection.root} {width} x {height}: "
            "give the collection it was trained on."
        )
    collection.require_train_and_test()


@contextmanager
def progress_bars(shown: bool = True) -> Iterator[Callable[[str], Callable[[float], None]]]:
    """Bars below each other; `show(title)` begins one and returns what tells its share."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not shown) as progress:

        def show(title: str) -> Callable[[float], None]:
            task = progress.add_task(title, total=1.0)
            return lambda share: progress.update(task, completed=share)

        yield show


def _set_features(
    folder: PictureFolder,
    real: dict[str, RealScenes],
    generated: list[str],
    settings: EvaluationSettings,
    inception: nn.Module,
    collection: SceneCollection,
    show: Callable[[str], Callable[[float], None]],
    processes: Processes,
) -> dict[str, Tensor]:
    """Features of exactly `num_images` images of each set."""
    scenes = {"train": sorted(real["train"].shown), "samples": generated}
    views = {"train": real["train"].num_views, "samples": settings.views_per_scene}
    paths = {
        name: picture_paths(
            folder, name, scenes.get(name, sorted(real["test"].shown)), views.get(name, real["test"].num_views)
        )
        for name in IMAGE_SETS
    }
    return features_of_sets(
        paths,
        settings.num_images,
        inception,
        lambda: _mean_image(folder, collection),
        lambda name: show(f"Features of {settings.num_images} images: {name}"),
        folder.root / "features",
        processes,
    )


def picture_paths(folder: PictureFolder, name: str, scenes: Sequence[str], views: int) -> list[Path]:
    """Pictures of a set, `views` of each scene."""
    return [folder.pictures(name) / f"{scene}_{view}.png" for scene in scenes for view in range(views)]


def _mean_image(folder: PictureFolder, collection: SceneCollection) -> Tensor:
    path = folder.root / MEAN_IMAGE_FILE
    if not path.is_file():
        write_png(path, mean_image(collection))
    return read_picture(path)


def _fixed_features(
    folder: PictureFolder,
    scenes: dict[str, list[str]],
    inception: nn.Module,
    show: Callable[[str], Callable[[float], None]],
    processes: Processes,
) -> dict[str, Tensor]:
    """Features of the views of the shared cameras, in the order of the scenes."""
    features = {}
    for name, chosen in scenes.items():
        paths = [folder.fixed(name) / f"{scene}_{view}.png" for scene in chosen for view in range(FIXED_VIEWS)]
        title = show(f"Features of {len(paths)} views for the copy check: {name}")
        kept = folder.root / "features" / f"fixed_{name}"
        features[name] = picture_features(inception, paths, kept, title, processes)
    return features
