"""Baselines trained equally long on one collection, at several learning rates, judged by the scenes they sample.

    python benchmarks/gan_baselines.py --data data/mazes --output-dir OUT --seconds 3600 [--pipeline vizdoom-rooms]

Every method of `nfldm-train-gan` is trained for `--seconds` at each of `--learning-rates`; GAUDI's auto-decoder and its
diffusion model share that time. Views of sampled scenes are compared with real test views: FID, KID, precision, recall,
density and coverage; neighbours on a closed flight through a scene tell how much its views agree. Which learning rate a
method is judged by is chosen by the KID to real *training* views.

`--pipeline` adds a generator that is there already; its training had its own time, which the table does not know.

FVD is measured where there is a stage 1 that shows real scenes (`--fvd-stage1`, by default that of `--pipeline`),
because collections have no videos: fly-throughs of sampled scenes, each by its own renderer, beside those of real test
scenes that it encodes and renders. A generator over this stage 1 has its look in common with the reference, others not.

Each training leaves `<method>-lr<rate>.json`, pictures of the first scenes in `<method>-lr<rate>.png`, and its run in
`runs/`; all of them together make `table.json`. An interrupted run continues; a training that is there is not repeated.

Needs the weights of FID's Inception, of LPIPS and for FVD of I3D (`nfldm-weights get fid-inception lpips-vgg
i3d-kinetics-400`; with the preset tiny lpips-alex).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder
from nfldm_ns.baselines.options import METHODS, MethodName
from nfldm_ns.baselines.training import PRIOR_FOLDER, BaselineTrainingConfig, train_baseline
from nfldm_ns.choice import evenly
from nfldm_ns.diffusion.pipeline import NFLDMPipeline
from nfldm_ns.errors import UserInputError
from nfldm_ns.evaluation.evaluation import progress_bars
from nfldm_ns.evaluation.scenes import SURFACE
from nfldm_ns.generated.cameras import fly_through
from nfldm_ns.generated.scene_files import GeneratedScene
from nfldm_ns.method_configs.gan_presets import GAN_PRESETS, GanPresetName
from nfldm_ns.metrics.consistency import reprojection_error
from nfldm_ns.metrics.image_sets import REFERENCE, picture_features, set_distances, write_pictures
from nfldm_ns.metrics.images import kernel_distance
from nfldm_ns.metrics.neighbours import density_coverage, precision_recall
from nfldm_ns.plugin.generated_run import render_views
from nfldm_ns.reports.galleries import image_grid, write_png
from nfldm_ns.reports.report import Table
from nfldm_ns.reports.resources import device_info
from nfldm_ns.sampling.scenes import draw_scenes, load_generator
from nfldm_ns.scenes.collection import SceneCollection, read_json
from nfldm_ns.scenes.views import Views, index_cameras, resize_cameras
from nfldm_ns.scenes.writing import atomic_path, require_writable, write_json
from nfldm_ns.training.identity import model_hash
from nfldm_ns.training.options import MixedPrecision, precision_here
from shared.comparisons import fingerprint, stored, use_threads
from shared.flights import FlightJudge
from shared.running import run
from shared.sampled_views import SampleJudge, SampleOptions, work_device

FLIGHT_FRAMES = 16
SCENES_SHOWN = 6
PRECISION_K, DENSITY_K = 3, 5
CONSISTENCY = ("l1", "unmoved_l1", "visible")
OURS = "ours"
FLIGHTS = "flights.safetensors"  # what I3D says of a generator's fly-throughs


@dataclass(kw_only=True)
class Options(SampleOptions):
    """Train, sample and compare baselines."""

    data: Path
    """the collection to train on; its test split is the reference"""
    output_dir: Path
    """folder for the numbers, pictures and runs"""
    seconds: float = 3600.0
    """of each training"""
    learning_rates: tuple[float, ...] = (5e-4, 2e-3, 8e-3)
    """each method is trained at all of them"""
    methods: tuple[MethodName, ...] = get_args(MethodName)
    """which"""
    preset: GanPresetName = "rooms"
    """of `nfldm-train-gan`"""
    max_steps: int | None = None
    """ends a training earlier; by default the preset's, which a short time does not reach"""
    pipeline: Path | None = None
    """a trained generator to stand beside them, or the name of one that comes with the package"""
    consistency_scenes: int = 32
    """scenes whose views are held against each other"""
    fvd_stage1: Path | None = None
    """a trained stage 1 that shows real scenes for FVD; by default that of --pipeline, and without both no FVD"""
    fvd_scenes: int = 250
    """scenes of each set for FVD; no more than are sampled and than the test split has"""
    mixed_precision: MixedPrecision | None = None
    """of the trainings; by default as the preset says, on a CPU single precision"""
    seed: int = 0
    """of the trainings"""
    threads: int = 2
    """CPU threads"""

    def check(self) -> None:
        """Raises `UserInputError` for what cannot be, before anything long begins."""
        use_threads(self.threads)
        if not self.methods or not self.learning_rates:
            raise UserInputError("There is nothing to train: name some --methods and --learning-rates.")
        if self.fvd_scenes < 0:
            raise UserInputError(f"--fvd-scenes is {self.fvd_scenes}: give 0 for no FVD, or at least 2.")
        if self.seconds <= 0 or min(self.learning_rates) <= 0 or self.consistency_scenes < 1:
            raise UserInputError("--seconds, --learning-rates and --consistency-scenes must be above 0: change them.")
        require_writable(self.output_dir)

    def training(self, learning_rate: float) -> BaselineTrainingConfig:
        """The preset's training within the time, at a learning rate."""
        preset = GAN_PRESETS[self.preset].training
        given: dict[str, Any] = {"time_budget_s": self.seconds, "seed": self.seed, "report_to": "none"}
        if (precision := precision_here(self.mixed_precision)) is not None:
            given["mixed_precision"] = precision
        given |= {} if self.max_steps is None else {"max_steps": self.max_steps}
        return replace(
            preset,
            schedule=replace(preset.schedule, learning_rate=learning_rate, **given),
            prior_schedule=replace(preset.prior_schedule, **given),
        )


