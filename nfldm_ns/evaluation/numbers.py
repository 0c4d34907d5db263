"""All numbers of an evaluation, from what was kept of its scenes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from nfldm_ns.evaluation.scenes import FIXED_VIEWS, PictureFolder
from nfldm_ns.evaluation.settings import EvaluationSettings
from nfldm_ns.metrics.geometry import BINS, DepthHistogram
from nfldm_ns.metrics.image_sets import REFERENCE, set_distances
from nfldm_ns.metrics.images import frechet_distance
from nfldm_ns.metrics.neighbours import (
    Nearest,
    compare_nearest,
    density_coverage,
    nearest,
    precision_recall,
    quantiles,
)
from nfldm_ns.pretrained.inception import NUM_FEATURES

FEATURES = f"{NUM_FEATURES} pooled features of the 2015 TensorFlow Inception-v3"
RESIZING = "antialiased bicubic to 299 x 299, as PIL in floating point"
DEPTH_SETS = {
    "samples": ("generated", "depth"),
    "test": ("test", "depth"),
    "train": ("train", "depth"),
    "stage1": ("test", "depth_stage1"),
    "stage2": ("test", "depth_stage2"),
}
"""Where the records hold the depth of each set: the record's set and key."""
VIDEO_SETS = {
    "test": ("test", "video"),
    "samples": ("generated", "video"),
    "stage2": ("test", "video_stage2"),
    "train": ("train", "video"),
}
"""Where the records hold what I3D says of fly-throughs."""
FLOATING_SETS = {
    "generated": ("generated", "floating"),
    "test_stage1": ("test", "floating_stage1"),
    "test_stage2": ("test", "floating"),
    "train_stage1": ("train", "floating_stage1"),
    "train_stage2": ("train", "floating"),
}


@dataclass
class Records:
    """What was measured of the scenes of one evaluation.

    Attributes:
        folder: of the records.
        scenes: names of scenes by set: `generated`, `test`, `train`.
        far: range of the histograms of depth in metres.
    """

    folder: PictureFolder
    scenes: Mapping[str, Sequence[str]]
    far: float

    def values(self, name: str, key: str) -> list[Tensor]:
        """One measure of all scenes of a set that have it."""
        found = []
        for scene in self.scenes[name]:
            with safe_open(self.folder.record(name, scene), framework="pt") as record:
                found += [record.get_tensor(key)] if key in record.keys() else []  # noqa: SIM118 (it is no dict)
        return found


def image_numbers(features: Mapping[str, Tensor], settings: EvaluationSettings) -> dict[str, Any]:
    """Distances and measures of neighbours of sets of images to the real test images.

    Args:
        features: by set, equally many each.

    Returns:
        `distances` (`fid`, `kid` by set) and `neighbours` (`precision`, `recall`, `density`, `coverage` by set), each
        with the number of images and the features.
    """
    counts = {len(values) for values in features.values()}
    assert len(counts) == 1, "sets of unequal sizes"
    basis = {"num_images": counts.pop(), "features": FEATURES, "resizing": RESIZING, "reference": REFERENCE}
    neighbours = {
        name: {
            **precision_recall(features[REFERENCE], values, settings.precision_k),
            **density_coverage(features[REFERENCE], values, settings.density_k),
        }
        for name, values in features.items()
        if name != REFERENCE
    }
    ks = {"precision_k": settings.precision_k, "density_k": settings.density_k}
    return {"distances": {**basis, **set_distances(features)}, "neighbours": {**basis, **ks, "sets": neighbours}}


def video_numbers(records: Records) -> dict[str, Any]:
    """FVD by set to fly-throughs of real test scenes, as stage 1 renders them; empty where no videos were made.

    Returns:
        `fvd` by set (`samples`, `stage2`, `train`), `samples_to_train` with that of these two, and `num_videos`.
    """
    videos = {name: records.values(*place) for name, place in VIDEO_SETS.items()}
    if not videos[REFERENCE]:
        return {}
    features = {name: torch.stack(values) for name, values in videos.items()}
    assert len({len(values) for values in features.values()}) == 1, "sets of unequal sizes"
    pairs = {name: (features[REFERENCE], values) for name, values in features.items() if name != REFERENCE}
    pairs["samples_to_train"] = (features["train"], features["samples"])
    fvd = {name: frechet_distance(*pair) for name, pair in pairs.items()}
    return {"fvd": fvd, "num_videos": len(features[REFERENCE])}


