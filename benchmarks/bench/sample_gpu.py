"""The same as `sample`, on a GPU, for scenes sampled together."""

from __future__ import annotations

import statistics
import time
from typing import Any

KEY = "sample_gpu"
BATCH = 16
REPEATS = 5


def measure() -> dict[str, Any]:
    """`seconds` of a room, of 16 sampled together with the command's default steps."""
    import torch

    if not torch.cuda.is_available():
        return {"absent": "torch sees no CUDA device"}
    from nfldm_ns.commands.sample import Sample
    from nfldm_ns.diffusion.pipeline import load_pipeline, scene_generators

    pipeline = load_pipeline("vizdoom-rooms").to("cuda")
    pipeline.set_progress_bar_config(disable=True)
    steps, seconds = Sample().num_inference_steps, []
    for seed in range(REPEATS + 1):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        pipeline(BATCH, scene_generators(seed * BATCH, BATCH), steps)
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begun) / BATCH)
    return {"seconds": statistics.median(seconds[1:]), "steps": float(steps), "batch": float(BATCH)}
