"""What an evaluation measures, and the folder that belongs to it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nfldm_ns.choice import evenly
from nfldm_ns.diffusion.flow import prediction_type_of
from nfldm_ns.diffusion.pipeline import COMPONENTS, NFLDMPipeline, Steps
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import SceneCollection, read_json, read_transforms
from nfldm_ns.scenes.writing import clear_unfinished, require_writable, write_json
from nfldm_ns.training.identity import model_hash

FORMAT = "nfldm-eval"
SETTINGS = "settings.json"


@dataclass(frozen=True)
class EvaluationSettings:
    """The protocol of an evaluation.

    Attributes:
        num_images: in each set for FID, KID and the measures of neighbours.
        views_per_scene: images of each generated scene.
        seed: of the first generated scene; further ones count up.
        num_inference_steps: denoising steps of each latent, one number for all or one each of g, c and f.
        batch_size: scenes sampled together; sampled numbers depend on it up to rounding.
        with_source_views: whether real images may also be views that the encoder sees; by default only target views.
        num_train_scenes: training scenes that are searched for copies (those of the images besides); None takes all.
        precision_k: neighbours that span the manifolds of precision and recall.
        density_k: likewise of density and coverage.
        fvd: whether the Frechet video distance is measured, of one fly-through of each scene.
    """

    num_images: int = 5000
    views_per_scene: int = 4
    seed: int = 0
    num_inference_steps: Steps = 30
    batch_size: int = 1
    with_source_views: bool = False
    num_train_scenes: int | None = None
    precision_k: int = 3
    density_k: int = 5
    fvd: bool = False

    def __post_init__(self) -> None:
        counts = ("num_images", "views_per_scene", "num_inference_steps", "batch_size", "precision_k", "density_k")
        for name in counts:
            given = getattr(self, name)
            if min(given if isinstance(given, tuple) else (given,)) < 1:
                option = name.replace("_", "-")
                raise UserInputError(f"--{option} is {given}: give at least 1.")
        if self.num_train_scenes is not None and self.num_train_scenes < 2:
            raise UserInputError(f"--num-train-scenes is {self.num_train_scenes}: give at least 2, or none for all.")
        fewest = max(self.precision_k, self.density_k) + 1
        if self.num_images < fewest:
            raise UserInputError(
                f"--num-images is {self.num_images}, but {fewest - 1} neighbours need at least {fewest} images: "
                "give more images, or a smaller --precision-k and --density-k."
            )

    @property
    def num_scenes(self) -> int:
        """Generated scenes."""
        return -(-self.num_images // self.views_per_scene)


@dataclass(frozen=True)
class RealScenes:
    """Which real scenes of a split are looked at.

    Attributes:
        scene_ids: all of them.
        shown: those with pictures in the set of images.
        num_views: pictures of each of these.
    """

    scene_ids: list[str]
    shown: set[str]
    num_views: int


def choose_real_scenes(collection: SceneCollection, split: str, settings: EvaluationSettings) -> RealScenes:
    """Evenly spaced scenes that give `num_images` images, with as few views of each as can be, but `views_per_scene`.

    Raises:
        UserInputError: if the split has too few views.
    """
    ids = collection.split(split)
    transforms = read_transforms(collection.scene_dir(ids[0]))
    available = len(transforms.target_names) + len(transforms.source_names) * settings.with_source_views
    num_views = min(max(settings.views_per_scene, -(-settings.num_images // len(ids))), available)
    if num_views * len(ids) < settings.num_images:
        kind = "views" if settings.with_source_views else "target views"
        raise UserInputError(
            f"The {split} split of {collection.root} has {len(ids)} scenes with {available} {kind}, which is fewer "
            f"than {settings.num_images} images: give --num-images {len(ids) * available} or less"
            f"{'' if settings.with_source_views else ', or --with-source-views'}."
        )
    scene_ids = ids
    shown = evenly(ids, -(-settings.num_images // num_views))
    if split == "train" and settings.num_train_scenes is not None:
        scene_ids = list(dict.fromkeys([*evenly(ids, settings.num_train_scenes), *shown]))
    return RealScenes(scene_ids, set(shown), num_views)


def claim_folder(
    folder: Path, pipeline: NFLDMPipeline, collection: SceneCollection, settings: EvaluationSettings
) -> None:
    """Makes the folder of an evaluation, or checks that it belongs to this one, so that it can go on.

    Raises:
        UserInputError: if it holds an evaluation of something else or with other settings, or other files.
    """
    identity = _identity(pipeline, collection, settings)
    path = folder / SETTINGS
    if path.is_file():
        before = read_json(path)
        if before != identity:
            raise UserInputError(
                f"{folder} holds an evaluation of something else ({_first_difference(before, identity)}): choose "
                "another --output-dir, or delete it to start again."
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserInputError(f"{folder} is not empty and holds no evaluation: choose another --output-dir.")
    require_writable(folder)
    for place in {folder, *(record.parent for record in folder.glob("*/*/.*"))}:
        clear_unfinished(place)
    write_json(path, identity)


def _first_difference(there: Any, here: Any, name: str = "settings") -> str:
    """Where two settings differ, and how."""
    if not isinstance(there, dict) or not isinstance(here, dict):
        return f"{name}: {there} there, {here} here"
    key = next(key for key in (*here, *there) if there.get(key) != here.get(key))
    return _first_difference(there.get(key), here.get(key), key)


def _identity(pipeline: NFLDMPipeline, collection: SceneCollection, settings: EvaluationSettings) -> dict[str, Any]:
    """All that pictures and records depend on, as JSON; the numbers of neighbours do not count, they are cheap."""
    description = (collection.root / "collection.json").read_bytes()
    protocol = {name: value for name, value in asdict(settings).items() if not name.endswith("_k")}
    identity = {
        "format": FORMAT,
        "version": 1,
        "pipeline": {
            **{name: model_hash(model) if (model := getattr(pipeline, name)) else None for name in COMPONENTS},
            "temperatures": list(pipeline.config.temperatures),
            **pipeline.own_contrasts(),
            "scheduler": type(pipeline.scheduler).__name__,
            "prediction_type": prediction_type_of(pipeline.scheduler),
        },
        "collection": {"name": collection.name, "sha256": hashlib.sha256(description).hexdigest()},
        **protocol,
    }
    return json.loads(json.dumps(identity))
