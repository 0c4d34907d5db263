"""What sampling costs, whether fewer steps give the same scenes, and at which temperatures they are best.

    python benchmarks/sampling.py PIPELINE --data DATA --output-dir OUT [--what cost samplers temperatures]

- `cost`: seconds of one scene by level (g, c, f, decoding V, rendering a view), medians over `--repeats`.
- `samplers`: FID and KID of the scenes of `--samplers`, of the same noise as those of `--reference`, to real test
  views: `unipc:12`, or `unipc:12,4,4` for other steps of each of g, c and f, or `unipc:4@OTHER` for those of another
  pipeline, as of a distilled one. The relative difference in KID stands beside its standard error (a jackknife over
  ten groups of scenes) and the mean absolute difference of the pictures themselves.
- `temperatures`: FID and KID by the temperatures of g, c and f, with the pipeline's own scheduler.

Each leaves a JSON in `--output-dir`. Pictures and features are kept there too, so that an interrupted run continues and
further samplers or temperatures add to it. The last two need the weights of FID's Inception (`nfldm-weights get
fid-inception`).
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from nfldm_ns.diffusion.pipeline import COMPONENTS, NFLDMPipeline, Steps, load_pipeline, scene_generators
from nfldm_ns.errors import UserInputError
from nfldm_ns.evaluation.scenes import PictureFolder, render_sampled_views
from nfldm_ns.metrics.image_sets import REFERENCE, read_picture
from nfldm_ns.metrics.images import kernel_distance
from nfldm_ns.reports.report import Table
from nfldm_ns.reports.resources import device_info
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.writing import require_writable, write_json
from nfldm_ns.training.identity import model_hash
from shared.comparisons import require_choice, use_threads
from shared.running import run
from shared.sampled_views import Features, SampleJudge, SampleOptions, jackknife, work_device

SCHEDULERS: dict[str, type[SchedulerMixin]] = {
    "dpm++": DPMSolverMultistepScheduler,
    "ddim": DDIMScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}
LEVELS = ("global", "coarse", "fine")
Part = Literal["cost", "samplers", "temperatures"]
Temperatures = tuple[float, float, float]


@dataclass(kw_only=True)
class Options(SampleOptions):
    """Measure the sampling of a trained generator."""

    pipeline: tyro.conf.Positional[Path]
    """the pipeline folder of nfldm-train-diffusion"""
    data: Path | None = None
    """the collection it was trained on; not needed for the cost alone"""
    output_dir: Path
    """folder for the JSON files, and for what they are made from"""
    what: tuple[Part, ...] = ("cost", "samplers", "temperatures")
    """what to measure"""
    samplers: tuple[str, ...] = ("dpm++:20",)
    """samplers with their steps per level, as in unipc:12 or unipc:12,4,4 (g, c, f): dpm++, ddim, unipc or euler;
    @PIPELINE after them is another generator than the first"""
    reference: str = "ddim:250"
    """the sampler that they are compared with"""
    temperatures: tuple[Temperatures, ...] = ((1.0, 1.0, 1.0), (1.0, 0.8, 0.5))
    """of g, c and f: three numbers for each trial"""
    repeats: int = 5
    """measurements of the cost, after one that does not count"""
    threads: int = 2
    """CPU threads"""


@dataclass(frozen=True)
class Sampler:
    """A scheduler of diffusers, by its name here, and its steps of each level, or those of g, c and f.

    Attributes:
        pipeline: whose scenes it samples; empty for the one that the benchmark is about.
    """

    name: str
    steps: Steps
    pipeline: str = ""

    @classmethod
    def parse(cls, text: str) -> Sampler:
        """From `name:steps` or `name:steps,steps,steps`, and `@pipeline`; raises `UserInputError` for anything else."""
        sampler, _, pipeline = text.partition("@")
        name, _, given = sampler.partition(":")
        numbers = given.split(",")
        if len(numbers) not in (1, 3) or not all(n.isdecimal() and int(n) >= 1 for n in numbers):
            raise UserInputError(f"{text} is no sampler with its steps: write, for example, dpm++:20 or unipc:12,4,4.")
        require_choice("sampler", name, SCHEDULERS)
        if len(numbers) == 1:
            return cls(name, int(numbers[0]), pipeline)
        g, c, f = map(int, numbers)
        return cls(name, (g, c, f), pipeline)

    def __str__(self) -> str:
        steps = (self.steps,) if isinstance(self.steps, int) else self.steps
        return f"{self.name}:{','.join(map(str, steps))}{'@' * bool(self.pipeline)}{self.pipeline}"

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.-]+", "-", str(self).replace("+", "p"))

    def scheduler(self, trained: SchedulerMixin) -> SchedulerMixin:
        """The same noise and prediction type as in the scheduler that a pipeline was saved with.

        DDIM must not clip, as it does unless told otherwise: latents are no images in [-1, 1].
        """
        return SCHEDULERS[self.name].from_config(trained.config, clip_sample=False)


class Generators:
    """The pipelines of some samplers, each loaded once.

    Args:
        pipeline: of those that name none.
    """

    def __init__(self, pipeline: NFLDMPipeline, samplers: Sequence[Sampler]) -> None:
        self.pipelines = {"": pipeline}
        for name in {sampler.pipeline for sampler in samplers} - {""}:
            self.pipelines[name] = load_pipeline(name).to(pipeline.scene_autoencoder.device)
        self._trained = {name: one.scheduler for name, one in self.pipelines.items()}
        for one in self.pipelines.values():
            one.set_progress_bar_config(disable=True)

    def with_sampler(self, sampler: Sampler) -> NFLDMPipeline:
        """A sampler's pipeline, which samples by it until another is asked for."""
        pipeline = self.pipelines[sampler.pipeline]
        pipeline.scheduler = sampler.scheduler(self._trained[sampler.pipeline])
        return pipeline


