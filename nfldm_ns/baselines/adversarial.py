"""The generative adversarial objective over scenes: rendered views against those of a collection."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor, nn

from nfldm_ns.autoencoder.renderers import SceneRenderer
from nfldm_ns.autoencoder.scene_autoencoder import RenderedViews
from nfldm_ns.autoencoder.scene_sampler import SceneSampler
from nfldm_ns.baselines.critics import Critic, enlarged, low_resolution
from nfldm_ns.baselines.objective import Objective, PassLosses, SceneParts
from nfldm_ns.baselines.patches import Patches
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.training.draws import BatchShare


class AdversarialObjective(Objective):
    """Scenes of random latents, seen by cameras of their own; one backward pass trains both sides.

    GSN's and GIRAFFE's scheme: latent to V, features of V at a camera, image, discriminator.

    Args:
        critic: what tells images apart.
        patch_size: (height, width) of GRAF's patches in pixels; None for whole images.
        dual: whether the critic also sees colours before the image decoder.
        patch_steps: in which the smallest patches shrink, see `smallest_scale`.
    """

    betas = (0.0, 0.99)

    def __init__(
        self,
        parts: SceneParts,
        critic: Critic,
        patch_size: tuple[int, int] | None = None,
        dual: bool = False,
        patch_steps: int = 0,
    ) -> None:
        super().__init__(parts)
        self.critic = critic
        self.patch_size, self.dual, self.patch_steps = patch_size, dual, patch_steps

    def forward(
        self,
        latents: Float[Tensor, "batch dim"],
        views: Int[Tensor, "batch views"],
        real: Float[Tensor, "images 3 height width"],
        number: int,
        step: int,
    ) -> dict[str, Float[Tensor, ""]]:
        """Losses of a pass.

        Args:
            latents: standard normal, of scene and cameras.
            views: which cameras of each scene.
            real: images in [0, 1], as many as there are views of all scenes.
            number: of the pass.
            step: of the training, which the pass is a part of.
        """
        scene, pose = latents.split(self.parts.latent_dims, dim=1)
        grid, cameras = self.generator(scene), self.cameras(pose, views)
        if self.patch_size is not None:
            sizes, time = (self.patch_size, self.renderer.image_size), (step, self.patch_steps)
            cameras = Patches.draw(*sizes, tuple(views.shape), *time).cameras(cameras)
            real = Patches.draw(*sizes, (len(real),), *time).cut(real)
        rendered = render_rays(self.renderer, grid, cameras, int(real.shape[-2]), int(real.shape[-1]))
        real = 2 * real - 1
        raw = None
        if self.dual:
            colours = rendered.maps.features[:, :, :3].flatten(0, 1)
            raw = (enlarged(colours, real.shape[-2:]), low_resolution(real, *colours.shape[-2:]))
        return self.critic(2 * rendered.rgb.flatten(0, 1) - 1, real, raw, number)

    def example_latents(self, count: int) -> Tensor:
        device = self.renderer.device
        drawn = torch.randn(count, sum(self.parts.latent_dims), generator=torch.Generator().manual_seed(0))
        return drawn.to(device)

    def losses(self, wrapped: nn.Module, sampler: SceneSampler, share: BatchShare, device: torch.device) -> PassLosses:
        return AdversarialLosses(wrapped, sampler, share, device, self.parts)


class AdversarialLosses(PassLosses):
    """What is drawn for a pass: latents and cameras for rendered views, and scenes for real ones."""

    def __init__(
        self,
        wrapped: nn.Module,
        sampler: SceneSampler,
        share: BatchShare,
        device: torch.device,
        parts: SceneParts,
    ) -> None:
        super().__init__(wrapped, sampler, share, device)
        self.dim, self.num_cameras = sum(parts.latent_dims), int(parts.cameras.config.num_cameras)

    def __call__(self, number: int) -> dict[str, Tensor]:
        real = self.sampler.batch(number).source.images.to(self.device)
        draws = self.share.draws(number, self.device)
        batch, count = real.shape[:2]
        latents = draws.normal(torch.empty(batch, self.dim, device=self.device))
        order = [draws.permutation(item, self.num_cameras) for item in range(batch)]
        views = torch.stack(order)[:, :count].to(self.device)
        return self.wrapped(latents, views, real.flatten(0, 1), number, self.share.place(number)[0])


def render_rays(renderer: SceneRenderer, grid: VoxelGrid, cameras: Cameras, height: int, width: int) -> RenderedViews:
    """Images of `height` x `width` pixels with one ray per cell of the stride, whatever the field of view."""
    config = renderer.config
    rows, columns = height // config.feature_stride, width // config.feature_stride
    maps = renderer.feature_maps(grid, cameras, rows, columns, config.num_feature_samples)
    return renderer.decode(maps, height, width)
