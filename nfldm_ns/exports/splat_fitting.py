"""Splats of a scene, fitted to its renderings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.exports.splat_renderer import gsplat_works, render_splats, render_with_gsplat, splat_images
from nfldm_ns.exports.splats import Splats, splats_from_points
from nfldm_ns.exports.surface_views import SurfaceViews, join_points, thin, unproject, views_of
from nfldm_ns.generated.scene_files import GeneratedScene

LEARNING_RATES = {"sh_dc": 0.02, "log_scales": 0.01, "opacity_logits": 0.05}


def scene_splats(
    scene: GeneratedScene,
    *,
    spacing: float = 0.1,
    fit_steps: int = 0,
    ring_places: int = 2,
    seed: int = 0,
    device: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Splats:
    """Splats on the surfaces that a scene's cameras see, and on the border of the box where they see the background.

    Args:
        spacing: edge in metres of cells that get one splat each; 0 makes one of every pixel.
        fit_steps: steps of `fit_splats`, on the same views.
        ring_places: places of further cameras (`further_cameras`).
        device: of the fitting, see `fit_splats`.
        progress: called with the number of steps done.

    Raises:
        UserInputError: if the scene has no cameras, or no surfaces that they see.
    """
    views = views_of(scene, ring_places)
    points = thin(join_points([unproject(part, scene.grid, beyond=True) for part in views]), spacing)
    return fit_splats(splats_from_points(points, spacing), views, fit_steps, seed, device, progress)


def fit_splats(
    splats: Splats,
    views: list[SurfaceViews],
    steps: int,
    seed: int = 0,
    device: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Splats:
    """Colours, sizes and opacities changed so that the splats look like the views; positions and rotations stay.

    Each step draws one view at random and takes the absolute difference; Adam.

    Args:
        device: "cuda", by gsplat, or "cpu", by `render_splats`; by default cuda if `gsplat_works`.
    """
    if steps == 0:
        return splats
    device = device or ("cuda" if gsplat_works() else "cpu")
    render = render_splats if device == "cpu" else render_with_gsplat
    images = [
        (part.cameras[i].to(device), part.images[i].to(device)) for part in views for i in range(len(part.images))
    ]
    # Clones, for tensors made in inference mode take no part in gradients.
    moved = {name: value.clone().to(device) for name, value in vars(splats).items()}
    fitted = {name: moved[name].requires_grad_() for name in LEARNING_RATES}
    optimiser = torch.optim.Adam([{"params": [fitted[name]], "lr": rate} for name, rate in LEARNING_RATES.items()])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=1e-4)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        camera, image = images[int(torch.randint(len(images), (), generator=generator))]
        loss = (render(Splats(**moved), camera) - image).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress(step + 1)
    return replace(splats, **{name: value.detach().cpu() for name, value in fitted.items()})


def splat_psnr(splats: Splats, cameras: Cameras, images: Float[Tensor, "views 3 height width"]) -> float:
    """PSNR in dB of the splats' images on the CPU, over all pixels of cameras of batch shape `[N]`."""
    error: Tensor = (splat_images(splats, cameras) - images).square().mean()
    return float(-10 * error.log10())