# Cost


class Stopwatch:
    """Ends of the denoising steps of each level, as a callback of the pipeline."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ends: dict[str, list[float]] = {}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, pipeline: NFLDMPipeline, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        self.ends.setdefault(pipeline.stage, []).append(self.now())
        return {}

    def time(self, run: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds that something takes, and what it gives."""
        begun = self.now()
        result = run()
        return self.now() - begun, result


@torch.inference_mode()
def measure_scene(pipeline: NFLDMPipeline, steps: int, seed: int) -> dict[str, float]:
    """Seconds of a scene by level, of decoding V, of rendering one view, and of one denoising step (`<level> step`).

    A level counts from the end of the one before, so that reading and writing its latent is in it.
    """
    watch = Stopwatch(pipeline.scene_autoencoder.device)
    begun = watch.now()
    output = pipeline(1, scene_generators(seed, 1), steps, output_type="latent", callback_on_step_end=watch)
    seconds: dict[str, float] = {}
    for level, ends in watch.ends.items():
        seconds[level] = ends[-1] - begun
        seconds[f"{level} step"] = statistics.median(b - a for a, b in zip([begun, *ends], ends, strict=False))
        begun = ends[-1]
    seconds["decoding"], output.grids = watch.time(lambda: pipeline.latent_autoencoder.decode(output.latents))
    seconds["view"], _ = watch.time(lambda: render_sampled_views(pipeline, output, 1))
    return seconds


def measure_cost(pipeline: NFLDMPipeline, steps: int, repeats: int) -> dict[str, Any]:
    """Medians of `measure_scene`, and the parameters of the networks."""
    runs = [measure_scene(pipeline, steps, seed) for seed in range(repeats + 1)][1:]
    networks = {level: getattr(pipeline, f"{level}_denoiser") for level in LEVELS}
    networks.update(decoding=pipeline.latent_autoencoder.decoder, view=pipeline.scene_autoencoder)
    return {
        "seconds": {name: statistics.median(run[name] for run in runs) for name in runs[0]},
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in networks.items() if model},
        "num_inference_steps": steps,
        "threads": torch.get_num_threads(),
        "device": device_info(),
    }


