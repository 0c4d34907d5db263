"""What renders are changed by: the gradients of score distillation, and losses to samples of a prior.

A new objective is a class here or in a file of its own, a line in `OBJECTIVES`, and its name in `ObjectiveName`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.pretrained.weights import load_lpips
from nfldm_ns.refine.distillation import GRADIENTS, DistillationConfig, Distilled, Noised, distill
from nfldm_ns.refine.prior import Condition, ImagePrior, resize_square


class Objective(ABC):
    """Judges renders by a prior.

    Args:
        prior: who judges.
        config: how.
    """

    def __init__(self, prior: ImagePrior, config: DistillationConfig) -> None:
        self.prior, self.config = prior, config

    def begins_anew(self, step: int) -> bool:
        """Whether a step looks at other views than the step before."""
        return True

    @abstractmethod
    def __call__(
        self,
        images: Float[Tensor, "batch 3 height width"],
        condition: Condition,
        opposite: Condition | None,
        progress: float,
        generator: torch.Generator,
        anew: bool,
    ) -> Distilled:
        """The loss of renders in [0, 1], see `distill`; `anew`: they show other views than those before."""


class ScoreDistillation(Objective):
    """All whose gradient is in `GRADIENTS`."""

    def __call__(
        self,
        images: Tensor,
        condition: Condition,
        opposite: Condition | None,
        progress: float,
        generator: torch.Generator,
        anew: bool,
    ) -> Distilled:
        return distill(self.prior, images, condition, opposite, self.config, progress, generator)


class MultistepReconstruction(Objective):
    """ReconFusion's (Wu et al. 2024): `w(t) (|x - x_0|_1 + m LPIPS(x, x_0))` to a sample x_0 of the prior.

    The sample begins at the render x, noised to t, and takes several deterministic steps. The same views are looked at,
    and their samples kept, for some steps. Means are over pixels and views, so that the loss does not depend on sizes.
    Where samples are no images the absolute difference is that of what is diffused.
    """

    def __init__(self, prior: ImagePrior, config: DistillationConfig) -> None:
        super().__init__(prior, config)
        self.perceptual: PerceptualNetwork | None = None
        self.sample: Tensor | None = None
        self.shows_images = False
        self.weight = self.finite = torch.empty(0)

    def begins_anew(self, step: int) -> bool:
        """In the steps after those in which checkpoints are written, so that resumed runs see what others see."""
        return self.sample is None or step % self.config.sample_every == 1 % self.config.sample_every

    def __call__(
        self,
        images: Tensor,
        condition: Condition,
        opposite: Condition | None,
        progress: float,
        generator: torch.Generator,
        anew: bool,
    ) -> Distilled:
        if anew or self.sample is None:
            self._draw(images.detach(), condition, opposite, progress, generator)
        assert self.sample is not None
        size, finite = self.prior.image_size, self.finite
        if bool(finite.any()):
            chosen = images[finite]
            shown = resize_square(chosen, size) if self.shows_images else self.prior.encode(chosen)
            sample, weight = self.sample[finite], self.weight[finite]
            distance = (shown - sample).abs().mean((1, 2, 3))
            if self.shows_images and self.config.sample_lpips_mult:
                distance = distance + self.config.sample_lpips_mult * self._lpips(shown, sample)
            loss = (weight.flatten() * distance).sum() / len(images)
            gradient = (weight * (shown - sample)).detach()
        else:
            loss, gradient = images.sum() * 0.0, torch.zeros_like(self.sample)
        return Distilled(loss, gradient, int((~finite).sum()))

    @torch.no_grad()
    def _draw(
        self,
        images: Tensor,
        condition: Condition,
        opposite: Condition | None,
        progress: float,
        generator: torch.Generator,
    ) -> None:
        encoded = self.prior.encode(images)
        noised = Noised.draw(self.prior, encoded, condition, opposite, self.config, progress, generator)
        clean = noised.denoised()
        decoded = self.prior.decode(clean)
        self.shows_images = decoded is not None
        self.sample = clean if decoded is None else decoded.clamp(0, 1)
        self.weight = noised.weight
        self.finite = self.sample.flatten(1).isfinite().all(1)

    def _lpips(self, first: Tensor, second: Tensor) -> Float[Tensor, " batch"]:
        if self.perceptual is None:
            network = PerceptualNetwork(load_lpips("vgg")).requires_grad_(False).eval()
            self.perceptual = network.to(first.device)
        features = [self.perceptual.features(2 * images - 1) for images in (first.clamp(0, 1), second)]
        return self.perceptual.distance(*features)


OBJECTIVES: dict[str, type[Objective]] = {
    **dict.fromkeys(GRADIENTS, ScoreDistillation),
    "multistep": MultistepReconstruction,
}
