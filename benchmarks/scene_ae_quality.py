"""How well a trained stage 1 shows places it has never seen: numbers, curves and a page of pictures.

    python benchmarks/scene_ae_quality.py --load-config RUN/config.yml --output-dir OUT [--threads 2]

Novel views of the collection's test scenes, always beside the nearest source view and the mean training image:

- inputs: dense depth, sparse depth (a few random known pixels per view, as of a Lidar) and no depth;
- the number of source views, with dense and without depth. Views are spread evenly in yaw, see `evenly_spread_views`;
- upper bounds: V of some scenes optimised directly, see `optimise_grid`, for the source views only and for all views;
- the sky: how many rays of unknown depth end on voxels.

Writes `quality.json`, `quality.md`, `curves.png` and `pages.png`. Needs the weights of LPIPS (`nfldm-weights get
lpips-vgg`). 42 scenes of 64 x 64 pixels take about two minutes on two cores, and each scene of the upper bounds up to
two more.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor

from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder, read_run_config, read_training_record
from nfldm_ns.autoencoder.grid_optimisation import GridOptimiserConfig, optimise_grid
from nfldm_ns.autoencoder.losses import StageOneLossConfig
from nfldm_ns.autoencoder.novel_views import (
    MEAN_IMAGE_SCENES,
    DepthKind,
    EncoderInput,
    SceneScores,
    ViewJudge,
    mean_training_image,
    reconstruct,
)
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.choice import evenly
from nfldm_ns.errors import UserInputError
from nfldm_ns.metrics.images import nearest_source_view
from nfldm_ns.pretrained.weights import load_lpips
from nfldm_ns.reports.galleries import depth_colors, error_colors, image_grid, write_png
from nfldm_ns.reports.report import Table
from nfldm_ns.reports.resources import device_info, package_versions
from nfldm_ns.scenes.collection import Scene, SceneCollection
from nfldm_ns.scenes.views import Views
from nfldm_ns.scenes.writing import atomic_path, require_writable, write_json
from shared.running import run

BEST, MIDDLE, WORST = 5, 6, 5
LARGEST_ERROR = 0.5
NAMES = {"dense": "dense depth", "sparse": "sparse depth", "none": "RGB only"}


@dataclass
class Options:
    """Measure a trained stage 1."""

    load_config: Path
    """the config.yml of a stage 1 run, or its folder"""
    output_dir: Path
    """folder for the results"""
    data: Path | None = None
    """the scene collection; by default the one it was trained on"""
    num_scenes: int | None = None
    """test scenes, evenly chosen; by default all"""
    sparse_points: int = 200
    """known pixels per view of sparse depth"""
    curve_views: tuple[int, ...] = (1, 2, 4, 6, 8)
    """numbers of source views of the curves; those there are not are left out"""
    curve_scenes: int = 60
    """scenes of the curves, evenly chosen; 0 leaves them out"""
    bound_scenes: int = 16
    """scenes of the upper bounds, evenly chosen; 0 leaves them out"""
    bounds: GridOptimiserConfig = field(default_factory=GridOptimiserConfig)
    """how V is optimised for them"""
    scenes_at_once: int = 4
    """scenes of a batch"""
    threads: int = 2
    """CPU threads"""
    seed: int = 0
    """of the sparse points"""


@dataclass
class Trial:
    """What is measured, and on which scenes.

    Attributes:
        curve_ids: scenes of the curves.
        counts: numbers of source views of the curves.
        mean: the mean training image.
    """

    autoencoder: SceneAutoencoder
    collection: SceneCollection
    perceptual: PerceptualNetwork
    options: Options
    scene_ids: list[str]
    curve_ids: list[str]
    counts: list[int]
    depth_kinds: list[DepthKind]
    mean: Float[Tensor, "3 height width"]

    def input(self, depth: DepthKind, num_views: int | None = None) -> EncoderInput:
        return EncoderInput(depth, num_views, self.options.sparse_points, self.options.seed)

    def batches(self, scene_ids: Sequence[str], description: str) -> Iterator[list[Scene]]:
        """Scenes from disk, some at a time."""
        size = self.options.scenes_at_once
        for first in track(range(0, len(scene_ids), size), description, transient=True):
            yield [self.collection.load_scene(i) for i in scene_ids[first : first + size]]


def prepare(options: Options) -> Trial:
    """Loads what is needed; `UserInputError` if something is missing."""
    require_writable(options.output_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = options.data or read_training_record(options.load_config).get("data")
    if data is None:
        raise UserInputError(f"{options.load_config} does not say what it was trained on: add --data.")
    autoencoder = load_scene_autoencoder(options.load_config).to(device)
    collection = SceneCollection.open(data)
    test = collection.split("test")
    scene_ids = evenly(test, options.num_scenes or len(test))
    first = collection.load_scene(scene_ids[0])
    uses_depth = autoencoder.config.encoder_input != "rgb" and first.source.depths is not None
    train = collection.split("train")
    every = -(-len(train) // MEAN_IMAGE_SCENES)
    return Trial(
        autoencoder,
        collection,
        PerceptualNetwork(load_lpips("vgg")).to(device),
        options,
        scene_ids,
        evenly(scene_ids, options.curve_scenes),
        [count for count in sorted(set(options.curve_views)) if 1 <= count <= first.source.shape[0]],
        ["dense", "sparse", "none"] if uses_depth else ["none"],
        mean_training_image(collection.batch([collection.load_scene(i)]) for i in train[::every]).to(device),
    )


# Numbers


@torch.no_grad()
def score_inputs(trial: Trial) -> tuple[dict[str, SceneScores], dict[tuple[str, int], SceneScores]]:
    """Scores by input, with the baselines, and those of the curves by input and number of source views."""
    inputs: dict[str, SceneScores] = {}
    curves: dict[tuple[str, int], SceneScores] = {}
    curve_kinds = [kind for kind in trial.depth_kinds if kind != "sparse"]
    others = [i for i in trial.scene_ids if i not in set(trial.curve_ids)]
    for ids, with_curves in ((trial.curve_ids, True), (others, False)):
        for scenes in trial.batches(ids, "Novel views"):
            batch = trial.collection.batch(scenes).to(trial.autoencoder.device)
            judge = ViewJudge(batch.target, batch.aabb, trial.perceptual)
            mean = judge.score_images(trial.mean.expand_as(batch.target.images))
            inputs.setdefault("mean image", SceneScores()).add(batch.scene_ids, mean)
            nearest = judge.score_images(nearest_source_view(batch))
            inputs.setdefault("nearest view", SceneScores()).add(batch.scene_ids, nearest)
            for kind in trial.depth_kinds:
                scores = score_input(trial, scenes, trial.input(kind), judge)
                inputs.setdefault(kind, SceneScores()).add(batch.scene_ids, scores)
            for count in trial.counts if with_curves else ():
                fewer = trial.collection.batch([trial.input("dense", count).of(scene) for scene in scenes])
                nearest = judge.score_images(nearest_source_view(fewer).to(judge.target.images))
                curves.setdefault(("nearest view", count), SceneScores()).add(batch.scene_ids, nearest)
                for kind in curve_kinds:
                    scores = score_input(trial, scenes, trial.input(kind, count), judge)
                    curves.setdefault((kind, count), SceneScores()).add(batch.scene_ids, scores)
    return inputs, curves


def score_input(trial: Trial, scenes: list[Scene], encoder_input: EncoderInput, judge: ViewJudge) -> dict[str, Tensor]:
    """Scores of the target views, rendered from part of the source views."""
    batch = trial.collection.batch([encoder_input.of(scene) for scene in scenes]).to(trial.autoencoder.device)
    return judge.score(reconstruct(trial.autoencoder, batch))


def score_bounds(trial: Trial, scene_ids: list[str]) -> dict[str, Any]:
    """Scores of V from the encoder, optimised for the source views, and optimised for all views, of some scenes."""
    settings = read_run_config(trial.options.load_config)["pipeline"]["model"]["loss"]
    try:
        loss = StageOneLossConfig(**settings)
    except TypeError as error:
        raise UserInputError(
            f"The losses in {trial.options.load_config} are of another version ({error}): train stage 1 again."
        ) from None
    scores = {name: SceneScores() for name in ("encoder", "source views", "all views")}
    runs = []
    for scene_id in track(scene_ids, "Upper bounds", transient=True):
        begun = time.perf_counter()
        scene = trial.input(trial.depth_kinds[0]).of(trial.collection.load_scene(scene_id))
        batch = trial.collection.batch([scene]).to(trial.autoencoder.device)
        everything = Views.stack([Views.cat([batch.source[0], batch.target[0]])])
        judge = ViewJudge(batch.target, batch.aabb, trial.perceptual)
        with torch.no_grad():
            grid = trial.autoencoder.encode(batch.source)
        grids = {"encoder": grid}
        for name, views in (("source views", batch.source), ("all views", everything)):
            result = optimise_grid(trial.autoencoder, grid, views, loss, trial.perceptual, trial.options.bounds)
            grids[name] = result.grid
            runs.append(
                {
                    "scene": scene_id,
                    "views": name,
                    "losses": result.losses,
                    "steps": result.steps,
                    "converged": result.converged,
                }
            )
        for name, optimised in grids.items():
            with torch.no_grad():
                rendered = trial.autoencoder.render(optimised, batch.target.cameras)
            scores[name].add([scene_id], judge.score(rendered))
        runs[-1]["seconds_of_scene"] = round(time.perf_counter() - begun, 1)
    return {
        "scene_ids": scene_ids,
        "loss": settings,
        "scores": {name: values.mean() for name, values in scores.items()},
        "runs": runs,
    }


# Tables


METRICS = ("psnr", "ssim", "lpips", "depth_mae_m", "depth_mae_in_box_m")
COLUMNS = ("PSNR (dB)", "SSIM", "LPIPS (VGG)", "depth error (m)", "depth error in the box (m)")
DIGITS = (2, 3, 3, 2, 2)


def score_table(names: Sequence[str], rows: dict[str, dict[str, float]], caption: str) -> Table:
    """Scores by name, a row each; `names` are the first columns' headings."""
    cells = [[*name.split("|"), *(scores.get(metric) for metric in METRICS)] for name, scores in rows.items()]
    return Table([*names, *COLUMNS], cells, caption, digits=[0] * len(names) + list(DIGITS))


