"""Sizes and trainings of baselines.

| preset | for | V |
|---|---|---|
| tiny | two CPU cores, minutes | 12 x 32 x 32, 16 channels |
| rooms | two CPU cores, hours: the voxels of the model that comes with this package | 16 x 48 x 48, 16 channels |
| base | one GPU, hours, images of 128 pixels; has not been trained | 16 x 64 x 64, 32 channels |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nfldm_ns.baselines.assembly import BaselineSizes
from nfldm_ns.baselines.training import BaselineTrainingConfig
from nfldm_ns.training.schedule import Schedule

GanPresetName = Literal["tiny", "rooms", "base"]


@dataclass(frozen=True)
class GanPreset:
    """Sizes of a baseline's networks, and its training.

    Attributes:
        image_size: side of the images in pixels that it is meant for (what it is trained on comes from the data).
    """

    sizes: BaselineSizes
    training: BaselineTrainingConfig
    image_size: int = 64


GAN_PRESETS: dict[GanPresetName, GanPreset] = {
    "tiny": GanPreset(
        sizes=BaselineSizes(
            scene={"grid_shape": (12, 32, 32), "feature_channels": 16, "background_channels": 8},
            generators={
                "voxels": {"latent_dim": 64, "width": 64, "channels": (64, 48, 32)},
                "triplane": {"latent_dim": 64, "width": 64, "channels": (64, 48, 32), "plane_size": 32},
            },
            renderer={"num_samples": 40, "decoder_channels": (48, 24)},
            prior={"width": 128, "num_layers": 2},
            pose={"latent_dim": 16, "width": 64},
            levels=(0, 1, 2),
            stylegan2={"channel_base": 2048, "channel_max": 64},
        ),
        training=BaselineTrainingConfig(
            schedule=Schedule(max_steps=1000, batch_size=4, warmup_steps=20, checkpoint_every=200),
            prior_schedule=Schedule(max_steps=1000, batch_size=32, warmup_steps=20, checkpoint_every=200),
            perceptual="alex",
            patch_steps=500,
        ),
    ),
    "rooms": GanPreset(
        sizes=BaselineSizes(
            scene={"grid_shape": (16, 48, 48), "feature_channels": 16, "background_channels": 8},
            generators={
                "voxels": {"latent_dim": 128, "width": 128, "channels": (128, 96, 64, 48)},
                "triplane": {"latent_dim": 128, "width": 128, "channels": (128, 96, 64, 48), "plane_size": 48},
            },
            renderer={"num_samples": 64, "decoder_channels": (64, 32)},
            prior={"width": 256, "num_layers": 4},
            pose={"latent_dim": 32},
        ),
        training=BaselineTrainingConfig(
            schedule=Schedule(
                max_steps=40_000, batch_size=4, warmup_steps=100, log_every=50, checkpoint_every=500, weight_decay=0.0
            ),
            prior_schedule=Schedule(
                max_steps=40_000, batch_size=64, warmup_steps=100, log_every=50, checkpoint_every=2000
            ),
            ema_decay=0.9995,
            patch_steps=2000,
        ),
    ),
    "base": GanPreset(
        sizes=BaselineSizes(
            scene={"grid_shape": (16, 64, 64), "feature_channels": 32, "background_channels": 8},
            generators={
                "voxels": {"latent_dim": 256, "width": 256, "channels": (512, 256, 128, 96)},
                "triplane": {
                    "latent_dim": 256,
                    "width": 256,
                    "channels": (512, 256, 128, 96),
                    "plane_size": 128,
                    "plane_channels": 32,
                    "hidden": 64,
                },
            },
            renderer={"num_samples": 96, "num_feature_samples": None, "decoder_channels": (128, 64)},
            prior={"width": 512, "num_layers": 6},
            pose={"latent_dim": 64, "width": 256},
        ),
        training=BaselineTrainingConfig(
            schedule=Schedule(
                max_steps=200_000,
                batch_size=16,
                learning_rate=1e-3,
                warmup_steps=1000,
                log_every=100,
                checkpoint_every=2000,
                weight_decay=0.0,
                mixed_precision="bf16",
            ),
            prior_schedule=Schedule(
                max_steps=100_000, batch_size=256, warmup_steps=1000, log_every=100, checkpoint_every=5000
            ),
            ema_decay=0.9995,
            patch_steps=100_000,
        ),
        image_size=128,
    ),
}
