"""What a room of the shipped generator takes, and whether its default steps are as good as many."""

from __future__ import annotations

import statistics
import time
from typing import Any

KEY = "sample"
MANY_STEPS = 30
NUM_ROOMS = 24
VIEWS = 4
REPEATS = 5


def measure(num_rooms: int = NUM_ROOMS, repeats: int = REPEATS, many_steps: int = MANY_STEPS) -> dict[str, float]:
    """`seconds` of a room (g, c, f and V) by the pipeline's default steps, and `kid_delta` of its views.

    `kid_delta` is the KID of views of rooms with the default steps to views of as many other rooms with many steps,
    less that of rooms of the same noise with many steps: 0 where the fewer steps change nothing.
    Without the weights of FID's Inception there is none. All on the CPU, with the threads that torch takes.
    """
    import torch

    from nfldm_ns.diffusion.pipeline import load_pipeline

    pipeline = load_pipeline("vizdoom-rooms")
    pipeline.set_progress_bar_config(disable=True)
    steps = pipeline.default_steps
    seconds: dict[int, list[float]] = {steps: [], many_steps: []}
    for seed in range(repeats + 1):  # the first does not count; in turns, as other work slows down both
        for number, found in seconds.items():
            begun = time.perf_counter()
            pipeline(1, torch.Generator().manual_seed(seed), number)
            if seed:
                found.append(time.perf_counter() - begun)
    result = {
        "seconds": statistics.median(seconds[steps]),
        "many_seconds": statistics.median(seconds[many_steps]),
        "steps": float(steps),
        "threads": float(torch.get_num_threads()),
    }
    return {**result, **_kid(pipeline, steps, many_steps, num_rooms)}


def _kid(pipeline: Any, steps: int, many_steps: int, num_rooms: int) -> dict[str, Any]:
    from nfldm_ns.errors import UserInputError
    from nfldm_ns.metrics.images import extract_features, kernel_distance
    from nfldm_ns.pretrained.weights import load_inception

    try:
        inception = load_inception()
    except UserInputError as error:
        return {"kid_delta_absent": str(error)}
    sets = {(0, many_steps): _views(pipeline, 0, num_rooms, many_steps)}
    sets[0, steps] = sets[0, many_steps] if steps == many_steps else _views(pipeline, 0, num_rooms, steps)
    others = _views(pipeline, num_rooms, num_rooms, many_steps)
    features = {key: extract_features(inception, views) for key, views in sets.items()}
    reference = extract_features(inception, others)
    few, many = (kernel_distance(reference, features[0, number]).mean for number in (steps, many_steps))
    return {"kid_delta": few - many, "kid_many_steps": many}


def _views(pipeline: Any, first: int, count: int, steps: int) -> Any:
    """Views of rooms of the seeds from `first` on, `[count * VIEWS, 3, H, W]`."""
    import torch

    from nfldm_ns.diffusion.pipeline import scene_generators
    from nfldm_ns.evaluation.scenes import render_sampled_views

    views = []
    for seed in range(first, first + count):
        output = pipeline(1, scene_generators(seed, 1), steps)
        views += [rendered.rgb[0] for rendered in render_sampled_views(pipeline, output, VIEWS)]
    return torch.cat(views)
