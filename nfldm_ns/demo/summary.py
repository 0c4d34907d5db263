"""`report.json`: the demo's numbers by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nfldm_ns.demo.evaluation import METRICS
from nfldm_ns.demo.folder import DemoFolder
from nfldm_ns.demo.runner import Marker, read_marker
from nfldm_ns.errors import UserInputError
from nfldm_ns.reports.resources import GIB, device_info, package_versions, resident_bytes
from nfldm_ns.scenes.collection import SceneCollection, read_json
from nfldm_ns.scenes.writing import write_json

REPORT = "report.json"
MEANING = {
    "psnr, ssim, lpips": "means over novel views of held-out places; LPIPS with VGG16",
    "depth_mae_m": "mean absolute error of planar depth in metres, over pixels whose surface lies inside the box",
    "depth_mae_all_m": "the same over all pixels of known depth, those beyond the box included",
    "nearest_view": "baseline: the source view that looks in the most similar direction",
    "mean_image": "baseline: the mean of all training views",
    "stage2": "the same views after the voxels went through the latents g, c and f",
    "psnr_without_fine, psnr_without_coarse, psnr_without_global": "with f, c or g set to zero",
    "psnr_not_quantised": "with c and f as the encoder gives them, before vector quantisation",
    "samples": "FID and KID (Inception features) to real views of held-out places, num_images images in each set",
    "train_vs_test": "real views of training places in the place of samples: about the best that could be reached",
    "fid_to_train, kid_to_train": "samples compared with real views of training places",
    "length": "share of the preset's training steps: as asked for, else what ends in time on this machine",
    "seconds": "wall time",
    "peak_rss_gib": "largest resident memory of the process and its children, shared pages counted for each",
}


def write_summary(
    folder: DemoFolder, stages: Sequence[str], seed: int, length: float, device: str, seconds_so_far: float
) -> dict[str, Any]:
    """Writes `report.json`.

    Args:
        stages: names of all stages in order; the last one is running.
        length: share of the preset's training steps.
        seconds_so_far: what the last one has taken.

    Returns:
        its content.
    """
    markers = {name: _marker(folder.root, name) for name in stages}
    running = markers[stages[-1]]
    running.seconds = round(seconds_so_far, 2)
    running.peak_rss_gib = max(running.peak_rss_gib, round(resident_bytes() / GIB, 3))
    summary = summarise(read_json(folder.evaluation / METRICS), markers)
    collection = SceneCollection.open(folder.data)
    content = {
        **summary,
        "seed": seed,
        "length": length,
        "data": {
            "name": collection.name,
            "licence": collection.licence,
            "maps": sorted({str(place.get("map", "?")) for place in collection.places.values()}),
            "scenes": {name: len(ids) for name, ids in collection.splits.items()},
            "image_size": list(collection.image_size),
        },
        "versions": package_versions(),
        "device": {**device_info(), "used": device},
        "meaning": MEANING,
    }
    write_json(folder.root / REPORT, content)
    return content


def _marker(root: Path, name: str) -> Marker:
    marker = read_marker(root, name)
    if marker is None:
        raise UserInputError(f"The demo in {root} lacks its stage '{name}': run nfldm-demo again.")
    return marker


def summarise(metrics: Mapping[str, Any], markers: Mapping[str, Marker]) -> dict[str, Any]:
    """The part of `report.json` that is measured."""
    views, sets = metrics["novel_views"], metrics["image_sets"]
    fid, kid = sets["fid"], sets["kid"]
    return {
        "stage1": {
            **_novel_views(views["stage1"]),
            "nearest_view": views["nearest_view"],
            "mean_image": views["mean_image"],
            "num_images": views["num_images"],
            "num_scenes": views["num_scenes"],
            **_cost(markers["stage1"]),
        },
        "stage2": {
            **_novel_views(views["stage2"]),
            **{
                f"psnr_{name}": views[name]["psnr"]
                for name in ("without_fine", "without_coarse", "without_global", "not_quantised")
                if name in views
            },
            **_cost(markers["stage2"]),
        },
        "stage3": _cost(markers["stage3"]),
        "samples": {
            "fid": fid["samples"],
            "kid": kid["samples"],
            "num_images": sets["num_images"],
            **{f"{name}_fid": fid[name] for name in ("stage1", "stage2", "mean_image")},
            **{f"{name}_kid": kid[name] for name in ("stage1", "stage2", "mean_image")},
            "train_vs_test_fid": fid["train"],
            "train_vs_test_kid": kid["train"],
            "fid_to_train": fid["samples_to_train"],
            "kid_to_train": kid["samples_to_train"],
        },
        "stages": {name: _cost(marker) for name, marker in markers.items()},
        "total_seconds": round(sum(marker.seconds for marker in markers.values()), 2),
        "peak_rss_gib": max(marker.peak_rss_gib for marker in markers.values()),
    }


def _novel_views(values: Mapping[str, float]) -> dict[str, float]:
    """Metrics under the names of the report."""
    names = {"depth_mae_in_box_m": "depth_mae_m", "depth_mae_m": "depth_mae_all_m"}
    return {names.get(name, name): value for name, value in values.items()}


def _cost(marker: Marker) -> dict[str, float]:
    return {"seconds": marker.seconds, "peak_rss_gib": marker.peak_rss_gib}
