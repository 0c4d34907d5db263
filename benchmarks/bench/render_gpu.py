"""Views per second of the shipped stage 1 on a GPU."""

from __future__ import annotations

import statistics
import time
from typing import Any

KEY = "render_gpu"
VIEWS = 64
REPEATS = 10


def measure() -> dict[str, Any]:
    """`views_per_second` of 64 x 64 pixels of one room."""
    import torch

    if not torch.cuda.is_available():
        return {"absent": "torch sees no CUDA device"}
    from nfldm_ns.diffusion.pipeline import load_pipeline
    from nfldm_ns.generated.cameras import surround_cameras
    from nfldm_ns.scenes.views import index_cameras

    pipeline = load_pipeline("vizdoom-rooms").to("cuda")
    pipeline.set_progress_bar_config(disable=True)
    stage1 = pipeline.scene_autoencoder
    grid = pipeline(1, torch.Generator().manual_seed(0)).grids
    assert grid is not None
    cameras = surround_cameras(VIEWS, stage1.image_size, float(stage1.config.focal_length)).to("cuda")
    seconds = []
    with torch.inference_mode():
        for _ in range(REPEATS + 1):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            stage1.render(grid, index_cameras(cameras, None))
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
    return {"views_per_second": VIEWS / statistics.median(seconds[1:])}
