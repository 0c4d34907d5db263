"""What one prior wants of a scene."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.errors import UserInputError
from nfldm_ns.refine.domain_prior import DomainPrior
from nfldm_ns.refine.images import IMAGE_SUFFIXES, example_images
from nfldm_ns.refine.objectives import OBJECTIVES
from nfldm_ns.refine.prior import Condition, ImagePrior, join, pick, repeat, rows_of
from nfldm_ns.refine.settings import RefinementConfig
from nfldm_ns.refine.view_prompts import prompts_by_direction, view_directions

Conditions = tuple[Condition, Condition | None]


class PriorTerm:
    """A prior, what it is told, and how its judgement becomes a loss.

    Args:
        prior: judges.
        config: what is wanted of it.
        renders: makes images in [0, 1] of the scene as it began.
        front: the world direction in which views are of the scene's front.
        weight: of its loss.

    Raises:
        UserInputError: if the prior cannot be conditioned on what is wanted.

    Attributes:
        wanted: y, any number of rows.
        unwanted: y' or the unconditional embedding; None without guidance.
        by_direction: y of views in each of `DIRECTIONS`, where words say them.
    """

    def __init__(
        self,
        prior: ImagePrior,
        config: RefinementConfig,
        renders: Callable[[], Float[Tensor, "images 3 height width"]],
        front: Float[Tensor, " 3"],
        weight: float = 1.0,
    ) -> None:
        self.prior, self.config, self.front, self.weight = prior, config, front, weight
        self.distillation = config.effective_distillation()
        self.objective = OBJECTIVES[self.distillation.objective](prior, self.distillation)
        with torch.no_grad():
            self.wanted = self._wanted()
            self.unwanted = self._unwanted(renders)
            self.by_direction = self._by_direction()

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

    def _unwanted(self, renders: Callable[[], Tensor]) -> Condition | None:
        """y' of negative guidance: of renders of the scene as it began, and of images of other scenes."""
        guidance = self.distillation.guidance
        if guidance == "none":
            return None
        if guidance == "classifier_free":
            return self.prior.unconditional()
        conditions = [self.prior.render_condition(renders())]
        conditions += [self.prior.render_condition(self._examples(folder)) for folder in self.config.negative_scenes]
        return join(conditions)

    def _by_direction(self) -> list[Condition] | None:
        """y of the style in words, with the view's direction in them."""
        config = self.config
        if not config.view_prompt_share:
            return None
        if config.style is None or Path(config.style).exists():
            raise UserInputError("Prompts by view want words: give --style in words, or leave out --view-prompt-share.")
        clean = None if config.clean_images is None else self._examples(config.clean_images)
        return [self.prior.condition(clean, words) for words in prompts_by_direction(config.style)]

    def _examples(self, path: Path) -> Float[Tensor, "images 3 size size"]:
        return example_images(path, self.prior.image_size).to(self.prior.device)

    def conditions(self, cameras: Cameras, seen: Condition, generator: torch.Generator) -> Conditions:
        """y and y' of views, one row at random per view.

        Args:
            cameras: `[1, N]`.
            seen: what both are told besides.
        """
        count = cameras.shape[1]
        wanted = _rows(self.wanted, count, generator)
        if self.by_direction is not None:
            named = torch.rand(count, generator=generator) < self.config.view_prompt_share
            looks = view_directions(cameras, self.front)[0].tolist()
            told = [_rows(condition, count, generator) for condition in self.by_direction]
            rows = [told[look] if say else wanted for look, say in zip(looks, named.tolist(), strict=True)]
            wanted = join([pick(condition, [i]) for i, condition in enumerate(rows)])
        unwanted = None if self.unwanted is None else _rows(self.unwanted, count, generator)
        return {**wanted, **seen}, None if unwanted is None else {**unwanted, **seen}


def _rows(condition: Condition, count: int, generator: torch.Generator) -> Condition:
    """One row at random per view."""
    rows = rows_of(condition)
    if rows == 1:
        return repeat(condition, count)
    return pick(condition, torch.randint(rows, (count,), generator=generator))
