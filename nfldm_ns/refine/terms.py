"""What one prior wants of a scene."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.choice import evenly
from nfldm_ns.errors import UserInputError
from nfldm_ns.refine.domain_prior import DomainPrior
from nfldm_ns.refine.images import IMAGE_SUFFIXES, example_images
from nfldm_ns.refine.objectives import OBJECTIVES
from nfldm_ns.refine.observed_views import MAX_OBSERVED, most_similar_place, require_box
from nfldm_ns.refine.prior import Condition, ImagePrior, join, pick, repeat, rows_of
from nfldm_ns.refine.settings import RefinementConfig
from nfldm_ns.refine.view_prompts import prompts_by_direction, view_directions
from nfldm_ns.refine.views import ViewSampler
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import Views, index_cameras, resize_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid

NUM_INITIAL_RENDERS = 16  # that y' is embeddings of
RENDERED_AT_ONCE = 4

Conditions = tuple[Condition, Condition | None]


@dataclass
class StartOfScene:
    """A scene as it began.

    Attributes:
        grid: V.
        renderer: shows it.
        cameras: its own, `[N]`.
        views: draws others.
        seed: of those that are drawn for `renders`.
        observed: clean views of the place, `[1, M]`, where it is one that was photographed.
    """

    grid: VoxelGrid
    renderer: SceneAutoencoder
    cameras: Cameras
    views: ViewSampler
    seed: int
    observed: Views | None = None

    def renders(self) -> Float[Tensor, "renders 3 height width"]:
        """Images in [0, 1] from where refining looks."""
        cameras = self.views(NUM_INITIAL_RENDERS, torch.Generator().manual_seed(self.seed))
        renders = [
            self.renderer.render(self.grid, cameras[:, first : first + RENDERED_AT_ONCE]).rgb[0]
            for first in range(0, NUM_INITIAL_RENDERS, RENDERED_AT_ONCE)
        ]
        return torch.cat(renders).clamp(0, 1)

    def own_views(self, size: tuple[int, int] | None = None) -> Views:
        """At most `MAX_OBSERVED` of its own cameras, rendered with depth, `[1, N]`, in (height, width)."""
        chosen = evenly(range(len(self.cameras)), MAX_OBSERVED)
        cameras = index_cameras(self.cameras, torch.tensor(chosen))
        cameras = cameras if size is None else resize_cameras(cameras, *size)
        cameras = index_cameras(cameras, None).to(self.grid.device)
        rendered = self.renderer.render(self.grid, cameras)
        return Views(cameras, rendered.rgb.clamp(0, 1), rendered.depth)

    @property
    def front(self) -> Float[Tensor, " 3"]:
        """The direction in which views are of its front."""
        return -self.cameras.camera_to_worlds[0, :3, 2]


class PriorTerm:
    """A prior, what it is told, and how its judgement becomes a loss.

    Args:
        prior: judges.
        config: what is wanted of it.
        start: the scene as it began.
        weight: of its loss.

    Raises:
        UserInputError: if the prior cannot be conditioned on what is wanted.

    Attributes:
        wanted: y, any number of rows.
        unwanted: y' or the unconditional embedding; None without guidance.
        by_direction: y of views in each of `DIRECTIONS`, where words say them.
        seen_from: what is told of cameras `[1, N]` besides, by a prior that observes.
    """

    def __init__(
        self,
        prior: ImagePrior,
        config: RefinementConfig,
        start: StartOfScene,
        weight: float = 1.0,
    ) -> None:
        self.prior, self.config, self.start, self.weight = prior, config, start, weight
        self.distillation = config.effective_distillation()
        self.objective = OBJECTIVES[self.distillation.objective](prior, self.distillation)
        self.seen_from: Callable[[Cameras], Condition] | None = None
        with torch.no_grad():
            observed, clean = self._observed() if prior.observes else (None, None)
            self.wanted = self._wanted() if clean is None or prior.observes_alone else prior.condition(clean)
            self.unwanted = self._unwanted()
            self.by_direction = self._by_direction()
            if observed is not None:
                self.seen_from = prior.observing(observed)

    def _observed(self) -> tuple[Views, Tensor | None]:
        """Views that the prior observes, and clean images of the same, if they are and no style is wanted."""
        start, config, stage1 = self.start, self.config, self.prior.stage1
        if stage1 is not None:
            require_box(start.grid.aabb, stage1, "the scene")
        views = start.observed
        if views is None and config.observed == "similar":
            views = self._similar()
        if views is None:
            return start.own_views(None if stage1 is None else stage1.image_size), None
        return views, None if config.style is not None else views.images[0].to(self.prior.device)

    def _similar(self) -> Views:
        """Of the training place that is most like the scene."""
        folder, stage1 = self.config.clean_images, self.prior.stage1
        if stage1 is None or folder is None or not (folder / "collection.json").is_file():
            raise UserInputError(
                "Similar places are those of a collection, by the stage 1 of a prior of 'nfldm-train-prior --condition "
                "views': name the collection with --clean-images, or leave out --observed."
            )
        grid = stage1.encode(self.start.own_views(stage1.image_size))
        return most_similar_place(SceneCollection.open(folder), stage1, grid)[1]

    def _wanted(self) -> Condition:
        """y: of the style, of clean images, or else of photos of the place."""
        config, prior = self.config, self.prior
        if prior.observes_alone and config.style is None and config.clean_images is None:
            return prior.condition()
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
        if self.start.observed is not None:
            return prior.condition(self.start.observed.images[0].to(prior.device))
        raise UserInputError(
            "Nothing tells this prior what the scene shall look like: name clean images with --clean-images, or give "
            "a --style."
        )

    def _unwanted(self) -> Condition | None:
        """y' of negative guidance: of renders of the scene as it began, and of images of other scenes."""
        guidance = self.distillation.guidance
        if guidance == "none":
            return None
        if guidance == "classifier_free":
            return self.prior.unconditional()
        conditions = [self.prior.render_condition(self.start.renders())]
        conditions += [self.prior.render_condition(self._examples(folder)) for folder in self.config.negative_scenes]
        return join(conditions)

    def _by_direction(self) -> list[Condition] | None:
        """y of the style in words, with the view's direction in them."""
        config = self.config
        if not config.view_prompt_share:
            return None
        if not config.says_words:
            raise UserInputError("Prompts by view want words: give --style in words, or leave out --view-prompt-share.")
        assert config.style is not None
        clean = None if config.clean_images is None else self._examples(config.clean_images)
        return [self.prior.condition(clean, words) for words in prompts_by_direction(config.style)]

    def _examples(self, path: Path) -> Float[Tensor, "images 3 size size"]:
        return example_images(path, self.prior.image_size).to(self.prior.device)

    def conditions(self, cameras: Cameras, seen: Condition, generator: torch.Generator) -> Conditions:
        """y and y' of views, one row at random per view.

        What was observed is told to both, but not to the unconditional embedding.

        Args:
            cameras: `[1, N]`.
            seen: what both are told in any case.
        """
        count = cameras.shape[1]
        wanted = _rows(self.wanted, count, generator)
        if self.by_direction is not None:
            named = torch.rand(count, generator=generator) < self.config.view_prompt_share
            looks = view_directions(cameras, self.start.front)[0].tolist()
            told = [_rows(condition, count, generator) for condition in self.by_direction]
            rows = [told[look] if say else wanted for look, say in zip(looks, named.tolist(), strict=True)]
            wanted = join([pick(condition, [i]) for i, condition in enumerate(rows)])
        observed = {} if self.seen_from is None else self.seen_from(cameras)
        wanted = {**wanted, **seen, **observed}
        if self.unwanted is None:
            return wanted, None
        if self.distillation.guidance == "classifier_free":
            observed = {name: torch.zeros_like(values) for name, values in observed.items()}
        return wanted, {**_rows(self.unwanted, count, generator), **seen, **observed}


def _rows(condition: Condition, count: int, generator: torch.Generator) -> Condition:
    """One row at random per view."""
    rows = rows_of(condition)
    if rows == 1:
        return repeat(condition, count)
    return pick(condition, torch.randint(rows, (count,), generator=generator))
