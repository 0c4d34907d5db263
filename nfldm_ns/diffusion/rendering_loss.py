"""The rendering loss of denoisers' estimates (DiffRF, Mueller et al. 2023): what they predict shall look right, too.

A denoised c, or f, is decoded with the true other latents of its scene and rendered at some of the scene's cameras. An
estimate of a very noisy latent is blurred whatever the denoiser does, so that its error counts as much as the signal's
share of the variance, alpha_bar (of a flow (1 - t)^2 / ((1 - t)^2 + t^2)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.autoencoder.scene_sampler import SceneCache
from nfldm_ns.diffusion.denoisers import CoarseDenoiser, FineDenoiser
from nfldm_ns.diffusion.latent_memory import LatentMemory
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder
from nfldm_ns.latents.scene_latents import SceneLatents
from nfldm_ns.scenes.views import Views, rotate_cameras90
from nfldm_ns.training.draws import ItemDraws


class EstimateRendering:
    """Renders estimates of c or f.

    Args:
        denoiser: whose latent it is.
        latent_autoencoder, renderer: stages 2 and 1, frozen, on the device of the training.
        memory: latents of the scenes.
        cache: their views.
        scene_ids: of the memory's scenes, in its order.
        num_scenes: of a pass, its first ones, as rendering all would cost more than everything else.
        num_views: of each scene, drawn at random.
    """

    def __init__(
        self,
        denoiser: CoarseDenoiser | FineDenoiser,
        latent_autoencoder: LatentAutoencoder,
        renderer: SceneAutoencoder,
        memory: LatentMemory,
        cache: SceneCache,
        scene_ids: Sequence[str],
        num_scenes: int = 1,
        num_views: int = 2,
    ) -> None:
        if len(scene_ids) != len(memory):
            raise ValueError(f"{len(scene_ids)} scenes do not belong to {len(memory)} latents")
        self.denoiser, self.latent_autoencoder, self.renderer = denoiser, latent_autoencoder, renderer
        self.memory, self.cache, self.scene_ids = memory, cache, scene_ids
        self.num_scenes, self.num_views = num_scenes, num_views

    def __call__(
        self,
        estimate: Float[Tensor, " batch *shape"],
        signal_share: Float[Tensor, " batch"],
        indices: Sequence[int],
        turns: Int[Tensor, " batch"],
        draws: ItemDraws,
    ) -> Float[Tensor, ""]:
        """Mean absolute error of colours, weighted.

        Args:
            estimate: x_0 in normalised units.
            signal_share: weights of the scenes.
            indices, turns: which scenes of the memory, and in which quarter turns.
        """
        count = min(self.num_scenes, len(indices))
        chosen, turned = list(indices[:count]), turns[:count]
        latents = latents_with(self.denoiser, self.latent_autoencoder, self.memory, estimate[:count], chosen, turned)
        grid = self.latent_autoencoder.decode(latents)
        views = self._views(chosen, turned, draws).to(estimate.device)
        rgb = views.covered(self.renderer.render(grid, views.cameras).rgb)
        error = (rgb - views.images).abs().flatten(1).mean(1)
        return (signal_share[:count].to(error) * error).mean()

    def _views(self, indices: list[int], turns: Tensor, draws: ItemDraws) -> Views:
        found = []
        for i, (index, turn) in enumerate(zip(indices, turns.tolist(), strict=True)):
            scene = self.cache.load(self.scene_ids[index])
            views = Views.cat([scene.source, scene.target])
            views = views[draws.permutation(i, views.shape[0])[: self.num_views]]
            found.append(replace(views, cameras=rotate_cameras90(views.cameras, turn)))
        return Views.stack(found)


def latents_with(
    denoiser: CoarseDenoiser | FineDenoiser,
    latent_autoencoder: LatentAutoencoder,
    memory: LatentMemory,
    estimate: Float[Tensor, " batch *shape"],
    indices: list[int],
    turns: Int[Tensor, " batch"],
) -> SceneLatents:
    """A denoiser's latent, given in normalised units, in its own units, with the scenes' other latents as they are."""
    latent = denoiser.latent.inverse(estimate)
    g = memory.pick("scene_code", indices, turns, estimate.device)[:, : latent_autoencoder.global_dim]
    if isinstance(denoiser, CoarseDenoiser):
        coarse = latent.unflatten(1, latent_autoencoder.coarse_shape[:2])
        return SceneLatents(g, coarse, memory.pick("fine", indices, turns, estimate.device))
    return SceneLatents(g, memory.pick("coarse", indices, turns, estimate.device), latent)


def signal_share(alpha: Shaped[Tensor, " batch"], sigma: Shaped[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """alpha^2 / (alpha^2 + sigma^2)."""
    return torch.square(alpha) / (torch.square(alpha) + torch.square(sigma))