def cost_table(cost: dict[str, Any]) -> Table:
    """Milliseconds and seconds by level."""
    seconds, steps = cost["seconds"], cost["num_inference_steps"]
    titles = {"global": "g", "coarse": "c", "fine": "f", "decoding": "decoding V", "view": "rendering one view"}
    rows: list[list[Any]] = []
    for name, title in titles.items():
        if name in seconds:
            step = seconds.get(f"{name} step")
            count = cost["parameters"][name] if name != "view" else None
            rows.append([title, count, None if step is None else 1000 * step, seconds[name]])
    rows.append(["a scene and one view", None, None, sum(seconds[name] for name in titles if name in seconds)])
    caption = f"One scene, {steps} steps per level, {cost['threads']} CPU threads. Medians."
    return Table(("", "parameters", "ms per step", "s per scene"), rows, caption, digits=(0, 0, 1, 3))


# Samplers and temperatures


def kid_difference(reference: Features, fake: Features, other: Features, views: int) -> tuple[float, float | None]:
    """How much larger the KID of one set to the reference is than that of another, relative to the latter.

    Args:
        fake, other: views of scenes of the same noise, in the same order.
        views: of each scene.

    Returns:
        the relative difference, and its standard error by a jackknife over groups of scenes (None for few scenes).
    """
    num_scenes = len(fake) // views

    def difference(mask: Callable[[int], Tensor]) -> float:
        kept = mask(num_scenes).repeat_interleave(views)
        first, second = (kernel_distance(reference, features[kept]).mean for features in (fake, other))
        return (first - second) / abs(second)

    return jackknife(difference, num_scenes)


def picture_difference(folder: Path, other: Path) -> float:
    """Mean absolute difference of the pictures of two folders with the same names, in units of 1/255."""
    names = sorted(path.name for path in folder.glob("*.png"))
    differences = [(read_picture(folder / name) - read_picture(other / name)).abs().mean() for name in names]
    return 255 * float(torch.stack(differences).mean())


def compare_samplers(pipeline: NFLDMPipeline, judge: SampleJudge, folder: Path, options: Options) -> dict[str, Any]:
    """Distances of each sampler's scenes, and their differences from the reference's."""
    samplers = [Sampler.parse(text) for text in dict.fromkeys([options.reference, *options.samplers])]
    reference, generators = samplers[0], Generators(pipeline, samplers)
    features: dict[Sampler, Features] = {}
    results: dict[str, Any] = {}
    for sampler in samplers:
        features[sampler] = judge.samples(generators.with_sampler(sampler), folder / sampler.folder, sampler.steps)
        distances = judge.distances(samples=features[sampler])
        found = results[str(sampler)] = {metric: values["samples"] for metric, values in distances.items()}
        if sampler != reference:
            sets = (judge.real[REFERENCE], features[sampler], features[reference])
            pictures = [PictureFolder(folder / one.folder).pictures("samples") for one in (sampler, reference)]
            difference, error = kid_difference(*sets, options.views_per_scene)
            found["kid_difference"], found["kid_difference_error"] = difference, error
            found["picture_difference"] = picture_difference(*pictures)
        print(f"{sampler}: FID {found['fid']:.1f}, KID {found['kid']:.4f}", flush=True)
    return {
        "reference": str(reference),
        "temperatures": list(pipeline.config.temperatures),
        "others": {name: fingerprints(one) for name, one in generators.pipelines.items() if name},
        "samplers": results,
    }


