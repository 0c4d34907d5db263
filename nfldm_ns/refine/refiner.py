"""The losses of refining one scene, without any trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.autoencoder.scene_autoencoder import RenderedViews, SceneAutoencoder
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.scene_files import GeneratedScene
from nfldm_ns.refine.prior import Condition, ImagePrior
from nfldm_ns.refine.seen_maps import SceneMap
from nfldm_ns.refine.settings import RefinementConfig
from nfldm_ns.refine.shading import Shading
from nfldm_ns.refine.terms import Conditions, PriorTerm, StartOfScene
from nfldm_ns.refine.views import ViewSampler, judged_cameras
from nfldm_ns.scenes.views import Views
from nfldm_ns.scenes.voxel_grid import VoxelGrid

EMPTY_OPACITY = 0.05  # of a voxel: less counts as empty


@dataclass
class DrawnViews:
    """What a step looks at.

    Attributes:
        cameras: `[1, N]`.
        shading: of the views; None if none is lit.
        conditions: y and y' for each prior.
    """

    cameras: Cameras
    shading: Shading | None
    conditions: list[Conditions]


class Refiner:
    """Judges renders of a scene that is being refined.

    Args:
        scene: as it began; it stays as it is.
        priors: judge; moved to the device. One, or two where `config` says what is wanted of a second.
        config: what is wanted.
        seed: of the renders that y' is made of.
        device: of the scene that is refined.
        scene_map: what a prior that knows maps is told of the scene.
        observed: clean views of the place, `[1, M]`, for priors that observe; by default `config.observed` says which.

    Raises:
        UserInputError: if a prior cannot be conditioned on what is wanted, or the scene has no cameras.
    """

    def __init__(
        self,
        scene: GeneratedScene,
        priors: ImagePrior | Sequence[ImagePrior],
        config: RefinementConfig,
        seed: int = 0,
        device: torch.device | str = "cpu",
        scene_map: SceneMap | None = None,
        observed: Views | None = None,
    ) -> None:
        if scene.cameras is None:
            raise UserInputError("The scene has no transforms.json, so nothing tells its cameras: sample it again.")
        priors = [priors] if isinstance(priors, ImagePrior) else priors
        self.config = config
        self.scene_map = None if scene_map is None else scene_map.to(device)
        self.start, self.start_renderer = scene.grid.to(device), scene.renderer.to(device)
        cameras = judged_cameras(scene.cameras, scene.renderer, max(prior.image_size for prior in priors))
        self.views = ViewSampler(config.views, self.start, cameras)
        self.start_opacity = self._opacity(self.start)
        used = self.start.features[self.start.features != 0]
        self.feature_std = used.std() if used.numel() > 1 else self.start.features.new_tensor(1.0)
        start = StartOfScene(self.start, self.start_renderer, cameras, self.views, seed, observed)
        wanted = zip(priors, config.of_priors(), strict=True)
        self.terms = [PriorTerm(prior.to(device), told, start, weight) for prior, (told, weight) in wanted]
        self._drawn: DrawnViews | None = None

    def losses(
        self,
        grid: VoxelGrid,
        renderer: SceneAutoencoder,
        progress: float,
        generator: torch.Generator,
        step: int = 0,
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Weighted losses by name, whose sum is to be minimised, and numbers to watch.

        Args:
            grid: V as it is now, of one scene; where gradients go.
            renderer: shows it.
            progress: share of the refinement done.
            generator: of all that is drawn, on the CPU.
            step: its number, for objectives that keep views for several steps.

        Raises:
            FloatingPointError: if a prior's gradient was finite for none of the renders.
        """
        anew = self._drawn is None or self.terms[0].objective.begins_anew(step)
        if anew:
            cameras = self.views(self.config.views.views_per_step, generator)
            shading = Shading.draw(self.config.shading, cameras.shape[1], generator)
            conditions = [term.conditions(cameras, self._seen(term, cameras), generator) for term in self.terms]
            self._drawn = DrawnViews(cameras, shading, conditions)
        drawn = self._drawn
        assert drawn is not None
        rendered = renderer.render(grid, drawn.cameras)
        images = self._lit(drawn, rendered, grid, renderer)
        losses, metrics = self._distilled(images, drawn, progress, generator, anew)
        return {**losses, **self.regularisers(grid, rendered, drawn.cameras)}, metrics

    def _seen(self, term: PriorTerm, cameras: Cameras) -> Condition:
        """What views see, for priors that are told."""
        if self.scene_map is None or term.prior.maps != self.scene_map.description:
            return {}
        return {"seen": self.scene_map.seen_by(cameras)}

    @staticmethod
    def _lit(
        drawn: DrawnViews, rendered: RenderedViews, grid: VoxelGrid, renderer: SceneAutoencoder
    ) -> Float[Tensor, "views 3 height width"]:
        if drawn.shading is None:
            return rendered.rgb[0]
        return drawn.shading(rendered, grid, drawn.cameras, renderer.config.near, renderer.config.num_samples)

    def _distilled(
        self, images: Tensor, drawn: DrawnViews, progress: float, generator: torch.Generator, anew: bool
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What all priors say, as a weighted sum."""
        found = [
            term.objective(images, wanted, unwanted, progress, generator, anew)
            for term, (wanted, unwanted) in zip(self.terms, drawn.conditions, strict=True)
        ]
        if any(distilled.skipped == len(images) for distilled in found):
            self._drawn = None  # or the next steps would look at the same
            raise FloatingPointError("what the prior says")
        weighted = [term.weight * distilled.loss for term, distilled in zip(self.terms, found, strict=True)]
        norms = [float(distilled.gradient.square().mean().sqrt()) for distilled in found]
        names = ("distillation_gradient", "second_gradient")
        metrics = {"skipped_views": float(max(distilled.skipped for distilled in found))}
        return {"distillation_loss": torch.stack(weighted).sum()}, {**dict(zip(names, norms, strict=False)), **metrics}

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
