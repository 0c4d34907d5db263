"""GAUDI's first stage: latents of scenes, learned with what decodes them (Bautista et al., NeurIPS 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor, nn

from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.scene_sampler import SceneSampler
from nfldm_ns.baselines.adversarial import render_rays
from nfldm_ns.baselines.cameras import PoseDecoder
from nfldm_ns.baselines.objective import Objective, PassLosses, SceneParts
from nfldm_ns.training.draws import BatchShare

LATENT_NOISE = 0.1  # standard deviation of noise on latents, so that neighbours decode alike
LATENT_MULT = 0.01  # of their mean squares, so that the noise counts
POSE_MULT = 1.0
LATENT_RATE = 3.0  # a latent is looked at once per epoch, what decodes it in every step


class AutodecoderObjective(Objective):
    """Latents of scene and cameras of every training scene, fitted to its images and to its cameras.

    They are disentangled: voxels are made of the one and cameras of the other, so images teach the first alone and
    camera poses the second alone. Images are rendered by the scene's true cameras.

    Args:
        perceptual: of the loss of images; no part of the module.
        trajectories: `[S, 5 N]`, the cameras of the training scenes, which the pose decoder is to give.
    """

    cameras: PoseDecoder
    trajectories: Tensor

    def __init__(
        self, parts: SceneParts, perceptual: PerceptualNetwork, trajectories: Float[Tensor, "scenes views_times_5"]
    ) -> None:
        super().__init__(parts)
        self._perceptual = (perceptual,)
        self.latents = nn.Embedding(len(trajectories), sum(parts.latent_dims))
        self.register_buffer("trajectories", trajectories, persistent=False)

    @property
    def rates(self) -> dict[str, float]:
        return {**super().rates, "latents": LATENT_RATE}

    def forward(
        self,
        scenes: Int[Tensor, " batch"],
        noise: Float[Tensor, "batch dim"],
        real: Float[Tensor, "batch views 3 height width"],
        cameras: Cameras,
    ) -> dict[str, Float[Tensor, ""]]:
        """Losses of a pass.

        Args:
            scenes: numbers of training scenes.
            noise: standard normal.
            real: images in [0, 1] of some of their cameras.
            cameras: these, batch shape `[B, M]`.
        """
        latents = self.latents(scenes)
        scene, pose = (latents + LATENT_NOISE * noise).split(self.parts.latent_dims, dim=1)
        height, width = real.shape[-2:]
        rgb = render_rays(self.renderer, self.generator(scene), cameras, height, width).rgb
        perceptual = self._perceptual[0]
        shown, true = (perceptual.features(2 * images.flatten(0, 1) - 1) for images in (rgb, real))
        return {
            "rgb_loss": F.l1_loss(rgb, real),
            "lpips_loss": perceptual.distance(shown, true).mean(),
            "pose_loss": POSE_MULT * F.mse_loss(self.cameras.trajectory(pose), self.trajectories[scenes]),
            "latent_loss": LATENT_MULT * latents.square().mean(),
        }

    def example_latents(self, count: int) -> Tensor:
        return self.latents.weight[:count].detach()

    def losses(self, wrapped: nn.Module, sampler: SceneSampler, share: BatchShare, device: torch.device) -> PassLosses:
        return AutodecoderLosses(wrapped, sampler, share, device, self.parts)


class AutodecoderLosses(PassLosses):
    """What a pass looks at: training scenes and some of their views."""

    def __init__(
        self, wrapped: nn.Module, sampler: SceneSampler, share: BatchShare, device: torch.device, parts: SceneParts
    ) -> None:
        super().__init__(wrapped, sampler, share, device)
        self.numbers = {scene_id: number for number, scene_id in enumerate(sampler.scene_ids)}
        self.dim = sum(parts.latent_dims)

    def __call__(self, number: int) -> dict[str, Tensor]:
        batch = self.sampler.batch(number)
        scenes = torch.tensor([self.numbers[scene_id] for scene_id in batch.scene_ids], device=self.device)
        noise = self.share.draws(number, self.device).normal(torch.empty(len(scenes), self.dim, device=self.device))
        views = batch.source.to(self.device)
        return self.wrapped(scenes, noise, views.images, views.cameras)
