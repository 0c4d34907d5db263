"""Views per second on a GPU: of a paper-size scene against the plain way, and of a room of the shipped generator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu.sizes import Sizes

KEY = "render_gpu"
VIEWS = 64
REPEATS = 10


def measure(device: str = "cuda", sizes: Sizes | None = None) -> dict[str, Any]:
    """Of a paper-size scene, at the largest of the sizes: `views_per_second`, `ratio` to the plain way, `ratio_dense`,
    `peak_gib` and `error` against dense feature maps (`gpu/rendering.py`); `room_views_per_second` of 64 x 64 pixels.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return {"absent": "torch sees no CUDA device"}
    from gpu.rendering import image_decoder, paper_scene, views_per_second
    from gpu.sizes import Sizes

    sizes = sizes or Sizes()
    with torch.no_grad():
        grid, decoder = paper_scene(device, sizes), image_decoder(device, sizes)
        found = views_per_second(grid, decoder, max(sizes.pictures), device, sizes)
    found["views_per_second"] = found.pop("skipping")
    return {**found, "side": float(max(sizes.pictures)), "room_views_per_second": room_views_per_second(device)}


def room_views_per_second(device: str, views: int = VIEWS, repeats: int = REPEATS) -> float:
    """Of a room of `vizdoom-rooms`, all views at once."""
    import torch
    from gpu.measuring import median_seconds

    from nfldm_ns.diffusion.pipeline import load_pipeline
    from nfldm_ns.generated.cameras import surround_cameras
    from nfldm_ns.models import GENERATOR
    from nfldm_ns.scenes.views import index_cameras

    pipeline = load_pipeline(GENERATOR).to(device)
    pipeline.set_progress_bar_config(disable=True)
    stage1 = pipeline.scene_autoencoder
    grid = pipeline(1, torch.Generator().manual_seed(0), num_inference_steps=10).grids
    assert grid is not None
    cameras = surround_cameras(views, stage1.image_size, float(stage1.config.focal_length)).to(device)
    with torch.inference_mode():
        shown = index_cameras(cameras, None)
        return views / median_seconds(lambda: stage1.render(grid, shown), device, repeats, 60.0)