def sampler_table(found: dict[str, Any], caption: str) -> Table:
    """One row per sampler, the reference first."""
    temperatures = ", ".join(f"{value:g}" for value in found["temperatures"])
    keys = ("fid", "kid", "kid_difference", "kid_difference_error", "picture_difference")
    rows = [[name, *(values.get(key) for key in keys)] for name, values in found["samplers"].items()]
    for row in rows:
        row[3:5] = [None if share is None else 100 * share for share in row[3:5]]
    columns = ("", "FID", "KID", "KID against the first (%)", "standard error (%)", "difference of pictures (1/255)")
    title = f"Samplers and steps per level, the same noise of the temperatures {temperatures}. {caption}"
    return Table(columns, rows, title, digits=(0, 1, 4, 1, 1, 2))


def compare_temperatures(pipeline: NFLDMPipeline, judge: SampleJudge, folder: Path, options: Options) -> dict[str, Any]:
    """Distances by the temperatures of g, c and f."""
    results = {}
    for temperatures in dict.fromkeys(options.temperatures):
        name = "-".join(f"{value:g}" for value in temperatures)
        pipeline.register_to_config(temperatures=temperatures)
        distances = judge.distances(samples=judge.samples(pipeline, folder / name))
        found = results[name] = {metric: values["samples"] for metric, values in distances.items()}
        print(f"temperatures {name}: FID {found['fid']:.1f}, KID {found['kid']:.4f}", flush=True)
    return {"num_inference_steps": options.num_inference_steps, "temperatures": results}


def temperature_table(found: dict[str, Any], caption: str) -> Table:
    """One row per trial."""
    rows = [[name.replace("-", ", "), values["fid"], values["kid"]] for name, values in found["temperatures"].items()]
    title = f"Temperatures of g, c and f, {found['num_inference_steps']} steps per level. {caption}"
    return Table(("", "FID", "KID"), rows, title, digits=(0, 1, 4))


# All of it


def fingerprints(pipeline: NFLDMPipeline) -> dict[str, str | None]:
    """Which models a pipeline consists of."""
    return {name: model_hash(model) if (model := getattr(pipeline, name)) else None for name in COMPONENTS}


def check(options: Options) -> None:
    """Raises `UserInputError` for what cannot be, before anything long begins."""
    use_threads(options.threads)
    if options.repeats < 1:
        raise UserInputError(f"--repeats is {options.repeats}: give at least 1.")
    samplers = [Sampler.parse(text) for text in (options.reference, *options.samplers)]
    for name in sorted({sampler.pipeline for sampler in samplers} - {""}):
        load_pipeline(name)
    if any(value < 0 for trial in options.temperatures for value in trial):
        raise UserInputError("--temperatures has a negative number: give three of at least 0 for each trial.")
    if options.data is None and {*options.what} - {"cost"}:
        raise UserInputError("FID and KID need real images: give --data, or only --what cost.")


def main(options: Options) -> None:
    check(options)
    settings = options.evaluation_settings()
    pipeline = load_pipeline(options.pipeline).to(work_device())
    pipeline.set_progress_bar_config(disable=True)
    require_writable(options.output_dir)
    judged = {"pipeline": str(options.pipeline), "components": fingerprints(pipeline)}
    if "cost" in options.what:
        cost = measure_cost(pipeline, options.num_inference_steps, options.repeats)
        write_json(options.output_dir / "cost.json", {**judged, **cost})
        print(cost_table(cost).markdown())
    if options.data is None:
        return
    judge = SampleJudge(SceneCollection.open(options.data), options.output_dir, settings)
    floor = judge.floor()
    caption = (
        f"{settings.num_images} images to as many real test views; real views of training scenes have the FID "
        f"{floor['fid']['train']:.1f} and the KID {floor['kid']['train']:.4f}."
    )
    parts = {
        "samplers": (compare_samplers, sampler_table),
        "temperatures": (compare_temperatures, temperature_table),
    }
    for name, (compare, table) in parts.items():
        if name in options.what:
            folder = options.output_dir / name
            found = compare(load_pipeline(options.pipeline), judge, folder, options)
            write_json(folder.with_suffix(".json"), {**judged, "protocol": judge.protocol, "floor": floor, **found})
            print("\n" + table(found, caption).markdown())


if __name__ == "__main__":
    run(main, Options, __doc__)