def describe(results: dict[str, Any]) -> str:
    """All results as Markdown."""
    count = f"{results['num_scenes']} test scenes, {results['num_images']} images"
    order = ["nearest view", "mean image", *(kind for kind in NAMES if kind in results["inputs"])]
    inputs = {NAMES.get(name, name): results["inputs"][name] for name in order}
    training = results["training"]
    name = f"`{training['method']}` after {training['step'] + 1} steps" if training else "Stage 1"
    notes = (
        f"{name}, {results['collection']}. Lower is better for LPIPS and depth errors. Depth errors are means of "
        "absolute errors of planar depth over pixels of known depth: of all, and of those with a surface in the box.\n"
    )
    parts = [notes, score_table([""], inputs, f"Novel views by what the encoder gets: {count}.").markdown()]
    if results["curves"]:
        rows = {f"{NAMES.get(row['input'], row['input'])}|{row['views']}": row["scores"] for row in results["curves"]}
        caption = (
            f"Novel views by the number of source views: {len(results['curve_scene_ids'])} of these scenes. Those "
            "views are taken that come closest to dividing the circle, from the first on, into equal parts."
        )
        parts.append(score_table(["", "views"], rows, caption).markdown())
    if results["bounds"]:
        parts.append(_describe_bounds(results["bounds"]))
    parts.append(_describe_sky(results["inputs"]))
    parts.append(
        f"`pages.png`: the {BEST} best, {MIDDLE} middle and {WORST} worst of these scenes by LPIPS, one view of each: "
        "that whose LPIPS is closest to the scene's mean. LPIPS and PSNR beside a row are means of its scene.\n"
    )
    return "\n".join(parts)


