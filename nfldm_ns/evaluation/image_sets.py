"""The sets of pictures that generators are compared by, as `nfldm-eval` and the demo have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.autoencoder.novel_views import mean_training_image
from nfldm_ns.choice import evenly
from nfldm_ns.metrics.image_sets import Features, picture_features, same_picture_features
from nfldm_ns.processes import ALONE, Processes
from nfldm_ns.scenes.collection import SceneCollection

IMAGE_SETS = ("test", "train", "stage1", "stage2", "samples")
"""Real views of both splits, those of the test split after stages 1 and 2, and views of generated scenes."""
MEAN_IMAGE = "mean_image"
MEAN_IMAGE_SCENES = 128

OnProgress = Callable[[float], None]


def mean_image(collection: SceneCollection, num_scenes: int = MEAN_IMAGE_SCENES) -> Float[Tensor, "3 height width"]:
    """The mean of the views of evenly chosen training scenes: what a set is compared with that knows no scenes."""
    scenes = evenly(collection.split("train"), num_scenes)
    return mean_training_image(collection.batch([collection.load_scene(i)]) for i in scenes)


def features_of_sets(
    paths: Mapping[str, Sequence[Path]],
    num_images: int,
    inception: nn.Module,
    mean: Callable[[], Float[Tensor, "3 height width"]],
    show: Callable[[str], OnProgress],
    kept_in: Path | None = None,
    processes: Processes = ALONE,
) -> dict[str, Features]:
    """Inception features of `num_images` evenly chosen pictures of each set, and of as many mean images.

    Args:
        paths: pictures by set.
        mean: gives the mean image, once the pictures are done.
        show: begins a set, and returns what tells its share.
        kept_in: a folder for features by set, so that an interrupted run goes on.
        processes: those that share the pictures; they need such a folder.
    """
    features = {}
    for name, pictures in paths.items():
        folder = None if kept_in is None else kept_in / name
        features[name] = picture_features(inception, evenly(pictures, num_images), folder, show(name), processes)
    features[MEAN_IMAGE] = same_picture_features(inception, mean(), num_images)
    return features
