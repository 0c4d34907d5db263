"""What a baseline learns by, and what it makes scenes with."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.autoencoder.renderers import SceneRenderer
from nfldm_ns.autoencoder.scene_sampler import SceneSampler
from nfldm_ns.baselines.cameras import CameraModel
from nfldm_ns.baselines.scene_generator import SceneGenerator
from nfldm_ns.training.draws import BatchShare


@dataclass
class SceneParts:
    """What turns latents into images: V, where it is seen from, and what it looks like."""

    generator: SceneGenerator
    cameras: CameraModel
    renderer: SceneRenderer

    @property
    def latent_dims(self) -> list[int]:
        """Sizes of the latents of scene and cameras, which follow each other in one vector."""
        return [self.generator.latent_dim, int(self.cameras.latent_dim)]


class Objective(nn.Module):
    """Parts that are trained together. A new objective is a file and a line in `assembly.py`.

    `forward` takes what a pass looks at to losses by name.
    """

    betas: tuple[float, float] = (0.9, 0.999)

    def __init__(self, parts: SceneParts) -> None:
        super().__init__()
        self.generator, self.cameras, self.renderer = parts.generator, parts.cameras, parts.renderer

    @property
    def parts(self) -> SceneParts:
        return SceneParts(self.generator, self.cameras, self.renderer)

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates of the parts that have parameters, as multiples of the schedule's."""
        return {name: 1.0 for name, part in self.named_children() if any(True for _ in part.parameters())}

    @abstractmethod
    def example_latents(self, count: int) -> Float[Tensor, "scenes dim"]:
        """Of scenes and cameras, always the same: what the training is looked at by."""

    @abstractmethod
    def losses(self, wrapped: nn.Module, sampler: SceneSampler, share: BatchShare, device: torch.device) -> PassLosses:
        """The losses of passes, through the module as an accelerator wraps it."""


class PassLosses:
    """Losses of a pass by its number.

    Args:
        wrapped: an objective, as an accelerator wraps it.
        sampler: of real scenes.
        share: what this process works on.
    """

    def __init__(self, wrapped: nn.Module, sampler: SceneSampler, share: BatchShare, device: torch.device) -> None:
        self.wrapped, self.sampler, self.share, self.device = wrapped, sampler, share, device

    @abstractmethod
    def __call__(self, number: int) -> dict[str, Tensor]:
        """Weighted losses by name."""