def _describe_bounds(bounds: dict[str, Any]) -> str:
    titles = {"encoder": "encoder", "source views": "V optimised for the source views"}
    titles["all views"] = "V optimised for all views, these included"
    rows = {titles[name]: scores for name, scores in bounds["scores"].items()}
    steps = [run["steps"] for run in bounds["runs"]]
    stood = sum(run["converged"] for run in bounds["runs"])
    caption = (
        f"Upper bounds: target views of {len(bounds['scene_ids'])} scenes. V is optimised from the encoder's on, with "
        f"a frozen decoder and the losses of the training, until their sum stands still: {stood} of {len(steps)} did "
        f"within the limit; {sum(steps) / len(steps):.0f} steps on average."
    )
    return score_table([""], rows, caption).markdown()


def _describe_sky(inputs: dict[str, dict[str, float]]) -> str:
    names = ("accumulation_unknown", "accumulation_known")
    shown = {name: scores for name, scores in inputs.items() if names[0] in scores}
    if not shown:
        return "Sky: no pixel of unknown depth in scenes that otherwise have depth.\n"
    rows = [[NAMES[name], *(scores[key] for key in names)] for name, scores in shown.items()]
    caption = "Share of rays that end on voxels, over target pixels of unknown depth (sky) and of known depth."
    return Table(["", "unknown depth", "known depth"], rows, caption).markdown()


