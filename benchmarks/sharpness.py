"""Where the sharpness of stage 1 goes: held-out places as encoded, refined by learned steps, and optimised.

    python benchmarks/sharpness.py --models SHIPPED REFINED --data data/mazes --output-dir OUT [--optimised-steps 100]

A row is a way to V from the source views of held-out places. Of their target views: PSNR, LPIPS, error of depth, FID
and KID to the real ones. Of a fly-through of each: how much neighbouring views differ where they see the same surface
(`reprojection_error`), beside what the same pixels differ unmoved. Real views of training places stand beside them.

Writes `sharpness.json`, `sharpness.md` and `sharpness.png`. Needs the weights of LPIPS and Inception.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder, read_training_record
from nfldm_ns.autoencoder.novel_views import SceneScores, ViewJudge
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.choice import evenly
from nfldm_ns.generated.cameras import fly_through
from nfldm_ns.latents.voxel_optimiser import VoxelOptimiser
from nfldm_ns.metrics.consistency import reprojection_error
from nfldm_ns.metrics.images import extract_features, frechet_distance, kernel_distance, nearest_source_view
from nfldm_ns.models import resolve_model
from nfldm_ns.pretrained.weights import load_inception, load_lpips
from nfldm_ns.reports.galleries import image_grid, write_png
from nfldm_ns.reports.report import Table
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import SceneBatch, Views, index_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.scenes.writing import require_writable, write_json
from shared.running import run, write_tables

FLIGHT_FRAMES = 24
COLUMNS = ("PSNR (dB)", "LPIPS", "depth error (m)", "FID", "KID", "neighbours (1/255)", "unmoved (1/255)", "s of CPU")
SHOWN_SCENES = 6


@dataclass
class Options:
    """Measure the sharpness of stage 1."""

    models: tuple[Path, ...]
    """trained scene auto-encoders: runs, their folders, or those of a pipeline"""
    data: Path
    """the scene collection"""
    output_dir: Path
    """folder for the results"""
    num_scenes: int = 56
    """held-out places, evenly chosen"""
    steps: tuple[int, ...] = (1, 2, 4)
    """of learned refinement, for models that have it"""
    optimised_steps: int = 0
    """of gradient descent on the source views, after each model's own encoding; 0 leaves it out"""
    all_images: bool = False
    """FID and KID of source views, too, as in the protocol of GSN; scores stay those of target views"""
    threads: int = 1
    """CPU threads"""
    seed: int = 0
    """of what is drawn"""


@dataclass
class Row:
    """What was measured of one way to V."""

    scores: SceneScores = field(default_factory=SceneScores)
    images: list[Tensor] = field(default_factory=list)
    agreement: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    seconds: float = 0.0


Way = Callable[[SceneBatch], VoxelGrid]


def ways(name: str, model: SceneAutoencoder, options: Options, perceptual: PerceptualNetwork) -> dict[str, Way]:
    """From a place to V, by name."""

    def encode(steps: int) -> Way:
        return lambda batch: model.encode(batch.source, steps)

    found = {f"{name}, encoder": encode(0)}
    if model.refiner is not None:
        found |= {f"{name}, {steps} steps": encode(steps) for steps in options.steps}
    if options.optimised_steps:
        optimiser = VoxelOptimiser(perceptual, options.optimised_steps)
        last = list(found.values())[-1]
        found[f"{name}, then {options.optimised_steps} of gradient descent"] = lambda batch: optimiser(
            model, last(batch), [batch.source]
        )
    return found


