"""Where the sharpness of stage 1 goes: held-out places as encoded, refined by learned steps, and optimised.

    python benchmarks/sharpness.py --models SHIPPED REFINED --data data/mazes --output-dir OUT [--optimised-steps 20]
    python benchmarks/sharpness.py --models vizdoom-stage1 --data data/mazes4480 --output-dir OUT --num-scenes 417 \
        --all-images --num-images 5000 --steps 2 --optimised-steps 20      # GSN's protocol

A row is a way to V from the source views of held-out places. Of their target views: PSNR, LPIPS, error of depth. Of
the same views, or of all: FID, KID, precision and recall to the real ones. Of a fly-through of each: how much
neighbouring views differ where they see the same surface (`reprojection_error`), beside what the same pixels differ
unmoved. Real views of training places stand beside them.

What was made of a place is kept, so that an interrupted run goes on. Writes `sharpness.json`, `sharpness.md` and
`sharpness.png`. Needs the weights of LPIPS and Inception.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder, read_training_record
from nfldm_ns.autoencoder.novel_views import SceneScores, ViewJudge
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork, convolution_dtype
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.choice import evenly
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.cameras import fly_through
from nfldm_ns.latents.voxel_optimiser import VoxelOptimiser
from nfldm_ns.metrics.consistency import reprojection_error
from nfldm_ns.metrics.image_sets import picture_features, read_picture, write_pictures
from nfldm_ns.metrics.images import frechet_distance, kernel_distance, nearest_source_view
from nfldm_ns.metrics.neighbours import precision_recall
from nfldm_ns.models import resolve_model
from nfldm_ns.pretrained.weights import load_inception, load_lpips
from nfldm_ns.reports.galleries import image_grid, write_png
from nfldm_ns.reports.report import Table
from nfldm_ns.scenes.collection import SceneCollection, read_json
from nfldm_ns.scenes.views import SceneBatch, Views, index_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.scenes.writing import require_writable, write_json
from nfldm_ns.training.identity import model_hash
from shared.comparisons import stored
from shared.running import run, write_tables

FLIGHT_FRAMES = 24
COLUMNS = (
    "PSNR (dB)",
    "LPIPS",
    "depth error (m)",
    "FID",
    "KID",
    "precision",
    "recall",
    "neighbours (1/255)",
    "unmoved (1/255)",
    "s of CPU",
)
REAL, TRAIN, NEAREST = "real", "real views of training places", "nearest source view"
NEIGHBOURS_K = 3  # of precision and recall
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
    """FID, KID, precision and recall of source views, too, as in the protocol of GSN; scores stay those of target
    views"""
    num_images: int | None = None
    """of each set for these four, evenly chosen; by default all"""
    threads: int = 1
    """CPU threads"""
    seed: int = 0
    """of what is drawn"""


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


@dataclass
class Places:
    """What is kept of places: `pictures/<set>/<place>_<view>.png`, and `places/<row>/<place>.json`, written last."""

    root: Path

    def pictures(self, name: str) -> Path:
        """Those of a set."""
        return self.root / "pictures" / slug(name)

    def record(self, name: str, scene_id: str) -> Path:
        """What was measured of a place."""
        return self.root / "places" / slug(name) / f"{scene_id}.json"

    def keep(self, name: str, scene_id: str, images: Tensor, measured: dict[str, Any]) -> None:
        """Writes a place."""
        self.pictures(name).mkdir(parents=True, exist_ok=True)
        write_pictures(self.pictures(name), scene_id, images)
        write_json(self.record(name, scene_id), {**measured, "views": len(images)})

    def has(self, name: str, scene_id: str) -> bool:
        """Whether a place is done."""
        return self.record(name, scene_id).is_file()

    def paths(self, name: str, scene_ids: list[str]) -> list[Path]:
        """All pictures of a set."""
        counts = [(i, read_json(self.record(name, i))["views"]) for i in scene_ids]
        return [self.pictures(name) / f"{i}_{view}.png" for i, count in counts for view in range(count)]


def slug(name: str) -> str:
    """A name for files."""
    return re.sub(r"[^\w.]+", "-", name.lower()).strip("-")


@torch.no_grad()
def measure(
    model: SceneAutoencoder, way: Way, batch: SceneBatch, judge: ViewJudge, all_images: bool
) -> tuple[Tensor, dict[str, Any]]:
    """Pictures of a place, and what is measured of it."""
    begun = time.process_time()
    grid = way(batch)
    seconds = time.process_time() - begun
    rendered = model.render(grid, batch.target.cameras)
    scores = {name: values[0].tolist() for name, values in judge.score(rendered).items()}
    shown = [rendered.rgb, model.render(grid, batch.source.cameras).rgb] if all_images else [rendered.rgb]
    flight = fly_through(index_cameras(batch.source.cameras, 0), FLIGHT_FRAMES)
    seen = model.render(grid, index_cameras(flight, (None,)))
    agreement = reprojection_error(Views(flight, seen.rgb[0], seen.depth[0]))
    pictures = torch.cat(shown, dim=1)[0].clamp(0, 1)
    return pictures, {"scores": scores, "agreement": agreement, "seconds": seconds}


def load_models(options: Options) -> dict[str, SceneAutoencoder]:
    """Those to compare, by the names of their rows; raises `UserInputError` where two are called the same."""
    models: dict[str, SceneAutoencoder] = {}
    for path in options.models:
        folder = resolve_model(path)
        folder = folder / "scene_autoencoder" if (folder / "model_index.json").is_file() else folder
        step = read_training_record(folder).get("step")
        name = path.name if step is None else f"{path.name} ({step + 1} training steps)"
        if slug(name) in map(slug, models):
            raise UserInputError(f"Two of --models are called {name}: give their folders other names.")
        models[name] = load_scene_autoencoder(folder)
    return models


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    require_writable(options.output_dir)
    collection = SceneCollection.open(options.data)
    network = load_lpips("vgg")
    perceptual, descending = PerceptualNetwork(network), PerceptualNetwork(network, convolution_dtype("cpu"))
    models = load_models(options)
    settings = {
        "models": {name: model_hash(model) for name, model in models.items()},
        "collection": read_json(collection.root / "collection.json"),
        "seed": options.seed,
        "all_images": options.all_images,
    }
    stored(options.output_dir / "settings.json", settings, dict)
    places, everything = Places(options.output_dir), {}
    test, train = (evenly(collection.split(split), options.num_scenes) for split in ("test", "train"))
    for name, model in models.items():
        everything |= {row: (model, way) for row, way in ways(name, model, options, descending).items()}
    for scene_id in track(test, "Places", transient=True):
        missing = [row for row in everything if not places.has(row, scene_id)]
        if not missing and places.has(NEAREST, scene_id):
            continue
        batch = collection.batch([collection.load_scene(scene_id)])
        judge = ViewJudge(batch.target, batch.aabb, perceptual)
        for row in missing:
            model, way = everything[row]
            places.keep(row, scene_id, *measure(model, way, batch, judge, options.all_images))
        places.keep(REAL, scene_id, _images(batch, options.all_images), {})
        places.keep(NEAREST, scene_id, nearest_source_view(batch)[0], {})
    for scene_id in train:
        if not places.has(TRAIN, scene_id):
            batch = collection.batch([collection.load_scene(scene_id)])
            places.keep(TRAIN, scene_id, _images(batch, options.all_images), {})
    write(options, places, list(everything), test, train)


def _images(batch: SceneBatch, all_images: bool) -> Tensor:
    """Real views of a place, those that are judged first."""
    return torch.cat([batch.target.images[0], batch.source.images[0]]) if all_images else batch.target.images[0]


@dataclass
class Distances:
    """Distances of sets of pictures to the real ones; features are kept."""

    options: Options
    places: Places
    inception: nn.Module = field(default_factory=load_inception)

    def features(self, name: str, scene_ids: list[str]) -> Tensor:
        """Of the pictures of a set."""
        paths = self.places.paths(name, scene_ids)
        chosen = evenly(paths, self.options.num_images or len(paths))
        kept = self.places.root / "features" / f"{slug(name)}-{len(scene_ids)}-{len(chosen)}"
        return picture_features(self.inception, chosen, kept)

    def between(self, real: Tensor, images: Tensor) -> dict[str, float]:
        """`fid`, `kid`, `precision` and `recall`."""
        found = {"fid": frechet_distance(real, images), "kid": kernel_distance(real, images).mean}
        many = min(len(real), len(images)) > NEIGHBOURS_K
        return {**found, **(precision_recall(real, images, NEIGHBOURS_K) if many else {})}


def measured(places: Places, row: str, scene_ids: list[str]) -> dict[str, float]:
    """Means over the places of what was measured of a row."""
    scores, agreement, seconds = SceneScores(), defaultdict(list), 0.0
    for scene_id in scene_ids:
        record = read_json(places.record(row, scene_id))
        found = {name: torch.tensor(values, dtype=torch.float64)[None] for name, values in record["scores"].items()}
        scores.add([scene_id], found)
        seconds += record["seconds"] / len(scene_ids)
        for key, value in record["agreement"].items():
            agreement[key].append(value)
    means = {key: 255 * sum(values) / len(values) for key, values in agreement.items()}
    return {
        **scores.mean(),
        "neighbours": means["l1"],
        "unmoved": means["unmoved_l1"],
        "seconds": seconds,
    }


def write(options: Options, places: Places, rows: list[str], test: list[str], train: list[str]) -> None:
    """Distances, table, numbers and a sheet."""
    distances = Distances(options, places)
    real = distances.features(REAL, test)
    sets = {TRAIN: train, NEAREST: test, **dict.fromkeys(rows, test)}
    results = {name: distances.between(real, distances.features(name, ids)) for name, ids in sets.items()}
    for row in rows:
        results[row] = {**measured(places, row, test), **results[row]}
    keys = ("psnr", "lpips", "depth_mae_in_box_m", "fid", "kid", "precision", "recall")
    keys += ("neighbours", "unmoved", "seconds")
    cells = [[name, *(values.get(key) for key in keys)] for name, values in results.items()]
    caption = f"{len(test)} held-out places, {len(real)} views."
    table = Table(["", *COLUMNS], cells, caption, digits=[0, 2, 3, 2, 1, 4, 3, 3, 2, 2, 2])
    write_json(options.output_dir / "sharpness.json", {"seed": options.seed, "rows": results})
    shown = evenly(test, SHOWN_SCENES)
    columns = {
        name: [read_picture(places.pictures(name) / f"{scene_id}_0.png") for scene_id in shown]
        for name in (REAL, *rows)
    }
    write_png(options.output_dir / "sharpness.png", image_grid(columns, ["" for _ in shown]))
    write_tables(options.output_dir / "sharpness.md", [table])


if __name__ == "__main__":
    run(main, Options, __doc__)