# Pictures


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Scores over the number of source views."""
    figure = Figure(figsize=(10.5, 3.1), layout="constrained")
    names = list(dict.fromkeys(row["input"] for row in rows))
    panels = [0, 2, 4] if any(METRICS[4] in row["scores"] for row in rows) else [0, 2]
    for axes, metric in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name in names:
            points = [row for row in rows if row["input"] == name and METRICS[metric] in row["scores"]]
            if not points:
                continue
            style = {"linestyle": "--", "color": "0.5"} if name == "nearest view" else {}
            x, y = [row["views"] for row in points], [row["scores"][METRICS[metric]] for row in points]
            axes.plot(x, y, marker="o", markersize=4, label=NAMES.get(name, name), **style)
        axes.set(xlabel="source views", ylabel=COLUMNS[metric], xticks=sorted({row["views"] for row in rows}))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def chosen_scenes(scores: SceneScores) -> list[tuple[str, str]]:
    """The best, the middle and the worst scenes by LPIPS, each with its name on the page."""
    ranked = sorted(scores.scene_ids, key=lambda i: float(scores.views(i, "lpips").mean()))
    if len(ranked) <= BEST + MIDDLE + WORST:
        return [(i, f"rank {rank + 1}") for rank, i in enumerate(ranked)]
    middle = (len(ranked) - MIDDLE) // 2
    ranks = [*range(BEST), *range(middle, middle + MIDDLE), *range(len(ranked) - WORST, len(ranked))]
    groups = ["best"] * BEST + ["middle"] * MIDDLE + ["worst"] * WORST
    return [(ranked[rank], f"{group}: {rank + 1} of {len(ranked)}") for rank, group in zip(ranks, groups, strict=True)]


@torch.no_grad()
def draw_page(trial: Trial, scores: SceneScores, path: Path) -> None:
    """One view of each chosen scene, a row each."""
    low, high = trial.collection.aabb
    reach = math.hypot(*torch.maximum(low.abs(), high.abs())[:2].tolist())
    scale = f"0 to {reach:.0f} m"
    names = (
        "nearest source",
        "real",
        "render",
        f"depth, {scale}",
        f"real depth, {scale}",
        f"error, 0 to {LARGEST_ERROR}",
    )
    columns: dict[str, list[Tensor]] = {name: [] for name in names}
    labels = []
    for scene_id, rank in chosen_scenes(scores):
        scene = trial.input(trial.depth_kinds[0]).of(trial.collection.load_scene(scene_id))
        batch = trial.collection.batch([scene]).to(trial.autoencoder.device)
        rendered = reconstruct(trial.autoencoder, batch)
        lpips, psnr = (scores.views(scene_id, name) for name in ("lpips", "psnr"))
        view = int((lpips - lpips.mean()).abs().argmin())
        rgb, real, depths = rendered.rgb[0, view], batch.target.images[0, view], batch.target.depths
        pictures = [nearest_source_view(batch)[0, view], real, rgb, depth_colors(rendered.depth[0, view], 0, reach)]
        unknown = torch.zeros_like(real[:1])
        pictures.append(depth_colors(unknown if depths is None else depths[0, view], 0, reach))
        pictures.append(error_colors(rgb, real, LARGEST_ERROR))
        for column, picture in zip(columns.values(), pictures, strict=True):
            column.append(picture)
        place = trial.collection.places.get(scene_id, {}).get("map", "")
        numbers = f"LPIPS {lpips.mean():.3f}\nPSNR {psnr.mean():.1f} dB"
        labels.append("\n".join(filter(None, [rank, scene_id, place, numbers])))
    write_png(path, image_grid(columns, labels))


# All of it


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    begun = time.perf_counter()
    trial = prepare(options)
    inputs, curves = score_inputs(trial)
    main_input = inputs[trial.depth_kinds[0]]
    results: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/scene_ae_quality.py", *sys.argv[1:]]),
        "seed": options.seed,
        "sparse_points": options.sparse_points,
        "collection": trial.collection.name,
        "made_by": trial.collection.made_by,
        "training": read_training_record(options.load_config),
        "model": {key: value for key, value in trial.autoencoder.config.items() if not key.startswith("_")},
        "versions": package_versions(),
        "device": device_info(),
        "num_scenes": len(trial.scene_ids),
        "num_images": main_input.num_images,
        "inputs": {name: scores.mean() for name, scores in inputs.items()},
        "curve_scene_ids": trial.curve_ids,
        "curves": [
            {"input": name, "views": count, "scores": curves[name, count].mean()}
            for name in ("nearest view", *NAMES)
            for count in trial.counts
            if (name, count) in curves
        ],
        "scenes": {scene_id: main_input.mean([scene_id]) for scene_id in trial.scene_ids},
        "bounds": None,
        "seconds": {"novel views": round(time.perf_counter() - begun, 1)},
    }
    draw_page(trial, main_input, options.output_dir / "pages.png")
    if curves:
        draw_curves(results["curves"], options.output_dir / "curves.png")
    write_results(options.output_dir, results)
    if options.bound_scenes:
        before = time.perf_counter()
        results["bounds"] = score_bounds(trial, evenly(trial.scene_ids, options.bound_scenes))
        results["seconds"]["upper bounds"] = round(time.perf_counter() - before, 1)
        write_results(options.output_dir, results)
    print(describe(results))


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """`quality.json` and `quality.md`, with all results there are so far."""
    write_json(folder / "quality.json", results)
    with atomic_path(folder / "quality.md") as temporary:
        temporary.write_text(describe(results), encoding="utf-8")


if __name__ == "__main__":
    run(main, Options, __doc__)
