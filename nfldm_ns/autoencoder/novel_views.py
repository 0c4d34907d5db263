"""Stage 1's measure: novel views of places it was not trained on, beside trivial baselines."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.scene_autoencoder import RenderedViews, SceneAutoencoder
from nfldm_ns.metrics.images import (
    ImageMetrics,
    mean_image,
    nearest_source_view,
    psnr,
    ssim,
    surface_inside_box,
)
from nfldm_ns.scenes.collection import Scene
from nfldm_ns.scenes.views import SceneBatch, Views, evenly_spread_views, masks_or_valid, sparse_depths
from nfldm_ns.scenes.writing import write_image

MEAN_IMAGE_SCENES = 256
DepthKind = Literal["dense", "sparse", "none"]
Scores = dict[str, Float[Tensor, "scenes views 2"]]


def reconstruct(autoencoder: SceneAutoencoder, batch: SceneBatch) -> RenderedViews:
    """The target views as stage 1 renders them from the source views."""
    return autoencoder.render(autoencoder.encode(batch.source), batch.target.cameras)


@torch.no_grad()
def evaluate_novel_views(
    render: Callable[[SceneBatch], RenderedViews],
    batches: Iterable[SceneBatch],
    mean: Float[Tensor, "3 height width"],
    lpips: nn.Module | None,
    picture_folder: Path | None = None,
) -> dict[str, float]:
    """Means over the target views of all batches; masked pixels are not judged (see `ImageMetrics.update`).

    Args:
        render: gives the target views of a batch, for example `reconstruct`; later stages pass their own.
        mean: the mean image, a baseline.
        lpips: from `nfldm_ns.pretrained.weights.load_lpips`; None leaves LPIPS out.
        picture_folder: where to put PNGs of real above rendered views, one per scene; None writes none.

    Returns:
        `psnr` (dB), `ssim`, `lpips`; where depth is known `depth_mae_m` and `depth_mae_in_box_m` (metres, planar; the
        second over surfaces inside the box); `nearest_view_*` and `mean_image_*` for the source view that looks in the
        most similar direction and for the mean image; `num_scenes` and `num_images`.
    """
    methods = {"": ImageMetrics(lpips), "nearest_view_": ImageMetrics(lpips), "mean_image_": ImageMetrics(lpips)}
    num_scenes = 0
    for batch in batches:
        rendered, (true, masks) = render(batch), (batch.target.images, batch.target.masks)
        methods[""].update(rendered.rgb, true, masks)
        methods[""].update_depth(rendered.depth, batch.target, batch.aabb)
        methods["nearest_view_"].update(nearest_source_view(batch), true, masks)
        methods["mean_image_"].update(mean.to(true).expand_as(true), true, masks)
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


# What the encoder gets


@dataclass(frozen=True)
class EncoderInput:
    """Which part of a scene's source views the encoder gets.

    Attributes:
        depth: "dense" as it is on disk; "sparse" a few random known pixels, as of a Lidar; "none" colours alone.
        num_views: chosen by `evenly_spread_views`; None takes all.
        num_points: known pixels per view that "sparse" keeps.
        seed: of those pixels, which depend on it and on the scene's id alone.
    """

    depth: DepthKind = "dense"
    num_views: int | None = None
    num_points: int = 200
    seed: int = 0

    def of(self, scene: Scene) -> Scene:
        """The scene with such source views."""
        source = scene.source
        depths = source.depths
        if self.depth == "none" or depths is None:
            depths = None
        elif self.depth == "sparse":
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {scene.scene_id}".encode()))
            depths = sparse_depths(depths, self.num_points, generator)
        source = replace(source, depths=depths)
        if self.num_views is not None:
            source = source[evenly_spread_views(source.cameras, self.num_views)]
        return Scene(scene.scene_id, source, scene.target, scene.bev)


# Scores view by view


class ViewJudge:
    """Scores images of the target views of a batch of scenes; what it needs of the real ones is computed once.

    Args:
        target: the real views, batch shape `[B, M]`.
        aabb: the scenes' box in metres.
        perceptual: None leaves LPIPS out.
    """

    @torch.no_grad()
    def __init__(self, target: Views, aabb: Float[Tensor, "2 3"], perceptual: PerceptualNetwork | None) -> None:
        self.target = target
        self.perceptual = perceptual
        self._real = None if perceptual is None else perceptual.features(target.images.flatten(0, 1) * 2 - 1)
        depths = torch.zeros_like(target.images[..., :1, :, :]) if target.depths is None else target.depths
        self._depths = depths
        self._inside = surface_inside_box(replace(target, depths=depths), aabb)
        self._valid = masks_or_valid(target)

    @torch.no_grad()
    def score_images(self, images: Float[Tensor, "batch views 3 height width"]) -> Scores:
        """`psnr` (dB), `ssim` and `lpips` of each view of images in [0, 1]: the value, and 1 image.

        PSNR is of valid pixels; for the others masked pixels show the real colours.
        """
        images, real = self.target.covered(images.float().clamp(0, 1)), self.target.images
        values = {"psnr": psnr(images, real, self.target.masks), "ssim": ssim(images, real)}
        if self.perceptual is not None and self._real is not None:
            features = self.perceptual.features(images.flatten(0, 1) * 2 - 1)
            values["lpips"] = self.perceptual.distance(features, self._real).reshape(images.shape[:2])
        return {name: torch.stack([value, torch.ones_like(value)], dim=-1).double() for name, value in values.items()}

    @torch.no_grad()
    def score(self, rendered: RenderedViews) -> Scores:
        """Those, and for each view sums over pixels with their number.

        `depth_mae_m` and `depth_mae_in_box_m` are absolute errors of planar depth in metres, the second over surfaces
        inside the box; `accumulation_known` and `accumulation_unknown` are the shares of rays that end on voxels, over
        pixels of known and of unknown depth (in scenes without any known depth neither is counted). Masked pixels never
        count.
        """
        scores = self.score_images(rendered.rgb)
        known = self._depths > 0
        error = (rendered.depth - self._depths).abs()
        measured = known.flatten(1).any(1)[:, None, None, None, None]
        scores["depth_mae_m"] = _sums(error, known)
        scores["depth_mae_in_box_m"] = _sums(error, self._inside)
        scores["accumulation_known"] = _sums(rendered.accumulation, known)
        scores["accumulation_unknown"] = _sums(rendered.accumulation, measured & ~known & self._valid)
        return scores


def _sums(
    values: Float[Tensor, "scenes views 1 height width"], mask: Bool[Tensor, "scenes views 1 height width"]
) -> Float[Tensor, "scenes views 2"]:
    """Sums over the pixels of a mask, and their number."""
    totals = torch.where(mask, values, 0).double().sum((-3, -2, -1))
    return torch.stack([totals, mask.double().sum((-3, -2, -1))], dim=-1)


@dataclass
class SceneScores:
    """Scores of the views of many scenes, kept view by view."""

    scene_ids: list[str] = field(default_factory=list)
    _scores: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, scene_ids: Sequence[str], scores: Scores) -> None:
        """Adds a batch of scenes, judged by `ViewJudge`."""
        if self._scores and scores.keys() != self._scores.keys():
            raise ValueError(f"scores {sorted(scores)} do not join {sorted(self._scores)}")
        self.scene_ids += scene_ids
        for name, values in scores.items():
            self._scores.setdefault(name, []).extend(values.cpu())

    def mean(self, scene_ids: Iterable[str] | None = None) -> dict[str, float]:
        """Means over the images, or the pixels, of some scenes (by default all), without what was never seen."""
        chosen = [self.scene_ids.index(i) for i in (self.scene_ids if scene_ids is None else scene_ids)]
        means = {}
        for name, values in self._scores.items():
            total, count = torch.stack([values[i] for i in chosen]).sum((0, 1)).tolist()
            if count:
                means[name] = total / count
        return means

    def views(self, scene_id: str, name: str) -> Float[Tensor, " views"]:
        """One score of each view of a scene."""
        total, count = self._scores[name][self.scene_ids.index(scene_id)].unbind(-1)
        return total / count

    @property
    def num_images(self) -> int:
        return sum(len(values) for values in self._scores.get("psnr", []))
