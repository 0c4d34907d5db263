"""Baselines at the smallest sizes, for the box rooms of `tests.synthetic`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nfldm_ns.autoencoder.renderers import RENDERERS, SceneRenderer
from nfldm_ns.baselines.assembly import BaselineSizes
from nfldm_ns.baselines.training import BaselineTrainingConfig
from nfldm_ns.training.schedule import Schedule
from tests.synthetic import AABB, FAR, NEAR

SCENE = {"grid_shape": (4, 16, 16), "feature_channels": 4, "background_channels": 2}
RENDERER = {"num_samples": 8, "encoder_channels": (8, 8), "decoder_channels": (8, 8)}
SIZES = BaselineSizes(
    scene=SCENE,
    generators={
        "voxels": {"latent_dim": 8, "width": 8, "channels": (8, 8)},
        "triplane": {"latent_dim": 8, "width": 8, "channels": (8, 8), "plane_size": 8, "plane_channels": 4},
    },
    renderer=RENDERER,
    prior={"width": 16, "num_layers": 2},
    pose={"latent_dim": 4, "width": 8},
    levels=(0, 1),
    stylegan2={"channel_base": 64, "channel_max": 8},
)
SCHEDULE = Schedule(max_steps=4, batch_size=2, warmup_steps=1, log_every=1, checkpoint_every=2, report_to="none")
TRAINING = BaselineTrainingConfig(schedule=SCHEDULE, prior_schedule=SCHEDULE, perceptual="alex")


def small_renderer(rendering: str = "features", seed: int = 0, **changes: Any) -> SceneRenderer:
    """An untrained renderer of 32 x 32 pixels."""
    torch.manual_seed(seed)
    shared = {"aabb": AABB, "near": NEAR, "far": FAR, "image_size": (32, 32), "focal_length": 16.0}
    channels = {"feature_channels": 3} if rendering == "colours" else {}
    return RENDERERS[rendering](**{**SCENE, **RENDERER, **shared, **channels, **changes}).eval()


class MeanLevels(nn.Module):
    """Stands for the network of LPIPS: means of the colours over ever larger squares."""

    channels = (3, 3, 3)

    def features(self, images: Tensor, num_levels: int | None = None) -> list[Tensor]:
        return [nn.functional.avg_pool2d(images, 2**level) for level in range(num_levels or len(self.channels))]

    def distance(self, first: list[Tensor], second: list[Tensor]) -> Tensor:
        return torch.stack([(a - b).square().mean((1, 2, 3)) for a, b in zip(first, second, strict=True)]).sum(0)
