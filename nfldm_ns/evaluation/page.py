"""`index.html` of an evaluation: unselected samples, all numbers, histograms of depth, and the copy check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nfldm_ns.choice import evenly
from nfldm_ns.evaluation.numbers import CopyCheck
from nfldm_ns.evaluation.scenes import FIXED_VIEWS, PictureFolder
from nfldm_ns.metrics.geometry import DepthHistogram
from nfldm_ns.metrics.image_sets import read_picture
from nfldm_ns.metrics.neighbours import COPY_RATIO
from nfldm_ns.reports.galleries import stack, strip
from nfldm_ns.reports.report import Curves, Gallery, Picture, Plots, Report, Section, Table
from nfldm_ns.scenes.collection import SceneCollection

SAMPLES = 16
REAL_SCENES = 8
VIEWS_SHOWN = 4
MATCHES = 16
CLOSEST = 8
TITLES = {
    "samples": "generated scenes",
    "stage2": "stage 2 reconstructions of test scenes",
    "stage1": "stage 1 renders of test scenes",
    "mean_image": "mean training image",
    "train": "real training images",
    "test": "real test images",
}
DISTANCES = (("fid", "FID", 1, 1), ("kid", "KID x 1000", 1000, 2), ("fvd", "FVD", 1, 1))
"""Distances of sets to the real test set that the table shows where they were measured: key, title, scale, digits."""


def write_page(
    path: Path,
    folder: PictureFolder,
    numbers: Mapping[str, Any],
    histograms: Mapping[str, DepthHistogram],
    copies: CopyCheck,
    collection: SceneCollection,
) -> None:
    """Writes the page.

    Args:
        numbers: the content of `eval.json`.
    """
    sections = [
        samples(folder, numbers, copies.scenes["generated"]),
        distances(numbers),
        neighbours(numbers),
        depth(numbers, histograms),
        floating(numbers),
        copy_check(folder, numbers, copies),
        real_scenes(folder, numbers, copies.scenes["test"]),
    ]
    title = f"Evaluation of {numbers['source'] or 'a trained generator'}"
    Report(title, introduction(numbers, collection), sections, footer(numbers)).write(path)


def _steps(steps: int | Sequence[int]) -> str:
    if isinstance(steps, int):
        return f"{steps} denoising steps per latent"
    return "{}, {} and {} denoising steps of g, c and f".format(*steps)


def introduction(numbers: Mapping[str, Any], collection: SceneCollection) -> str:
    """The protocol in words."""
    count, scenes = numbers["num_images"], numbers["copies"]["num_scenes"]
    width, height = collection.image_size
    views = numbers["views_of_real_scenes"]
    kind = "target and source" if numbers["with_source_views"] else "target"
    return (
        f"{scenes['generated']} scenes were sampled with the seeds {numbers['seed']}, {numbers['seed'] + 1}, ... and "
        f"{_steps(numbers['num_inference_steps'])}, and seen by {numbers['views_per_scene']} evenly "
        f"chosen cameras of their own sampled trajectories, at {width} x {height} pixels. Every set of images has "
        f"{count} images. The reference are real images of the test split of `{collection.name}`, {views['test']} "
        f"{kind} views of each scene, of places that no stage was trained on.\n\n"
        f"Images are compared by {numbers['distances']['features']}, {numbers['distances']['resizing']}. FID depends "
        "on the number of images: compare it only with values of the same number. `docs/evaluation.md` says what each "
        "number means."
    )


def footer(numbers: Mapping[str, Any]) -> str:
    """What it ran on."""
    versions = ", ".join(f"{name} {version}" for name, version in numbers["versions"].items())
    machine = numbers["device"].get("gpu") or numbers["device"]["processor"]
    return f"Made by `nfldm-eval` on {machine}; {versions}."


# Pictures


def _views(folder: Path, scene: str) -> Float[Tensor, "3 height total_width"]:
    paths = sorted(folder.glob(f"{scene}_*.png"), key=lambda path: int(path.stem.rsplit("_", 1)[1]))
    return strip([read_picture(path) for path in evenly(paths, VIEWS_SHOWN)])


def samples(folder: PictureFolder, numbers: Mapping[str, Any], names: Sequence[str]) -> Section:
    """The first generated scenes."""
    shown = list(names[:SAMPLES])
    items = [Picture(_views(folder.pictures("samples"), name), f"seed {int(name)}") for name in shown]
    text = f"The first {len(shown)} of {len(names)} scenes, none selected; each row shows one scene by its own cameras."
    return Section("Generated scenes", text, [Gallery(items, tile_width=400, pixels=True)])


def real_scenes(folder: PictureFolder, numbers: Mapping[str, Any], names: Sequence[str]) -> Section:
    """Real test scenes above what stages 1 and 2 make of them."""
    there = [name for name in names if (folder.pictures("test") / f"{name}_0.png").is_file()]
    items = [
        Picture(stack([_views(folder.pictures(kind), name) for kind in ("test", "stage1", "stage2")]), name)
        for name in evenly(there, REAL_SCENES)
    ]
    text = "Evenly spaced in the test split: real views, below them stage 1, below that stage 1 after the latents."
    return Section("Real test scenes", text, [Gallery(items, tile_width=400, pixels=True)])


# Numbers of images


def distances(numbers: Mapping[str, Any]) -> Section:
    """FID, KID and whatever else was measured of whole sets."""
    found = numbers["distances"]
    kinds = [kind for kind in DISTANCES if kind[0] in found]
    rows = [
        [TITLES[name], *(_scaled(found[key].get(name), scale) for key, _, scale, _ in kinds)]
        for name in ("samples", "stage2", "stage1", "mean_image", "train")
    ]
    rows.append(
        ["generated scenes to real training images"]
        + [_scaled(found[key].get("samples_to_train"), scale) for key, _, scale, _ in kinds]
    )
    videos = ""
    if "fvd" in found:
        videos = (
            f" FVD: fly-throughs of {found['num_videos']} scenes of each set, of real ones as stage 1 renders them "
            "along the path of their source cameras; features: I3D's logits."
        )
    table = Table(
        ["set of images", *(title for _, title, _, _ in kinds)],
        rows,
        caption=f"Distance to {found['num_images']} real test images; every set has {found['num_images']} images. "
        f"Lower is better. Features: {found['features']}.{videos}",
        emphasis=(0,),
        digits=(0, *(digits for *_, digits in kinds)),
    )
    text = (
        "Real training images are the floor: a perfect generator does no better. Reconstructions of test scenes are "
        "what sampling could reach at most with these auto-encoders. The mean image is what one shows knowing nothing."
    )
    return Section("Distances between sets of images", text, [table])


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def neighbours(numbers: Mapping[str, Any]) -> Section:
    """Precision, recall, density and coverage."""
    found = numbers["neighbours"]
    keys = ("precision", "recall", "density", "coverage")
    sets = ("samples", "stage2", "stage1", "mean_image", "train")
    table = Table(
        ["set of images", *keys],
        [[TITLES[name], *(found["sets"][name][key] for key in keys)] for name in sets],
        caption=f"Against {found['num_images']} real test images; every set has {found['num_images']} images. Higher "
        f"is better. Precision and recall with k = {found['precision_k']}, density and coverage with k = "
        f"{found['density_k']} neighbours. Features: {found['features']}.",
        emphasis=(0,),
    )
    text = (
        "Precision and density: do samples look real? Recall and coverage: is all that is real sampled, too? Read them "
        "beside the last row, which is what real images of other places reach."
    )
    return Section("Fidelity and variety", text, [table])


# Geometry


def depth(numbers: Mapping[str, Any], histograms: Mapping[str, DepthHistogram]) -> Section:
    """Histograms of depth and how far they are apart."""
    sets = numbers["depth"]["sets"]
    keys = ("wasserstein_m", "q05_m", "q25_m", "median_m", "q75_m", "q95_m", "surface_share")
    columns = ["set of images", "distance (m)", "5 %", "25 %", "median (m)", "75 %", "95 %", "pixels with a surface"]
    order = [name for name in TITLES if name in sets]
    table = Table(
        columns,
        [[TITLES[name], *(sets[name].get(key) for key in keys)] for name in order],
        caption=f"Planar depth of the pixels that show a surface, over all scenes with images in the sets "
        f"({_pixels(sets)}). Distance: Wasserstein-1 to the real test depths, lower is better. Surfaces beyond the box "
        "count where the ray leaves it.",
        emphasis=(0,) if order[:1] == ["samples"] else (),
        digits=(0, 2, 2, 2, 2, 2, 2, 3),
    )
    shown = [name for name in ("samples", "stage2", "stage1", "test") if name in histograms]
    curves = Curves(
        {TITLES[name]: histograms[name].density() for name in shown},
        "planar depth (m)",
        "density (1/m)",
        "Distribution of depth",
        alt="Distribution of depth of " + ", ".join(TITLES[name] for name in shown),
    )
    text = "" if "test" in sets else "This collection has no depth, so that there is nothing real to compare with."
    return Section("Depth", text, [table, Plots([curves], tile_width=520)])


def _pixels(sets: Mapping[str, Mapping[str, float]]) -> str:
    return ", ".join(f"{TITLES[name]}: {values['num_pixels'] / 1e6:.2f} million" for name, values in sets.items())


def floating(numbers: Mapping[str, Any]) -> Section:
    """Shares of opacity that float or are haze."""
    titles = {
        "generated": "generated scenes",
        "test_stage2": "test scenes, after the latents",
        "test_stage1": "test scenes, stage 1",
        "train_stage2": "training scenes, after the latents",
        "train_stage1": "training scenes, stage 1",
    }
    found = numbers["floating"]
    rows: list[list[Any]] = []
    for name, title in titles.items():
        values = found[name]
        cells = [values[kind][key] for kind in ("floating_share", "haze_share") for key in ("mean", "median", "q95")]
        rows.append([title, values["num_scenes"], *cells])
    table = Table(
        ["scenes", "number", "floating: mean", "median", "95 %", "haze: mean", "median", "95 %"],
        rows,
        caption="Share of a scene's opacity in solid voxels that hang in the air (connected neither with the largest "
        "component nor with the border of the box), and in voxels that are not solid. Near the rows of test scenes is "
        "good.",
        emphasis=(0,),
    )
    return Section("Density that floats", "", [table])


# Copies


def copy_check(folder: PictureFolder, numbers: Mapping[str, Any], copies: CopyCheck) -> Section:
    """Distances to the nearest training scene, and pictures of it."""
    found = numbers["copies"]
    scenes = found["num_scenes"]
    rows: list[list[Any]] = []
    for kind in ("latents", "renders"):
        for name, title in (("generated", "generated"), ("held_out", "held-out")):
            values = found[kind][name]
            cells = [values[key] for key in ("min", "q05", "median", "q95")]
            closer = found[kind]["generated_closer_than_q05"] if name == "generated" else None
            rows.append([f"{title}, by {kind}", *cells, closer, found[kind][f"{name}_copies"]])
    table = Table(
        ["scenes", "least", "5 %", "median", "95 %", "closer than held-out's 5 %", "copies"],
        rows,
        caption=f"Distance of {scenes['generated']} generated and {scenes['test']} held-out scenes to the nearest of "
        f"{scenes['train']} training scenes, in any quarter turn. Copies: the nearest is at less than {COPY_RATIO:g} "
        f"times the distance of the second nearest. Renders: {found['features_of_renders']}.",
        emphasis=(0, 2),
    )
    closest = copies.generated["renders"].distance.argsort()[:CLOSEST].tolist()
    first = range(min(MATCHES, scenes["generated"]))
    text = (
        "Held-out scenes cannot be copies. Generated scenes that are copied lie far nearer to a training scene than "
        "these do; where nothing is copied about 5 % are closer than the 5 % quantile of held-out scenes. Blurred "
        "scenes are near to many training scenes at once, which makes them close, but no copies."
    )
    return Section(
        "Does it copy?",
        text,
        [
            table,
            Plots([_cumulative(copies, kind) for kind in ("latents", "renders")], tile_width=440),
            "At the top a generated scene, in the middle the training scene nearest in latents, at the bottom the one "
            f"nearest in renders; {FIXED_VIEWS} views from the origin. Training scenes are shown after their latents, "
            "and are not turned to match.",
            Gallery([_match(folder, copies, i) for i in first], 400, "The first scenes, none selected", pixels=True),
            Gallery([_match(folder, copies, i) for i in closest], 400, "The closest of all, by renders", pixels=True),
        ],
    )


def _match(folder: PictureFolder, copies: CopyCheck, i: int) -> Picture:
    name = copies.scenes["generated"][i]
    matches = {kind: copies.match(kind, i) for kind in ("latents", "renders")}
    strips = [_views(folder.fixed("train"), match["nearest"]) for match in matches.values()]
    said = [
        f"{kind}: `{match['nearest']}` at {match['distance']:.3g} (the second at {match['second']:.3g})"
        for kind, match in matches.items()
    ]
    return Picture(stack([_views(folder.fixed("generated"), name), *strips]), f"seed {int(name)}; " + "; ".join(said))


def _cumulative(copies: CopyCheck, kind: str) -> Curves:
    series = {}
    for title, found in (("generated", copies.generated), ("held-out", copies.held_out)):
        values = found[kind].distance.sort().values
        count = min(len(values), 64)  # of long series the report draws running means, which this is not for
        shares = (torch.arange(count) + 0.5) / count
        series[title] = (torch.quantile(values, shares.to(values)).tolist(), shares.tolist())
    return Curves(
        series,
        f"distance to the nearest training scene ({kind})",
        "share of scenes",
        f"By {kind}",
        alt=f"Shares of generated and held-out scenes up to a distance to the nearest training scene, by {kind}",
    )