@dataclass
class Comparison:
    """What all trainings have in common."""

    options: Options
    collection: SceneCollection
    judge: SampleJudge
    flights: FlightJudge | None

    def name(self, method: str, learning_rate: float) -> str:
        return f"{method}-lr{learning_rate:g}"

    def settings(self, method: MethodName, learning_rate: float) -> dict[str, Any]:
        """Everything that a result depends on."""
        return {
            "method": asdict(METHODS[method]),
            "sizes": asdict(GAN_PRESETS[self.options.preset].sizes),
            "training": asdict(self.options.training(learning_rate)),
            **self._looking(),
        }

    def _looking(self) -> dict[str, Any]:
        options = self.options
        return {
            "judged": self.judge.protocol,
            "consistency_scenes": min(options.consistency_scenes, options.num_scenes),
            "fvd": None if self.flights is None else self.flights.protocol,
        }

    def result(self, method: MethodName, learning_rate: float) -> dict[str, Any]:
        """Trains and judges a method at a learning rate, unless that was done."""
        name = self.name(method, learning_rate)
        make = partial(self._train, method, learning_rate, name)
        return stored(self.options.output_dir / f"{name}.json", self.settings(method, learning_rate), make)

    def ours(self) -> dict[str, Any]:
        """Judges the generator that is there already."""
        folder = self.options.pipeline
        assert folder is not None
        known = {"pipeline": str(folder), "num_inference_steps": self.options.num_inference_steps, **self._looking()}
        make = partial(self._judge, folder, OURS, self.options.num_inference_steps)
        return stored(self.options.output_dir / f"{OURS}.json", known, make)

    def _train(self, method: MethodName, learning_rate: float, name: str) -> dict[str, Any]:
        folder, sizes = self.options.output_dir / "runs" / name, GAN_PRESETS[self.options.preset].sizes
        training = self.options.training(learning_rate)
        pipeline = train_baseline(self.collection, folder, METHODS[method], sizes, training)
        places = (folder, folder / PRIOR_FOLDER)
        trained = [read_json(path) for place in places for path in place.glob("checkpoint-*/state.json")]
        return {
            "learning_rate": learning_rate,
            "steps": [state["step"] for state in trained],
            "seconds": round(sum(state["seconds"] for state in trained), 1),
            **self._judge(pipeline, name),
        }

    def _judge(self, folder: Path, name: str, num_inference_steps: int | None = None) -> dict[str, Any]:
        """Samples scenes and compares their views with real ones."""
        pictures = self.options.output_dir / "pictures" / name
        look = partial(self._look, folder, name, num_inference_steps)
        looked = stored(pictures / "views.json", {"folder": str(folder), **self._looking()}, look)
        paths = evenly(sorted(pictures.glob("*.png")), self.judge.settings.num_images)
        features = picture_features(self.judge.inception, paths, pictures / "features")
        real = self.judge.real
        distances = set_distances({REFERENCE: real[REFERENCE], "samples": features})
        fvd = None
        if self.flights is not None:
            fvd = self.flights.distance(load_file(pictures / FLIGHTS)["logits"])
        return {
            "fid": distances["fid"]["samples"],
            "kid": distances["kid"]["samples"],
            "fvd": fvd,
            "kid_to_train": kernel_distance(real["train"], features).mean,
            **precision_recall(real[REFERENCE], features, PRECISION_K),
            **density_coverage(real[REFERENCE], features, DENSITY_K),
            **{key: looked[key] for key in ("parameters", "seconds_per_scene", "consistency")},
        }

    def _look(self, folder: Path, name: str, num_inference_steps: int | None) -> dict[str, Any]:
        """Writes views of sampled scenes; how much the views of some of them agree."""
        pictures, options = self.options.output_dir / "pictures" / name, self.options
        errors, shown, flown, seconds = [], [], [], 0.0
        pipeline = load_generator(folder).to(work_device())
        pipeline.set_progress_bar_config(disable=True)
        pictures.mkdir(parents=True, exist_ok=True)
        with progress_bars() as show:
            done = show(f"Sampling {options.num_scenes} scenes of {name}")
            for index in range(options.num_scenes):
                begun = time.perf_counter()
                seed = options.first_scene + index
                scene = draw_scenes(pipeline, 1, seed, num_inference_steps=num_inference_steps, source=str(folder))[0]
                seconds += time.perf_counter() - begun
                scene = seen_at(scene, self.collection.image_size)
                views = sampled_views(scene, options.views_per_scene)
                write_pictures(pictures, f"{seed:06d}", views)
                if index < SCENES_SHOWN:
                    shown.append(views)
                if index < options.consistency_scenes:
                    errors.append(view_consistency(scene))
                if self.flights is not None and index < self.flights.num_scenes:
                    flown.append(self.flights.sampled(scene))
                done((index + 1) / options.num_scenes)
        columns = {f"view {i}": [views[i] for views in shown] for i in range(len(shown[0]))}
        write_png(options.output_dir / f"{name}.png", image_grid(columns))
        if flown:
            with atomic_path(pictures / FLIGHTS) as temporary:
                save_file({"logits": torch.stack(flown)}, temporary)
        parts = (part for part in pipeline.components.values() if isinstance(part, torch.nn.Module))
        return {
            "parameters": sum(parameter.numel() for part in parts for parameter in part.parameters()),
            "seconds_per_scene": round(seconds / options.num_scenes, 3),
            "consistency": {key: finite_mean([error[key] for error in errors]) for key in CONSISTENCY},
        }