@torch.no_grad()
def measure(row: Row, model: SceneAutoencoder, way: Way, batch: SceneBatch, judge: ViewJudge, all_images: bool) -> None:
    """Adds one place."""
    begun = time.process_time()
    grid = way(batch)
    row.seconds += time.process_time() - begun
    rendered = model.render(grid, batch.target.cameras)
    row.scores.add(batch.scene_ids, judge.score(rendered))
    shown = [rendered.rgb, model.render(grid, batch.source.cameras).rgb] if all_images else [rendered.rgb]
    row.images.append(torch.cat(shown, dim=1)[0].clamp(0, 1))
    flight = fly_through(index_cameras(batch.source.cameras, 0), FLIGHT_FRAMES)
    seen = model.render(grid, index_cameras(flight, (None,)))
    for key, value in reprojection_error(Views(flight, seen.rgb[0], seen.depth[0])).items():
        row.agreement[key].append(value)


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    require_writable(options.output_dir)
    collection = SceneCollection.open(options.data)
    perceptual, inception = PerceptualNetwork(load_lpips("vgg")), load_inception()
    models: dict[str, SceneAutoencoder] = {}
    for path in options.models:
        folder = resolve_model(path)
        folder = folder / "scene_autoencoder" if (folder / "model_index.json").is_file() else folder
        step = read_training_record(folder).get("step")
        models[path.name if step is None else f"{path.name} ({step + 1} training steps)"] = load_scene_autoencoder(
            folder
        )
    everything = {name: ways(name, model, options, perceptual) for name, model in models.items()}
    rows = {row: Row() for found in everything.values() for row in found}
    real, nearest = [], []
    for scene_id in track(evenly(collection.split("test"), options.num_scenes), "Places", transient=True):
        batch = collection.batch([collection.load_scene(scene_id)])
        judge = ViewJudge(batch.target, batch.aabb, perceptual)
        real.append(_images(batch, options.all_images))
        nearest.append(nearest_source_view(batch)[0])
        for name, found in everything.items():
            for row, way in found.items():
                measure(rows[row], models[name], way, batch, judge, options.all_images)
    train = evenly(collection.split("train"), options.num_scenes)
    others = [_images(collection.batch([collection.load_scene(i)]), options.all_images) for i in train]
    write(options, rows, real, {"real views of training places": others, "nearest source view": nearest}, inception)


def _images(batch: SceneBatch, all_images: bool) -> Tensor:
    """Real views of a place, those that are judged first."""
    return torch.cat([batch.target.images[0], batch.source.images[0]]) if all_images else batch.target.images[0]


def write(
    options: Options,
    rows: dict[str, Row],
    real: list[Tensor],
    plain: dict[str, list[Tensor]],
    inception: torch.nn.Module,
) -> None:
    """Distances, table, numbers and a sheet."""
    reference = extract_features(inception, real)

    def distances(images: list[Tensor]) -> tuple[float, float]:
        features = extract_features(inception, images)
        return frechet_distance(reference, features), kernel_distance(reference, features).mean

    results = {name: dict(zip(("fid", "kid"), distances(images), strict=True)) for name, images in plain.items()}
    for name, row in rows.items():
        means = {key: sum(values) / len(values) for key, values in row.agreement.items()}
        results[name] = {
            **row.scores.mean(),
            **dict(zip(("fid", "kid"), distances(row.images), strict=True)),
            "neighbours": means["l1"] * 255,
            "unmoved": means["unmoved_l1"] * 255,
            "seconds": row.seconds / len(row.images),
        }
    keys = ("psnr", "lpips", "depth_mae_in_box_m", "fid", "kid", "neighbours", "unmoved", "seconds")
    cells = [[name, *(values.get(key) for key in keys)] for name, values in results.items()]
    caption = f"{len(real)} held-out places, {sum(map(len, real))} views."
    table = Table(["", *COLUMNS], cells, caption, digits=[0, 2, 3, 2, 1, 4, 2, 2, 2])
    write_json(options.output_dir / "sharpness.json", {"seed": options.seed, "rows": results})
    shown = range(0, len(real), -(-len(real) // SHOWN_SCENES))
    columns = {"real": [real[i][0] for i in shown]}
    columns |= {name: [row.images[i][0] for i in shown] for name, row in rows.items()}
    write_png(options.output_dir / "sharpness.png", image_grid(columns, ["" for _ in shown]))
    write_tables(options.output_dir / "sharpness.md", [table])


if __name__ == "__main__":
    run(main, Options, __doc__)
