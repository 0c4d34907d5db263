"""Samplers with few steps: seconds of a room, FID and KID, at equal noise.

    make results NAME=sampler-steps ARGS="vizdoom-rooms --data data/mazes --output-dir outputs/sampler-steps"

DPM-Solver++ and UniPC with 8, 12, 20 and 30 steps per level beside plain DDIM with `--reference` steps, on real test
views of a collection: what `sampling.py --what samplers` compares, and the seconds of a room (g, c, f, V), medians of
rooms that the samplers make in turns. DDIM with 250 steps takes most of the time: with 24 scenes, the default, about
twelve minutes on two idle cores. Differences of KID below their standard error mean nothing: more scenes make it
smaller. Scenes that are there are not sampled again, so that more can be added.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from sampling import Generators, Part, Sampler, check, compare_samplers, fingerprints
from sampling import Options as SamplingOptions

from nfldm_ns.diffusion.pipeline import NFLDMPipeline, load_pipeline, scene_generators
from nfldm_ns.reports.report import Table
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.writing import require_writable, write_json
from shared.running import run
from shared.sampled_views import SampleJudge, work_device

FEW = ("dpm++:8", "dpm++:12", "dpm++:20", "dpm++:30", "unipc:8", "unipc:12", "unipc:20", "unipc:30")


@dataclass(kw_only=True)
class Options(SamplingOptions):
    """Compare samplers with few steps."""

    num_scenes: int = 24
    """sampled scenes of each"""
    samplers: tuple[str, ...] = FEW
    """samplers with their steps per level: dpm++, ddim, unipc or euler"""
    what: tyro.conf.Suppress[tuple[Part, ...]] = ("samplers",)
    repeats: int = 3
    """rooms that each sampler makes against the clock, after one that does not count"""


@torch.inference_mode()
def seconds_of_rooms(pipeline: NFLDMPipeline, samplers: list[Sampler], repeats: int) -> dict[str, float]:
    """Median seconds of a room by sampler; all take turns, as other work slows down all alike."""
    trained, generators = pipeline.scheduler, Generators(pipeline, samplers)
    times: dict[str, list[float]] = {str(sampler): [] for sampler in samplers}
    for seed in range(repeats + 1):
        for sampler in samplers:
            one = generators.with_sampler(sampler)
            begun = time.perf_counter()
            one(1, scene_generators(seed, 1), sampler.steps)
            if one.coarse_denoiser.device.type == "cuda":
                torch.cuda.synchronize()
            if seed:
                times[str(sampler)].append(time.perf_counter() - begun)
    pipeline.scheduler = trained
    return {name: statistics.median(found) for name, found in times.items()}


def table(found: dict[str, Any], caption: str) -> Table:
    """One row per sampler, the reference first."""
    rows = [
        [
            name,
            values["seconds"],
            values["fid"],
            values["kid"],
            values.get("kid_difference"),
            values.get("kid_difference_error"),
        ]
        for name, values in found["samplers"].items()
    ]
    for row in rows:
        row[4:] = [None if share is None else 100 * share for share in row[4:]]
    columns = ("", "s per room", "FID", "KID", "KID against the first (%)", "standard error (%)")
    return Table(columns, rows, f"Steps per level, the same noise. {caption}", digits=(0, 2, 1, 4, 1, 1))


def main(options: Options) -> None:
    check(options)
    settings = options.evaluation_settings()
    require_writable(options.output_dir)
    pipeline = load_pipeline(options.pipeline).to(work_device())
    pipeline.set_progress_bar_config(disable=True)
    judge = SampleJudge(SceneCollection.open(options.data), options.output_dir, settings)
    samplers = [Sampler.parse(text) for text in dict.fromkeys([options.reference, *options.samplers])]
    seconds = seconds_of_rooms(pipeline, samplers, options.repeats)
    found = compare_samplers(pipeline, judge, options.output_dir / "samplers", options)
    for name, values in found["samplers"].items():
        values["seconds"] = seconds[name]
    judged = {"pipeline": str(options.pipeline), "components": fingerprints(pipeline)}
    write_json(options.output_dir / "sampler_steps.json", {**judged, "protocol": judge.protocol, **found})
    caption = f"{settings.num_images} images to as many real test views; {options.threads} CPU threads."
    print("\n" + table(found, caption).markdown())


if __name__ == "__main__":
    run(main, Options, __doc__)