def flight_judge(options: Options, collection: SceneCollection, judge: SampleJudge) -> FlightJudge | None:
    """What measures FVD; None where it is not asked for, or nothing shows real scenes.

    Raises:
        UserInputError: if there is no such stage 1, or there are too few scenes.
    """
    if options.fvd_scenes == 0 or (options.fvd_stage1 is None and options.pipeline is None):
        return None
    if options.fvd_stage1 is not None:
        stage1 = load_scene_autoencoder(options.fvd_stage1)
    else:
        pipeline = load_generator(options.pipeline)
        if not isinstance(pipeline, NFLDMPipeline):
            raise UserInputError(f"{options.pipeline} has no stage 1 that encodes views: name one by --fvd-stage1.")
        stage1 = pipeline.scene_autoencoder
    ids = {split: scenes.scene_ids for split, scenes in judge.scenes.items()}
    count, made_with = min(options.fvd_scenes, options.num_scenes), {**judge.protocol, "stage1": model_hash(stage1)}
    folder = options.output_dir / f"flights-{fingerprint({**made_with, 'scenes': count})}"
    return FlightJudge(collection, stage1.to(work_device()), ids, count, folder)


def seen_at(scene: GeneratedScene, image_size: tuple[int, int]) -> GeneratedScene:
    """The scene with cameras of (width, height), as the real images have it: models of larger images are not judged
    by sharper pictures."""
    assert scene.cameras is not None
    return replace(scene, cameras=resize_cameras(scene.cameras, *image_size[::-1]))


