"""Models of all stages at the smallest sizes, untrained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.diffusion.denoisers import CoarseDenoiser, FineDenoiser, GlobalDenoiser
from nfldm_ns.diffusion.flow import make_flow_scheduler
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, assemble_pipeline
from nfldm_ns.diffusion.training import make_scheduler
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder
from nfldm_ns.latents.voxel_store import VoxelStore, encode_collection
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from tests.synthetic import AABB, BEV_CLASSES, FAR, NEAR, make_box_room_collection

BACKGROUND_CHANNELS = 2
LATENT_SIZES = {
    "global_dim": 8,
    "coarse_channels": 4,
    "coarse_height": 2,
    "fine_channels": 4,
    "coarse_codes": 16,
    "fine_codes": 16,
    "coarse_code_dim": 2,
    "encoder_channels": (8, 8, 16),
    "fine_encoder_channels": 8,
    "decoder_channels": (16, 8, 8),
    "fusion_channels": 8,
}
_UNET = {"channels": (8, 8), "attention": (False, True), "layers": 1, "context_dim": 8, "head_dim": 8}
DENOISER_SIZES = {
    "global": {"width": 16, "num_layers": 2},
    "coarse": _UNET,
    "fine": {**_UNET, "coarse_channels": 4},
}


def small_scene_autoencoder(seed: int = 0) -> SceneAutoencoder:
    """Stage 1 for the box rooms of `tests.synthetic` at 32 x 32 pixels."""
    torch.manual_seed(seed)
    return SceneAutoencoder(
        grid_shape=(4, 16, 16),
        feature_channels=4,
        aabb=AABB,
        near=NEAR,
        far=FAR,
        image_size=(32, 32),
        focal_length=16.0,
        num_depth_bins=12,
        background_channels=BACKGROUND_CHANNELS,
        num_samples=16,
        encoder_channels=(8, 8),
        decoder_channels=(8, 8),
    ).eval()


def encoded_rooms(root: Path, scene_autoencoder: SceneAutoencoder) -> VoxelStore:
    """Three box rooms for training and one held out, and their voxels."""
    rooms = make_box_room_collection(root / "rooms", num_train=3, num_test=1)
    return encode_collection(rooms, scene_autoencoder, root / "voxels")


def small_latent_autoencoder(seed: int = 0, **changes) -> LatentAutoencoder:
    """Stage 2 for its voxels."""
    torch.manual_seed(seed)
    voxels = {"grid_shape": (4, 16, 16), "feature_channels": 4, "aabb": AABB}
    sizes = {**voxels, "background_channels": BACKGROUND_CHANNELS, **LATENT_SIZES, **changes}
    return LatentAutoencoder(**sizes).eval()


def small_pipeline(
    seed: int = 0, maps: Mapping[str, Any] | None = None, flow: bool = False, **changes
) -> NFLDMPipeline:
    """All stages with random weights, two cameras per trajectory; `changes` are of stage 2.

    Args:
        maps: what the denoisers know of semantic maps, by default nothing; the classes are those of `tests.synthetic`.
        flow: whether the denoisers are those of a flow.
    """
    classes = BEV_CLASSES if maps else ()
    maps = {**(maps or {}), "flow": flow}
    latent_autoencoder = small_latent_autoencoder(seed, **changes)
    global_dim = latent_autoencoder.global_dim
    shapes = {"coarse_shape": latent_autoencoder.coarse_shape, "code_dim": global_dim + 2 * 5}
    denoisers = (
        GlobalDenoiser(global_dim, 2, (16.0, 16.0, 16.0, 16.0), (32, 32), **DENOISER_SIZES["global"], **maps),
        CoarseDenoiser(**shapes, **DENOISER_SIZES["coarse"], **maps),
        FineDenoiser(latent_autoencoder.fine_shape, **shapes, **DENOISER_SIZES["fine"], **maps)
        if latent_autoencoder.config.use_fine
        else None,
    )
    stages = (small_scene_autoencoder(seed), latent_autoencoder, *denoisers)
    return assemble_pipeline(
        *stages, scheduler=make_flow_scheduler() if flow else make_scheduler(), bev_classes=classes
    )


def random_grid(
    batch: int = 2,
    seed: int = 0,
    shape: tuple[int, int, int] = (4, 16, 16),
    channels: int = 4,
    background_channels: int = BACKGROUND_CHANNELS,
) -> VoxelGrid:
    """Voxels of which a third are occupied, before a random background."""
    generator = torch.Generator().manual_seed(seed)
    density = (3 * torch.randn(batch, 1, *shape, generator=generator) - 1).clamp(min=0)
    features = torch.randn(batch, channels, *shape, generator=generator)
    background = torch.randn(batch, background_channels, 4, generator=generator)
    return VoxelGrid(density, features, torch.tensor(AABB), background)


class MeanColor(nn.Module):
    """Stands for the Inception network: two moments of each channel, on a grid of cells."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        cells = nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)
        return torch.cat([cells, images.std(dim=(-2, -1))], dim=-1)
