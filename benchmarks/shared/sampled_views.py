"""FID and KID of sampled scenes to real test views, as the comparisons of generators share them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.choice import evenly
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, Steps
from nfldm_ns.errors import UserInputError
from nfldm_ns.evaluation.evaluation import check_fit, picture_paths, progress_bars
from nfldm_ns.evaluation.numbers import FEATURES, RESIZING
from nfldm_ns.evaluation.scenes import PictureFolder, SceneJudge, judge_generated, judge_real, shown_views
from nfldm_ns.evaluation.settings import EvaluationSettings, RealScenes, choose_real_scenes, claim_folder
from nfldm_ns.metrics.image_sets import REFERENCE, picture_features, set_distances, write_pictures
from nfldm_ns.pretrained.weights import fetch_weights, load_inception
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.writing import atomic_path
from shared.comparisons import fingerprint

Features = Float[Tensor, "images features"]
Distances = dict[str, dict[str, float]]

GROUPS = 10  # of scenes, of which a jackknife leaves out one at a time


@dataclass(kw_only=True)
class SampleOptions:
    """What is sampled of each generator."""

    num_scenes: int = 250
    """sampled scenes of each; FID depends on the number of images"""
    views_per_scene: int = 4
    """images of each scene"""
    with_source_views: bool = False
    """real images are also the source views; more of them where a test split is small"""
    num_inference_steps: int = 30
    """denoising steps of each latent"""
    first_scene: int = 0
    """seed of the first sampled scene; further ones count up"""
    batch_size: int = 1
    """scenes sampled together"""

    def evaluation_settings(self) -> EvaluationSettings:
        """The protocol, of `nfldm-eval`, without what it measures besides."""
        if self.num_scenes < 1:
            raise UserInputError(f"--num-scenes is {self.num_scenes}: give at least 1.")
        return EvaluationSettings(
            num_images=self.num_scenes * self.views_per_scene,
            views_per_scene=self.views_per_scene,
            with_source_views=self.with_source_views,
            seed=self.first_scene,
            num_inference_steps=self.num_inference_steps,
            batch_size=self.batch_size,
        )


def jackknife(statistic: Callable[[Callable[[int], Tensor]], float], num_scenes: int) -> tuple[float, float | None]:
    """A statistic of sets of scenes, and its standard error from leaving out every tenth of them, ten times.

    Args:
        statistic: is given a function from the number of scenes of a set to a mask of those that count.
        num_scenes: of the smallest set; below 20 there is no error.
    """
    whole = statistic(lambda count: torch.ones(count, dtype=torch.bool))
    if num_scenes < 2 * GROUPS:
        return whole, None
    parts = [statistic(lambda count, out=out: torch.arange(count) % GROUPS != out) for out in range(GROUPS)]
    return whole, float(((GROUPS - 1) * torch.tensor(parts, dtype=torch.float64).var(correction=0)).sqrt())


def work_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class SampleJudge:
    """Compares generators' views with real test views; pictures and features that are there are not made again.

    Args:
        collection: what the generators were trained on.
        folder: for the real pictures, which all share, in `real-<fingerprint of the protocol>`.
        settings: how much is sampled.

    Raises:
        UserInputError: if a split has too few views.
    """

    def __init__(self, collection: SceneCollection, folder: Path, settings: EvaluationSettings) -> None:
        self.collection, self.settings = collection, settings
        collection.require_train_and_test()
        self.scenes = {split: self._choose(split) for split in (REFERENCE, "train")}
        self.folder = PictureFolder(folder / f"real-{fingerprint(self.protocol)}")
        fetch_weights("fid-inception")
        logging.disable_progress_bar()  # of loading pipelines, which takes a moment only

    def _choose(self, split: str) -> RealScenes:
        """Only scenes with pictures; as many images as are sampled."""
        found = choose_real_scenes(self.collection, split, self.settings)
        return replace(found, scene_ids=sorted(found.shown))

    @property
    def protocol(self) -> dict[str, Any]:
        """What the distances depend on besides the generators."""
        description = (self.collection.root / "collection.json").read_bytes()
        names = ("num_images", "views_per_scene", "with_source_views", "seed")
        return {
            "collection": hashlib.sha256(description).hexdigest(),
            **{name: value for name, value in asdict(self.settings).items() if name in names},
            "features": FEATURES,
            "resizing": RESIZING,
        }

    @cached_property
    def inception(self) -> nn.Module:
        return load_inception().to(work_device())

    @cached_property
    def real(self) -> dict[str, Features]:
        """Features of real test views, and of as many views of training scenes."""
        return {split: self._real_features(split) for split in self.scenes}

    def _real_features(self, split: str) -> Features:
        scenes, pictures = self.scenes[split], self.folder.pictures(split)
        if not pictures.is_dir():
            with atomic_path(pictures) as temporary:
                temporary.mkdir()
                for scene_id in scenes.scene_ids:
                    scene = self.collection.load_scene(scene_id)
                    views = shown_views(scene, scenes.num_views, self.settings.with_source_views)
                    write_pictures(temporary, scene_id, views.images)
        return self._features(self.folder, split, scenes.scene_ids, scenes.num_views)

    def _features(
        self,
        folder: PictureFolder,
        name: str,
        scenes: list[str],
        views: int,
        on_progress: Callable[[float], None] | None = None,
    ) -> Features:
        paths = evenly(picture_paths(folder, name, scenes, views), self.settings.num_images)
        return picture_features(self.inception, paths, folder.root / "features" / name, on_progress)

    def floor(self) -> Distances:
        """`fid` and `kid` of real views of training scenes, as `train`: about the best there can be."""
        return set_distances(self.real)

    def samples(self, pipeline: NFLDMPipeline, folder: Path, num_inference_steps: Steps | None = None) -> Features:
        """Features of sampled views, in the order of the scenes' seeds; the pipeline is moved to the device.

        Args:
            folder: for what belongs to this pipeline and these steps alone.

        Raises:
            UserInputError: if the pipeline does not fit the collection, or the folder belongs to another one.
        """
        settings = self.settings
        if num_inference_steps is not None:
            settings = replace(settings, num_inference_steps=num_inference_steps)
        check_fit(pipeline, self.collection, settings)
        claim_folder(folder, pipeline, self.collection, settings)
        pictures = PictureFolder(folder)
        with progress_bars() as show:
            title = show(f"Sampling {settings.num_scenes} scenes")
            names = judge_generated(self.scene_judge(pipeline), pictures, settings, title)
            title = show(f"Features of {settings.num_images} images")
            return self._features(pictures, "samples", names, settings.views_per_scene, title)

    def scene_judge(self, pipeline: NFLDMPipeline) -> SceneJudge:
        """What looks at a generator's scenes at the size of the real images."""
        width, height = self.collection.image_size
        return SceneJudge(pipeline.to(work_device()), image_size=(height, width))

    def reconstructions(self, pipeline: NFLDMPipeline, folder: Path) -> Features:
        """Features of the real test views rendered from test scenes after both auto-encoders; `folder` as above."""
        claim_folder(folder, pipeline, self.collection, self.settings)
        pictures, scenes = PictureFolder(folder), self.scenes[REFERENCE]
        with progress_bars() as show:
            title = show(f"Encoding {len(scenes.scene_ids)} test scenes")
            with_source = self.settings.with_source_views
            judge_real(self.scene_judge(pipeline), self.collection, pictures, REFERENCE, scenes, with_source, title)
            title = show(f"Features of {self.settings.num_images} images")
            return self._features(pictures, "stage2", scenes.scene_ids, scenes.num_views, title)

    def distances(self, to: str = REFERENCE, **features: Features) -> Distances:
        """`fid` and `kid` to the real views of a split, each by the names given."""
        return set_distances({REFERENCE: self.real[to], **features})
