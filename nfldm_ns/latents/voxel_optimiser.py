"""Encoded scenes optimised on before stages 2 and 3 learn from them, near what stage 2 can hold.

What an encoder finds is not the best V for the views of a place. For training places that best V can be had: gradient
descent through the frozen renderer and decoder, on all of their views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nfldm_ns.autoencoder.grid_optimisation import GridOptimiserConfig, optimise_grid
from nfldm_ns.autoencoder.losses import StageOneLossConfig
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder
from nfldm_ns.scenes.views import Views
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.training.identity import model_hash

# A few steps want twice the learning rates with which V is optimised to a standstill.
FEW_STEPS = GridOptimiserConfig(density_learning_rate=0.4, feature_learning_rate=0.04)
# The losses of the presets of stage 1, without a discriminator.
LOSS = StageOneLossConfig(lpips_mult=1.0, rgb_mult=1.0, depth_mult=0.1, depth_norm="l1", opacity_mult=1.0)


@dataclass
class VoxelOptimiser:
    """Optimises V for views.

    Attributes:
        perceptual: the network of LPIPS.
        num_steps: of Adam.
        latent_autoencoder: a trained stage 2 that V stays near to; None: near to nothing.
        latent_mult: weight of `reconstruction_distance`.
        loss: of the views.
    """

    perceptual: PerceptualNetwork
    num_steps: int
    latent_autoencoder: LatentAutoencoder | None = None
    latent_mult: float = 0.1
    loss: StageOneLossConfig = field(default_factory=lambda: LOSS)

    def describe(self) -> dict[str, Any]:
        """What tells one run from another."""
        near = self.latent_autoencoder
        how = {"steps": self.num_steps, "learning_rate": FEW_STEPS.density_learning_rate}
        if near is None:
            return how
        return {**how, "latent_autoencoder": model_hash(near), "latent_mult": self.latent_mult}

    def __call__(self, autoencoder: SceneAutoencoder, grid: VoxelGrid, views: Sequence[Views]) -> VoxelGrid:
        """V of B scenes, optimised for their views.

        Args:
            views: of batch shape `[B, N]` each; all of them count.
        """
        config = replace(FEW_STEPS, max_steps=self.num_steps, check_every=self.num_steps)
        near = self.latent_autoencoder

        def anchor(shown: VoxelGrid) -> Tensor:
            assert near is not None
            return self.latent_mult * reconstruction_distance(near, shown)

        return optimise_grid(
            autoencoder, grid, Views.join(views), self.loss, self.perceptual, config, None if near is None else anchor
        ).grid


def reconstruction_distance(latent_autoencoder: LatentAutoencoder, grid: VoxelGrid) -> Tensor:
    """Mean absolute difference of normalised voxels from what stage 2 makes of them, which counts as constant."""
    code = latent_autoencoder.voxel_code
    with torch.no_grad():
        target = code.normalise(latent_autoencoder.decode(latent_autoencoder.encode(grid)))
    return (code.normalise(grid) - target).abs().mean()
