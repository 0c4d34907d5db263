"""Stage 1's measure: novel views of places it was not trained on, beside trivial baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.autoencoder.scene_autoencoder import RenderedViews, SceneAutoencoder
from nfldm_ns.evaluation.metrics import ImageMetrics, mean_image, nearest_source_view
from nfldm_ns.scenes.views import SceneBatch, Views
from nfldm_ns.scenes.writing import write_image

MEAN_IMAGE_SCENES = 256


def reconstruct(autoencoder: SceneAutoencoder, batch: SceneBatch) -> RenderedViews:
    """The target views as stage 1 renders them from the source views."""
    return autoencoder.render(autoencoder.encode(batch.source), batch.target.cameras)


@torch.inference_mode()
def evaluate_novel_views(
    render: Callable[[SceneBatch], RenderedViews],
    batches: Iterable[SceneBatch],
    mean: Float[Tensor, "3 height width"],
    lpips: nn.Module | None,
    picture_folder: Path | None = None,
) -> dict[str, float]:
    """Means over the target views of all batches.

    Args:
        render: gives the target views of a batch, for example `reconstruct`; later stages pass their own.
        mean: the mean image, a baseline.
        lpips: from `nfldm_ns.evaluation.weights.load_lpips`; None leaves LPIPS out.
        picture_folder: where to put PNGs of real above rendered views, one per scene; None writes none.

    Returns:
        `psnr` (dB), `ssim`, `lpips`; where depth is known `depth_mae_m` and `depth_mae_in_box_m` (metres, planar; the
        second over surfaces inside the box); `nearest_view_*` and `mean_image_*` for the source view that looks in the
        most similar direction and for the mean image; `num_scenes` and `num_images`.
    """
    methods = {"": ImageMetrics(lpips), "nearest_view_": ImageMetrics(lpips), "mean_image_": ImageMetrics(lpips)}
    num_scenes = 0
    for batch in batches:
        rendered, true = render(batch), batch.target.images
        methods[""].update(rendered.rgb, true)
        methods[""].update_depth(rendered.depth, batch.target, batch.aabb)
        methods["nearest_view_"].update(nearest_source_view(batch), true)
        methods["mean_image_"].update(mean.to(true).expand_as(true), true)
        for i, scene_id in enumerate(batch.scene_ids if picture_folder else ()):
            picture = comparison(rendered.rgb[i], batch.target[i])
            assert picture_folder is not None
            write_image(picture_folder / f"{scene_id}.png", picture.mul(255).round().byte().cpu().numpy())
        num_scenes += len(batch.scene_ids)
    results = {prefix + name: value for prefix, metrics in methods.items() for name, value in metrics.compute().items()}
    return {**results, "num_scenes": num_scenes, "num_images": methods[""].num_images}


def comparison(rgb: Float[Tensor, "views 3 height width"], target: Views) -> Float[Tensor, "height width 3"]:
    """Real views of one scene in a row above their renderings, in [0, 1]."""
    rows = [torch.cat(list(images), dim=-1) for images in (target.images, rgb.float().clamp(0, 1))]
    return torch.cat(rows, dim=-2).permute(1, 2, 0)


def mean_training_image(batches: Iterable[SceneBatch]) -> Float[Tensor, "3 height width"]:
    """The mean over all views of some scenes."""
    return mean_image(images for batch in batches for images in (batch.source.images, batch.target.images))
