"""Sizes and trainings of stages 2 and 3, and of the last one of the image decoder, by preset.

| preset | for | latents |
|---|---|---|
| tiny | two CPU cores, minutes | c 12 x 4 x 8 x 8, f 16 x 32 x 32 |
| rooms | the model that comes with this package: two CPU cores, hours | c 12 x 4 x 12 x 12, f 20 x 48 x 48 |
| rooms128 | the same for images of 128 x 128 pixels: an upsampler behind the image decoder of rooms | as rooms |
| streets-tiny | streets of 80 x 80 x 16 m on two CPU cores: voxels of 1.7 m | c 12 x 4 x 12 x 12, f 16 x 48 x 48 |
| streets | streets on one GPU: voxels of 1 m | c 8 x 8 x 20 x 20, f 8 x 80 x 80 |
| streets-paper | streets at the paper's sizes: voxels of 0.6 m | as paper |
| base | one GPU, hours | c 8 x 8 x 16 x 16, f 8 x 64 x 64 |
| paper | the paper's sizes | c 4 x 8 x 32 x 32, f 4 x 128 x 128 |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from nfldm_ns.diffusion.decoder_examples import ExampleConfig
from nfldm_ns.diffusion.decoder_training import DecoderLossConfig, DecoderTrainingConfig
from nfldm_ns.diffusion.training import DiffusionTrainingConfig, Stage
from nfldm_ns.latents.training import LatentLossConfig, LatentTrainingConfig
from nfldm_ns.training.schedule import Schedule

PresetName = Literal["tiny", "rooms", "rooms128", "base", "paper", "streets-tiny", "streets", "streets-paper"]


@dataclass(frozen=True)
class LatentPreset:
    """A size of stage 2: arguments of `LatentAutoencoder`, and its training."""

    model: dict[str, Any]
    training: LatentTrainingConfig


@dataclass(frozen=True)
class DiffusionPreset:
    """Sizes of the three denoisers, and their trainings."""

    models: dict[Stage, dict[str, Any]]
    training: dict[Stage, DiffusionTrainingConfig]
    quarter_turns: bool = True
    temperatures: tuple[float, float, float] = (1.0, 1.0, 1.0)


LATENT_PRESETS: dict[str, LatentPreset] = {
    "tiny": LatentPreset(
        model={"coarse_channels": 12},
        training=LatentTrainingConfig(
            schedule=Schedule(max_steps=250, batch_size=2, learning_rate=1e-3),
            losses=LatentLossConfig(lpips_mult=1.0),
            num_views=2,
            fine_dropout=0.0,
        ),
    ),
    "rooms": LatentPreset(
        model={
            "coarse_channels": 12,
            "fine_channels": 20,
            "encoder_channels": (32, 48, 64),
            "fine_encoder_channels": 32,
            "decoder_channels": (80, 64, 48),
            "fusion_channels": 48,
        },
        training=LatentTrainingConfig(
            schedule=Schedule(
                max_steps=2400, batch_size=2, learning_rate=1e-3, mixed_precision="bf16", checkpoint_every=200
            ),
            losses=LatentLossConfig(lpips_mult=1.0),
            num_views=2,
            fine_dropout=0.0,
        ),
    ),
    "base": LatentPreset(
        model={
            "coarse_channels": 8,
            "coarse_height": 8,
            "fine_channels": 8,
            "encoder_channels": (128, 192, 256),
            "encoder_blocks": 2,
            "fine_encoder_channels": 128,
            "fine_encoder_blocks": 2,
            "decoder_channels": (256, 256, 256),
            "decoder_blocks": 2,
            "fusion_channels": 256,
            "fusion_blocks": 2,
        },
        training=LatentTrainingConfig(
            schedule=Schedule(
                max_steps=100_000,
                batch_size=8,
                learning_rate=3e-4,
                warmup_steps=500,
                mixed_precision="bf16",
                log_every=50,
                checkpoint_every=2000,
                validation_steps=2000,
            ),
            losses=LatentLossConfig(lpips_mult=1.0),
            num_views=6,
        ),
    ),
    "paper": LatentPreset(
        model={
            "coarse_channels": 4,
            "coarse_height": 8,
            "fine_channels": 4,
            "coarse_code_dim": 4,
            "fine_code_dim": 4,
            "encoder_channels": (256, 512, 512),
            "encoder_blocks": 2,
            "fine_encoder_channels": 256,
            "fine_encoder_blocks": 2,
            "decoder_channels": (512, 512, 512),
            "decoder_blocks": 3,
            "fusion_blocks": 0,
            "linear_paths": False,
        },
        training=LatentTrainingConfig(
            schedule=Schedule(
                max_steps=300_000,
                batch_size=4,
                learning_rate=2e-4,
                warmup_steps=1000,
                mixed_precision="bf16",
                log_every=50,
                checkpoint_every=5000,
                validation_steps=5000,
            ),
            num_views=6,
            fine_dropout=0.0,
        ),
    ),
}

LATENT_PRESETS["rooms128"] = LATENT_PRESETS["rooms"]


def _on_gpu(max_steps: int, batch_size: int, learning_rate: float = 1e-4) -> DiffusionTrainingConfig:
    return DiffusionTrainingConfig(
        schedule=Schedule(
            max_steps=max_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_steps=1000,
            mixed_precision="bf16",
            log_every=100,
            checkpoint_every=5000,
            validation_steps=5000,
        ),
        ema_decay=0.9999,
    )


def _on_cpu(max_steps: int, batch_size: int) -> DiffusionTrainingConfig:
    return DiffusionTrainingConfig(
        schedule=Schedule(
            max_steps=max_steps,
            batch_size=batch_size,
            learning_rate=1e-3,
            mixed_precision="bf16",
            checkpoint_every=500,
        ),
        condition_dropout=0.1,
    )


DIFFUSION_PRESETS: dict[str, DiffusionPreset] = {
    "tiny": DiffusionPreset(
        models={
            "global": {"width": 256, "num_layers": 4},
            "coarse": {"channels": (96, 160), "attention": (False, True), "layers": 1},
            "fine": {"channels": (48, 64, 96), "attention": (False, False, True), "layers": 1},
        },
        training={
            "global": DiffusionTrainingConfig(schedule=Schedule(max_steps=2000, batch_size=64, learning_rate=1e-3)),
            "coarse": DiffusionTrainingConfig(schedule=Schedule(max_steps=1200, batch_size=16, learning_rate=1e-3)),
            "fine": DiffusionTrainingConfig(schedule=Schedule(max_steps=800, batch_size=8, learning_rate=1e-3)),
        },
        quarter_turns=False,  # four times as much to learn, without a longer training
        temperatures=(1.0, 0.8, 0.5),
    ),
    "rooms": DiffusionPreset(
        models={
            "global": {"width": 160, "num_layers": 4},
            "coarse": {"channels": (80, 96), "attention": (False, True), "layers": 1, "context_dim": 96},
            "fine": {"channels": (48, 64, 80), "attention": (False, False, True), "layers": 1, "context_dim": 96},
        },
        training={
            "global": DiffusionTrainingConfig(schedule=Schedule(max_steps=10_000, batch_size=64, learning_rate=1e-3)),
            "coarse": _on_cpu(10_000, 16),
            "fine": _on_cpu(5000, 8),
        },
    ),
    "base": DiffusionPreset(
        models={
            "global": {"width": 1024, "num_layers": 8},
            "coarse": {"channels": (192, 384), "attention": (True, True), "layers": 2, "context_dim": 256},
            "fine": {
                "channels": (128, 256, 384, 512),
                "attention": (False, False, True, True),
                "layers": 2,
                "context_dim": 256,
            },
        },
        training={"global": _on_gpu(100_000, 256), "coarse": _on_gpu(200_000, 64), "fine": _on_gpu(200_000, 32)},
    ),
    "paper": DiffusionPreset(
        models={
            "global": {"width": 2048, "num_layers": 12},
            "coarse": {
                "channels": (256, 512, 512),
                "attention": (True, True, True),
                "layers": 2,
                "context_dim": 512,
                "head_dim": 64,
            },
            "fine": {
                "channels": (128, 256, 512, 512),
                "attention": (False, False, True, True),
                "layers": 2,
                "context_dim": 512,
                "head_dim": 64,
                "coarse_channels": 64,
            },
        },
        training={"global": _on_gpu(500_000, 256), "coarse": _on_gpu(500_000, 32), "fine": _on_gpu(500_000, 16)},
        quarter_turns=False,
    ),
}
DIFFUSION_PRESETS["rooms128"] = DIFFUSION_PRESETS["rooms"]


def _decoder(
    max_steps: int, batch_size: int, num_scenes: int, learning_rate: float, *, on_gpu: bool = False
) -> DecoderTrainingConfig:
    """Without weight decay, which would pull a trained decoder towards zero."""
    schedule = Schedule(
        max_steps=max_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=0.0,
        mixed_precision="bf16" if on_gpu else None,
        log_every=50 if on_gpu else 10,
        checkpoint_every=1000 if on_gpu else 100,
        validation_steps=1000 if on_gpu else 0,
    )
    return DecoderTrainingConfig(schedule=schedule, examples=ExampleConfig(num_scenes=num_scenes))


DECODER_PRESETS: dict[str, DecoderTrainingConfig] = {
    "tiny": _decoder(300, 2, 64, 2e-4),
    "rooms": _decoder(1000, 2, 256, 2e-4),
    "base": _decoder(10_000, 8, 2000, 1e-4, on_gpu=True),
    "paper": _decoder(20_000, 8, 4000, 1e-4, on_gpu=True),
}
DECODER_PRESETS["rooms128"] = replace(
    DECODER_PRESETS["rooms"],
    losses=DecoderLossConfig(adversarial_mult=0.4, window=64),
    num_views=1,
    upsampling_channels=32,
    upsampling_detail=0.6,  # best by FID and KID of 0, 0.6 and 1
)

STREETS = {"streets-tiny": "tiny", "streets": "base", "streets-paper": "paper"}
"""Presets of streets, and those whose stages 2 and 3 they share; their stage 1 tells their background from others'."""
for _name, _base in STREETS.items():
    LATENT_PRESETS[_name] = LATENT_PRESETS[_base]
    DIFFUSION_PRESETS[_name] = DIFFUSION_PRESETS[_base]
    DECODER_PRESETS[_name] = DECODER_PRESETS[_base]