def depth_histograms(records: Records) -> dict[str, DepthHistogram]:
    """Depths of the images of each set; sets without any known depth are left out."""
    histograms = {}
    for name, (record_set, key) in DEPTH_SETS.items():
        counts = records.values(record_set, key)
        if counts:
            histogram = DepthHistogram.total([DepthHistogram(c, records.far) for c in counts])
            if histogram.surface_share > 0:
                histograms[name] = histogram
    return histograms


def depth_numbers(histograms: Mapping[str, DepthHistogram]) -> dict[str, Any]:
    """Quantiles of each set, and Wasserstein-1 distances to the real test depths where these are known."""
    shares = {"q05_m": 0.05, "q25_m": 0.25, "median_m": 0.5, "q75_m": 0.75, "q95_m": 0.95}
    real = histograms.get(REFERENCE)
    sets: dict[str, dict[str, float]] = {}
    for name, histogram in histograms.items():
        sets[name] = {key: histogram.quantile(share) for key, share in shares.items()}
        sets[name] |= {"surface_share": histogram.surface_share, "num_pixels": histogram.num_pixels}
        if real is not None and name != REFERENCE:
            sets[name]["wasserstein_m"] = histogram.wasserstein(real)
    return {"reference": REFERENCE if real is not None else None, "bins": BINS, "sets": sets}


def floating_numbers(records: Records) -> dict[str, Any]:
    """Floating and hazy shares of opacity, by kind of scene (see `floating_density`)."""
    numbers = {}
    for name, (record_set, key) in FLOATING_SETS.items():
        values = torch.stack(records.values(record_set, key))
        numbers[name] = {
            "num_scenes": len(values),
            "floating_share": quantiles(values[:, 0]),
            "haze_share": quantiles(values[:, 1]),
        }
    return numbers


# Copies


@dataclass
class CopyCheck:
    """The nearest training scene of every generated and held-out scene.

    Attributes:
        generated, held_out: by kind of distance: `latents`, `renders`.
        scenes: names by set.
    """

    generated: dict[str, Nearest]
    held_out: dict[str, Nearest]
    scenes: Mapping[str, Sequence[str]]

    def numbers(self) -> dict[str, Any]:
        """Quantiles and rates by kind of distance, and every generated scene with its nearest training scene."""
        kinds = {kind: compare_nearest(self.generated[kind], self.held_out[kind]) for kind in self.generated}
        return {
            "num_scenes": {name: len(scenes) for name, scenes in self.scenes.items()},
            "features_of_renders": f"{FEATURES}, of {FIXED_VIEWS} views from the origin; {RESIZING}",
            **kinds,
            "scenes": [
                {"scene": name, **{kind: self.match(kind, i) for kind in kinds}}
                for i, name in enumerate(self.scenes["generated"])
            ],
        }

    def match(self, kind: str, i: int) -> dict[str, Any]:
        """The training scene nearest to generated scene i, and the distances to it and to the second nearest."""
        found = self.generated[kind]
        return {
            "nearest": self.scenes["train"][int(found.index[i])],
            "distance": float(found.distance[i]),
            "second": float(found.second[i]),
        }


def check_copies(records: Records, fixed: Mapping[str, Float[Tensor, "images features"]]) -> CopyCheck:
    """Looks for the training scenes nearest to the generated and the held-out ones, in all quarter turns.

    Args:
        fixed: features of the views of the shared cameras, by set, `FIXED_VIEWS` of each scene in the records' order.
    """
    sets = ("generated", "test", "train")
    latents = {name: torch.stack(records.values(name, "latents")) for name in sets}
    views = {name: _turned(fixed[name].unflatten(0, (-1, FIXED_VIEWS)), turns=latents[name].shape[1]) for name in sets}
    found: dict[str, dict[str, Nearest]] = {"generated": {}, "test": {}}
    for kind, vectors in (("latents", latents), ("renders", views)):
        for name in found:
            found[name][kind] = nearest(vectors[name], vectors["train"][:, 0])
    return CopyCheck(found["generated"], found["test"], records.scenes)


def _turned(
    features: Float[Tensor, "scenes views features"], turns: int
) -> Float[Tensor, "scenes turns views_times_features"]:
    """All views of a scene as one vector, of the scene in its quarter turns; differences are means over views.

    The shared cameras are a quarter turn apart, so that they see a turned scene as they saw it, each as its neighbour.
    """
    scaled = features / features.shape[1] ** 0.5
    return torch.stack([scaled.roll(turn, dims=1).flatten(1) for turn in range(turns)], dim=1).float()
