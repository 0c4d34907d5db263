"""The same as `sample`, on a GPU: rooms of the shipped generator sampled together, and paper-size ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu.sizes import Sizes

KEY = "sample_gpu"
BATCH = 16
REPEATS = 5


def measure(
    device: str = "cuda", sizes: Sizes | None = None, batch: int = BATCH, repeats: int = REPEATS
) -> dict[str, Any]:
    """`seconds` of a room, of 16 sampled together with the command's default steps; `paper_seconds` of a paper-size one
    sampled alone, and `paper_seconds_bf16` by denoisers in bf16 (`gpu/sampling.py`).
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return {"absent": "torch sees no CUDA device"}
    from gpu.measuring import median_seconds
    from gpu.sampling import random_pipeline, seconds_of_rooms
    from gpu.sizes import Sizes

    from nfldm_ns.diffusion.pipeline import load_pipeline, scene_generators
    from nfldm_ns.models import GENERATOR

    sizes = sizes or Sizes()
    pipeline, steps = load_pipeline(GENERATOR).to(device), sizes.num_inference_steps
    pipeline.set_progress_bar_config(disable=True)
    rooms = median_seconds(lambda: pipeline(batch, scene_generators(0, batch), steps), device, repeats, 60.0)
    paper = random_pipeline(sizes).to(device)
    paper.set_progress_bar_config(disable=True)
    exact, rounded = (seconds_of_rooms(paper.to(t), device, sizes) for t in (torch.float32, torch.bfloat16))
    return {
        "seconds": rooms / batch,
        "steps": float(steps),
        "batch": float(batch),
        "paper_seconds": exact["seconds"],
        "paper_seconds_bf16": rounded["seconds"],
    }
