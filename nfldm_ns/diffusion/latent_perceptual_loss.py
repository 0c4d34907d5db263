"""A perceptual loss in the features of stage 2's decoder (latent perceptual loss; Berrada et al. 2025).

A denoised c, or f, is decoded with the true other latents of its scene, and so is the true one. What the decoder makes
of both in its hidden layers is compared: errors of latents that decoding ignores cost little, those it amplifies cost
much. As in `rendering_loss.py`, an estimate counts as much as the signal's share of the variance.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nfldm_ns.diffusion.denoisers import CoarseDenoiser, FineDenoiser
from nfldm_ns.diffusion.latent_memory import LatentMemory
from nfldm_ns.diffusion.rendering_loss import latents_with
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder

EPSILON = 1e-3  # of standard deviations: channels that hardly vary count little


class LatentPerceptualLoss:
    """Compares estimates of c or f with the true ones as the decoder of stage 2 sees them.

    Args:
        denoiser: whose latent it is.
        latent_autoencoder: stage 2, frozen, on the device of the training.
        memory: latents of the scenes.
    """

    def __init__(
        self, denoiser: CoarseDenoiser | FineDenoiser, latent_autoencoder: LatentAutoencoder, memory: LatentMemory
    ) -> None:
        self.denoiser, self.latent_autoencoder, self.memory = denoiser, latent_autoencoder, memory

    def __call__(
        self,
        estimate: Float[Tensor, " batch *shape"],
        clean: Float[Tensor, " batch *shape"],
        signal_share: Float[Tensor, " batch"],
        indices: list[int],
        turns: Int[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        """Mean squared difference of features in standard deviations of the true ones', weighted.

        All layers, and in them all channels, count alike. Those of no difference, such as what the decoder makes of c
        alone where f is estimated, are zero.

        Args:
            estimate, clean: x_0 in normalised units.
            signal_share: weights of the scenes.
            indices, turns: which scenes of the memory, and in which quarter turns.
        """
        with torch.no_grad():
            true = self._features(clean, indices, turns)
        errors = [
            _standardised_error(ours, theirs)
            for ours, theirs in zip(self._features(estimate, indices, turns), true, strict=True)
        ]
        error = torch.stack(errors).mean(0)
        return (signal_share.to(error) * error).mean()

    def _features(self, latent: Tensor, indices: list[int], turns: Tensor) -> list[Tensor]:
        latents = latents_with(self.denoiser, self.latent_autoencoder, self.memory, latent, indices, turns)
        return [features.float() for features in self.latent_autoencoder.decoder_features(latents)]


def _standardised_error(
    ours: Float[Tensor, "batch channels y x"], true: Float[Tensor, "batch channels y x"]
) -> Float[Tensor, " batch"]:
    std = true.std(dim=(0, 2, 3), keepdim=True) + EPSILON
    return ((ours - true) / std).square().flatten(1).mean(1)
