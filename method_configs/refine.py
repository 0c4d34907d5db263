"""nerfstudio method that refines one generated scene: `nfldm-refine`."""

from __future__ import annotations

import torch
from nerfstudio.configs.base_config import MachineConfig, ViewerConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.plugins.types import MethodSpecification

from nfldm_ns.plugin.refine import RefineTrainerConfig
from nfldm_ns.plugin.scene_ae_trainer import CosineScheduleConfig

METHOD = "nfldm-refine"
# Of the density before softplus, of features and background in their standard deviations, of the decoder's weights.
LEARNING_RATES = {"density": 0.005, "features": 0.02, "background": 0.02, "decoder": 1e-4}


def refine_trainer_config() -> RefineTrainerConfig:
    """The configuration of the method, for the device that is there."""
    return RefineTrainerConfig(
        method_name=METHOD,
        max_num_iterations=40,
        steps_per_save=20,
        steps_per_eval_batch=1_000_000,
        steps_per_eval_image=10,
        steps_per_eval_all_images=1_000_000,
        machine=MachineConfig(device_type="cuda" if torch.cuda.is_available() else "cpu"),
        optimizers={
            name: {
                "optimizer": AdamOptimizerConfig(lr=rate, eps=1e-15),
                "scheduler": CosineScheduleConfig(warmup_steps=10, final_factor=0.1),
            }
            for name, rate in LEARNING_RATES.items()
        },
        viewer=ViewerConfig(quit_on_train_completion=True),
        vis="viewer+tensorboard",
    )


nfldm_refine = MethodSpecification(
    config=refine_trainer_config(),
    description="NeuralField-LDM: refine or restyle one generated scene by score distillation.",
)