def sampled_views(scene: GeneratedScene, count: int) -> Float[Tensor, "views 3 height width"]:
    """What evenly chosen cameras of a scene see, as its files have it.

    Raises:
        UserInputError: if it has fewer cameras.
    """
    assert scene.cameras is not None
    if count > scene.cameras.shape[0]:
        raise UserInputError(
            f"--views-per-scene is {count}, but scenes have {scene.cameras.shape[0]} cameras: give no more than that."
        )
    chosen = torch.tensor(evenly(range(scene.cameras.shape[0]), count))
    return render_views(scene, index_cameras(scene.cameras, chosen)).images


@torch.inference_mode()
def view_consistency(scene: GeneratedScene) -> dict[str, float]:
    """How neighbours on a closed flight differ where both see the same surface (`reprojection_error`)."""
    assert scene.cameras is not None
    flight = fly_through(scene.cameras, FLIGHT_FRAMES)
    rendered = scene.renderer.render(scene.grid, index_cameras(flight, None))
    depths = torch.where(rendered.accumulation >= SURFACE, rendered.depth, 0.0)[0]
    return reprojection_error(Views(flight, rendered.rgb[0].clamp(0, 1), depths))


def finite_mean(values: Sequence[float]) -> float | None:
    """Of the values that are numbers: scenes without a surface that two views see have none. None if all have none."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else None


def best(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The learning rate that came nearest to the training views."""
    return min(results, key=lambda result: result["kid_to_train"])


def cells(result: dict[str, Any]) -> list[Any]:
    consistency = result["consistency"]
    return [
        result.get("learning_rate"),
        result.get("seconds"),
        *(result[name] for name in ("parameters", "fid", "kid", "precision", "recall", "coverage", "fvd")),
        consistency["l1"],
        consistency["visible"],
    ]


COLUMNS = (
    *("", "learning rate", "seconds", "parameters", "FID", "KID", "precision", "recall", "coverage", "FVD"),
    *("neighbours' difference", "shared"),
)
DIGITS = (0, 5, 0, 0, 1, 4, 3, 3, 3, 1, 4, 2)


def main(options: Options) -> None:
    options.check()
    collection = SceneCollection.open(options.data)
    judge = SampleJudge(collection, options.output_dir, options.evaluation_settings())
    comparison = Comparison(options, collection, judge, flight_judge(options, collection, judge))
    found: dict[str, Any] = {}
    if options.pipeline is not None:
        found[OURS] = [comparison.ours()]
    for method in options.methods:
        found[method] = []
        for learning_rate in options.learning_rates:
            result = comparison.result(method, learning_rate)
            found[method].append(result)
            name = comparison.name(method, learning_rate)
            print(f"{name}: FID {result['fid']:.1f}, KID {result['kid']:.4f}", flush=True)
    floor: dict[str, Any] = dict(judge.floor())
    if comparison.flights is not None:
        floor["fvd"] = {"train": comparison.flights.floor()}
    content = {
        "protocol": judge.protocol,
        "floor": floor,
        "methods": found,
        "best": {method: best(results) for method, results in found.items()},
        "device": device_info(),
    }
    write_json(options.output_dir / "table.json", content)
    known = [floor[name]["train"] if name in floor else None for name in ("fid", "kid", "fvd")]
    rows = [["real training views", *[None] * 3, *known[:2], *[None] * 3, known[2], None, None]]
    rows += [[method, *cells(result)] for method, result in content["best"].items()]
    caption = f"{options.seconds:g} s of training each, preset `{options.preset}`, {judge.settings.num_images} images."
    print("\n" + Table(COLUMNS, rows, caption, digits=DIGITS).markdown())


if __name__ == "__main__":
    run(main, Options, __doc__)
