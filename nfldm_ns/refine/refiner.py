"""The losses of refining one scene, without any trainer."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.autoencoder.scene_autoencoder import RenderedViews, SceneAutoencoder
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.scene_files import GeneratedScene
from nfldm_ns.refine.distillation import distill
from nfldm_ns.refine.domain_prior import DomainPrior
from nfldm_ns.refine.images import IMAGE_SUFFIXES, example_images
from nfldm_ns.refine.prior import Condition, ImagePrior, join, pick, repeat, rows_of
from nfldm_ns.refine.seen_maps import SceneMap
from nfldm_ns.refine.settings import RefinementConfig
from nfldm_ns.refine.views import ViewSampler
from nfldm_ns.scenes.voxel_grid import VoxelGrid

NUM_INITIAL_RENDERS = 16  # that y' is embeddings of
RENDERED_AT_ONCE = 4
EMPTY_OPACITY = 0.05  # of a voxel: less counts as empty


class Refiner:
    """Judges renders of a scene that is being refined.

    Args:
        scene: as it began; it stays as it is.
        prior: judges; moved to the device.
        config: what is wanted.
        seed: of the renders that y' is made of.
        device: of the scene that is refined.
        scene_map: what a prior that knows maps is told of the scene.

    Raises:
        UserInputError: if the prior cannot be conditioned on what is wanted, or the scene has no cameras.
    """

    def __init__(
        self,
        scene: GeneratedScene,
        prior: ImagePrior,
        config: RefinementConfig,
        seed: int = 0,
        device: torch.device | str = "cpu",
        scene_map: SceneMap | None = None,
    ) -> None:
        if scene.cameras is None:
            raise UserInputError("The scene has no transforms.json, so nothing tells its cameras: sample it again.")
        self.config, self.distillation = config, config.effective_distillation()
        self.prior = prior.to(device)
        self.scene_map = None if scene_map is None else scene_map.to(device)
        self.start, self.start_renderer = scene.grid.to(device), scene.renderer.to(device)
        self.views = ViewSampler(config.views, self.start, scene.cameras)
        self.start_opacity = self._opacity(self.start)
        used = self.start.features[self.start.features != 0]
        self.feature_std = used.std() if used.numel() > 1 else self.start.features.new_tensor(1.0)
        with torch.no_grad():
            self.wanted = self._wanted()
            self.unwanted = self._unwanted(seed)

    def _wanted(self) -> Condition:
        """y: of the style, or of clean images."""
        config, prior = self.config, self.prior
        path = Path(config.style) if config.style is not None else None
        if path is not None and path.exists():
            return prior.condition(self._examples(path))
        if path is not None and path.suffix.lower() in IMAGE_SUFFIXES:
            raise UserInputError(f"There is no image {path}: check --style.")
        clean = None if config.clean_images is None else self._examples(config.clean_images)
        if config.style is not None:
            return prior.condition(clean, config.style)
        if clean is not None:
            return prior.condition(clean)
        if isinstance(prior, DomainPrior):
            return prior.clean_condition()
        raise UserInputError(
            "Nothing tells this prior what the scene shall look like: name clean images with --clean-images, or give "
            "a --style."
        )

    def _unwanted(self, seed: int) -> Condition | None:
        """y' of negative guidance: of renders of the scene as it began, and of images of other scenes."""
        guidance = self.distillation.guidance
        if guidance == "none":
            return None
        if guidance == "classifier_free":
            return self.prior.unconditional()
        cameras = self.views(NUM_INITIAL_RENDERS, torch.Generator().manual_seed(seed))
        renders = [
            self.start_renderer.render(self.start, cameras[:, first : first + RENDERED_AT_ONCE]).rgb[0]
            for first in range(0, NUM_INITIAL_RENDERS, RENDERED_AT_ONCE)
        ]
        conditions = [self.prior.render_condition(torch.cat(renders).clamp(0, 1))]
        conditions += [self.prior.render_condition(self._examples(folder)) for folder in self.config.negative_scenes]
        return join(conditions)

    def _examples(self, path: Path) -> Float[Tensor, "images 3 size size"]:
        return example_images(path, self.prior.image_size).to(self.prior.device)

    def losses(
        self,
        grid: VoxelGrid,
        renderer: SceneAutoencoder,
        progress: float,
        generator: torch.Generator,
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Weighted losses by name, whose sum is to be minimised, and numbers to watch.

        Args:
            grid: V as it is now, of one scene; where gradients go.
            renderer: shows it.
            progress: share of the refinement done.
            generator: of all that is drawn, on the CPU.

        Raises:
            FloatingPointError: if the prior's gradient was finite for none of the renders.
        """
        count = self.config.views.views_per_step
        cameras = self.views(count, generator)
        rendered = renderer.render(grid, cameras)
        seen = {} if self.scene_map is None else {"seen": self.scene_map.seen_by(cameras)}
        wanted = {**self._rows(self.wanted, count, generator), **seen}
        unwanted = None if self.unwanted is None else {**self._rows(self.unwanted, count, generator), **seen}
        distilled = distill(self.prior, rendered.rgb[0], wanted, unwanted, self.distillation, progress, generator)
        if distilled.skipped == count:
            raise FloatingPointError("what the prior says")
        losses = {"distillation_loss": distilled.loss, **self.regularisers(grid, rendered, cameras)}
        norm = float(distilled.gradient.square().mean().sqrt())
        return losses, {"distillation_gradient": norm, "skipped_views": float(distilled.skipped)}

    def _rows(self, condition: Condition, count: int, generator: torch.Generator) -> Condition:
        """One row at random per view."""
        rows = rows_of(condition)
        if rows == 1:
            return repeat(condition, count)
        return pick(condition, torch.randint(rows, (count,), generator=generator))

    def regularisers(self, grid: VoxelGrid, rendered: RenderedViews, cameras: Cameras) -> dict[str, Tensor]:
        """The weighted losses of `RegulariserConfig`."""
        config = self.config.regularisers
        opacity = self._opacity(grid)
        losses: dict[str, Tensor] = {}
        if config.depth_mult or config.image_mult:
            with torch.no_grad():
                before = self.start_renderer.render(self.start, cameras)
            losses["depth_loss"] = config.depth_mult * (rendered.depth - before.depth).abs().mean()
            losses["image_loss"] = config.image_mult * (rendered.rgb - before.rgb).abs().mean()
        risen = (opacity - self.start_opacity).clamp(min=0) * (self.start_opacity < EMPTY_OPACITY)
        losses["floaters_loss"] = config.floaters_mult * risen.mean()
        losses["close_density_loss"] = config.close_density_mult * (opacity - self.start_opacity).square().mean()
        change = (grid.features - self.start.features) / self.feature_std
        losses["close_features_loss"] = config.close_features_mult * change.square().mean()
        weights = {name: getattr(config, name.replace("_loss", "_mult")) for name in losses}
        return {name: loss for name, loss in losses.items() if weights[name]}

    @staticmethod
    def _opacity(grid: VoxelGrid) -> Float[Tensor, "1 1 z y x"]:
        """Of each voxel, along its shortest edge."""
        return 1 - torch.exp(-grid.density * grid.voxel_size.min())
