"""nerfstudio methods of stage 1: `nfldm-scene-ae`, with `-tiny`, `-small`, `-rooms`, `-rooms128`, `-paper`, and
`-streets-tiny`, `-streets`, `-streets-paper`.
"""

from __future__ import annotations

import torch
from nerfstudio.configs.base_config import MachineConfig, ViewerConfig
from nerfstudio.plugins.types import MethodSpecification

from nfldm_ns.autoencoder.losses import StageOneLossConfig
from nfldm_ns.autoencoder.scene_sampler import SceneSamplerConfig
from nfldm_ns.dataparsers.scene_collection import SceneCollectionDataParserConfig
from nfldm_ns.method_configs.presets import SCENE_AUTOENCODER, SceneAutoencoderPreset
from nfldm_ns.plugin.scene_ae_datamanager import SceneDataManagerConfig
from nfldm_ns.plugin.scene_ae_model import SceneAutoencoderModelConfig, SceneNetworkConfig
from nfldm_ns.plugin.scene_ae_pipeline import SceneAutoencoderPipelineConfig
from nfldm_ns.plugin.scene_ae_trainer import (
    AdamWConfig,
    CosineScheduleConfig,
    SceneAutoencoderTrainerConfig,
)


def scene_autoencoder_config(method_name: str, preset: SceneAutoencoderPreset) -> SceneAutoencoderTrainerConfig:
    """A trainer's configuration of stage 1 for the device that is there."""
    loss = StageOneLossConfig(**preset.loss)
    return SceneAutoencoderTrainerConfig(
        method_name=method_name,
        max_num_iterations=preset.max_num_iterations,
        steps_per_save=500,
        steps_per_eval_batch=100,
        steps_per_eval_image=250,
        steps_per_eval_all_images=10_000,
        machine=MachineConfig(device_type="cuda" if torch.cuda.is_available() else "cpu"),
        pipeline=SceneAutoencoderPipelineConfig(
            datamanager=SceneDataManagerConfig(
                dataparser=SceneCollectionDataParserConfig(), sampling=SceneSamplerConfig(**preset.sampling)
            ),
            model=SceneAutoencoderModelConfig(
                network=SceneNetworkConfig(**preset.network),
                loss=loss,
                precision=preset.precision,
            ),
        ),
        optimizers={
            "autoencoder": {
                "optimizer": AdamWConfig(lr=preset.learning_rate, max_norm=1.0),
                "scheduler": CosineScheduleConfig(warmup_steps=preset.warmup_steps),
            },
            "discriminator": {
                "optimizer": discriminator_optimizer(loss, preset.discriminator_learning_rate),
                "scheduler": None,
            },
        },
        viewer=ViewerConfig(quit_on_train_completion=True),
        vis="viewer+tensorboard",
    )


def discriminator_optimizer(loss: StageOneLossConfig, learning_rate: float) -> AdamWConfig:
    """What suits the kind of discriminator: for StyleGAN2's, Adam without momentum and weight decay.

    With a gradient penalty in every k-th step, the learning rate is multiplied by c = k / (k + 1) and the decay of the
    squares raised to the power of c (Karras et al., CVPR 2020, appendix B).
    """
    if loss.discriminator == "projected":
        return AdamWConfig(lr=learning_rate, betas=(0.5, 0.99))
    share = loss.r1_every / (loss.r1_every + 1) if loss.r1_gamma else 1.0
    return AdamWConfig(lr=learning_rate * share, betas=(0.0, 0.99**share), weight_decay=0.0)


nfldm_scene_ae_tiny = MethodSpecification(
    config=scene_autoencoder_config("nfldm-scene-ae-tiny", SCENE_AUTOENCODER["tiny"]),
    description="NeuralField-LDM stage 1: scene auto-encoder, minutes on a CPU.",
)

nfldm_scene_ae_small = MethodSpecification(
    config=scene_autoencoder_config("nfldm-scene-ae-small", SCENE_AUTOENCODER["small"]),
    description="NeuralField-LDM stage 1: scene auto-encoder, an hour on a CPU.",
)

nfldm_scene_ae_rooms = MethodSpecification(
    config=scene_autoencoder_config("nfldm-scene-ae-rooms", SCENE_AUTOENCODER["rooms"]),
    description="NeuralField-LDM stage 1 of the model that comes with this package.",
)

nfldm_scene_ae_rooms128 = MethodSpecification(
    config=scene_autoencoder_config("nfldm-scene-ae-rooms128", SCENE_AUTOENCODER["rooms128"]),
    description="NeuralField-LDM stage 1 of that size for images of 128 x 128 pixels.",
)

nfldm_scene_ae = MethodSpecification(
    config=scene_autoencoder_config("nfldm-scene-ae", SCENE_AUTOENCODER["base"]),
    description="NeuralField-LDM stage 1: scene auto-encoder, one GPU.",
)

nfldm_scene_ae_paper = MethodSpecification(
    config=scene_autoencoder_config("nfldm-scene-ae-paper", SCENE_AUTOENCODER["paper"]),
    description="NeuralField-LDM stage 1: scene auto-encoder at the paper's size, several GPUs.",
)

nfldm_scene_ae_streets_tiny = MethodSpecification(
    config=scene_autoencoder_config("nfldm-scene-ae-streets-tiny", SCENE_AUTOENCODER["streets-tiny"]),
    description="NeuralField-LDM stage 1 of streets (80 x 80 x 16 m), minutes on a CPU.",
)

nfldm_scene_ae_streets = MethodSpecification(
    config=scene_autoencoder_config("nfldm-scene-ae-streets", SCENE_AUTOENCODER["streets"]),
    description="NeuralField-LDM stage 1 of streets (80 x 80 x 16 m), one GPU.",
)

nfldm_scene_ae_streets_paper = MethodSpecification(
    config=scene_autoencoder_config("nfldm-scene-ae-streets-paper", SCENE_AUTOENCODER["streets-paper"]),
    description="NeuralField-LDM stage 1 of streets (80 x 80 x 16 m) at the paper's size, several GPUs.",
)
