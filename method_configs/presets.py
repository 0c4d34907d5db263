"""The sizes of all stages, by preset. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True)
class SceneAutoencoderPreset:
    """Stage 1.

    Attributes:
        network: sizes of `SceneAutoencoder` (box, depth range and image size come from the data).
        loss: weights of `StageOneLossConfig`.
        sampling: `SceneSamplerConfig`, what a training batch consists of.
        max_num_iterations: training steps.
        learning_rate: the highest of the cosine schedule.
        discriminator_learning_rate: constant; before it is lowered for a lazy penalty.
        warmup_steps: steps of rising learning rate.
        precision: "fp32" or "bf16", arithmetic of the networks in training.
        image_size: side of the images in pixels that it is meant for (what it is trained on comes from the data).
        num_source_views: of the scenes that it is meant for.
    """

    network: dict[str, Any]
    loss: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    max_num_iterations: int = 2000
    learning_rate: float = 1e-3
    discriminator_learning_rate: float = 1e-3
    warmup_steps: int = 50
    precision: Literal["fp32", "bf16"] = "fp32"
    image_size: int = 64
    num_source_views: int = 8


_ROOMS = SceneAutoencoderPreset(
    network={
        "grid_shape": (16, 48, 48),
        "feature_channels": 16,
        "num_depth_bins": 64,
        "num_samples": 64,
        "encoder_channels": (32, 64, 128),
        "decoder_channels": (64, 32),
    },
    loss={
        "lpips_views": 2,
        "adversarial_mult": 0.05,
        "adversarial_start": 400,
        "depth_mult": 0.1,
        "depth_norm": "l1",
        "opacity_mult": 1.0,
        "hidden_background_mult": 0.05,
    },
    sampling={"scenes_per_batch": 1, "num_target_views": 4},
    max_num_iterations=2000,
    learning_rate=1e-3,
)

SCENE_AUTOENCODER = {
    "tiny": SceneAutoencoderPreset(
        network={
            "grid_shape": (12, 32, 32),
            "feature_channels": 16,
            "splatting": "nearest",
            "num_depth_bins": 32,
            "num_samples": 40,
        },
        loss={
            "lpips_views": 2,
            "rgb_mult": 2.0,
            "adversarial_mult": 0.05,
            "adversarial_start": 400,
            "depth_mult": 0.1,
            "depth_norm": "l1",
            "opacity_mult": 1.0,
        },
        sampling={"scenes_per_batch": 1, "num_target_views": 4},
        max_num_iterations=1000,
        learning_rate=2e-3,
    ),
    "small": SceneAutoencoderPreset(
        network={
            "grid_shape": (32, 96, 96),
            "feature_channels": 16,
            "num_depth_bins": 64,
            "num_samples": 80,
            "encoder_channels": (32, 64, 128),
            "decoder_channels": (64, 32),
        },
        loss={
            "lpips_views": 2,
            "adversarial_mult": 0.05,
            "adversarial_start": 2500,
            "depth_mult": 0.1,
            "depth_norm": "l1",
            "opacity_mult": 1.0,
        },
        sampling={
            "scenes_per_batch": 1,
            "num_target_views": 4,
            "view_dropout": 0.3,
            "missing_depth": 0.15,
            "sparse_depth": 0.15,
        },
        max_num_iterations=5000,
        learning_rate=1.5e-3,
    ),
    "rooms": _ROOMS,
    "rooms128": replace(
        _ROOMS,
        # As many rays as for 64 pixels, and one level more behind them.
        network={**_ROOMS.network, "feature_stride": 4, "decoder_upsampling_channels": 32},
        max_num_iterations=4000,
        image_size=128,
    ),
    "base": SceneAutoencoderPreset(
        network={
            "grid_shape": (16, 64, 64),
            "feature_channels": 32,
            "num_depth_bins": 64,
            "num_samples": 96,
            "num_feature_samples": None,
            "encoder_channels": (96, 192),
            "decoder_channels": (128, 64),
        },
        loss={
            "adversarial_mult": 0.05,
            "adversarial_start": 10_000,
            "discriminator": "stylegan2",
            "discriminator_channel_base": 8192,
            "discriminator_channel_max": 256,
            "r1_gamma": 0.2,
            "augment": ("color", "translation", "cutout"),
            "opacity_mult": 1.0,
        },
        sampling={
            "scenes_per_batch": 4,
            "num_target_views": 4,
            "view_dropout": 0.3,
            "missing_depth": 0.2,
            "sparse_depth": 0.2,
        },
        max_num_iterations=100_000,
        learning_rate=4e-4,
        discriminator_learning_rate=2e-3,
        warmup_steps=1000,
        image_size=128,
    ),
    "paper": SceneAutoencoderPreset(
        network={
            "grid_shape": (32, 128, 128),
            "feature_channels": 32,
            "num_depth_bins": 64,
            "num_samples": 128,
            "num_feature_samples": None,
            "encoder_channels": (128, 256),
            "encoder_blocks": 2,
            "decoder_channels": (256, 128),
            "decoder_blocks": 2,
        },
        loss={
            "adversarial_mult": 0.05,
            "adversarial_start": 20_000,
            "discriminator": "stylegan2",
            "r1_gamma": 0.5,
            "augment": ("color", "translation", "cutout"),
            "opacity_mult": 1.0,
        },
        sampling={
            "scenes_per_batch": 1,
            "num_target_views": 6,
            "view_dropout": 0.3,
            "missing_depth": 0.2,
            "sparse_depth": 0.2,
        },
        max_num_iterations=400_000,
        learning_rate=2e-4,
        discriminator_learning_rate=2e-3,
        warmup_steps=1000,
        image_size=128,
        num_source_views=6,
    ),
}

_FAR = {"depth_spacing": "inverse", "background_channels": 16}
"""Of scenes whose surfaces are from two to sixty metres away, under a sky."""

SCENE_AUTOENCODER |= {
    "streets-tiny": replace(
        SCENE_AUTOENCODER["tiny"],
        network={
            **SCENE_AUTOENCODER["tiny"].network,
            **_FAR,
            "grid_shape": (12, 48, 48),
            "splatting": "filled",
            "num_depth_bins": 48,
            "num_samples": 64,
        },
        # An error in metres is larger where all is farther away.
        loss={**SCENE_AUTOENCODER["tiny"].loss, "depth_mult": 0.02, "hidden_background_mult": 0.05},
        num_source_views=6,
    ),
    "streets": replace(
        SCENE_AUTOENCODER["base"],
        network={**SCENE_AUTOENCODER["base"].network, **_FAR, "grid_shape": (16, 80, 80), "num_samples": 128},
        loss={**SCENE_AUTOENCODER["base"].loss, "depth_mult": 0.02, "depth_norm": "l1", "hidden_background_mult": 0.05},
        num_source_views=6,
    ),
    "streets-paper": replace(
        SCENE_AUTOENCODER["paper"],
        network={**SCENE_AUTOENCODER["paper"].network, **_FAR, "num_depth_bins": 96, "num_samples": 192},
    ),
}
