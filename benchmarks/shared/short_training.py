"""The training that the comparisons of stage 1 share: on given batches, with the preset's schedule shortened."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from nerfstudio.engine.optimizers import OptimizerConfig
from rich.progress import track
from torch import Tensor, nn

from nfldm_ns.autoencoder.losses import StageOneLossConfig, make_discriminator, stage_one_losses
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.autoencoder.scene_sampler import SceneSampler
from nfldm_ns.plugin.scene_ae_model import SceneNetworkConfig
from nfldm_ns.plugin.scene_ae_trainer import CosineScheduleConfig
from nfldm_ns.scenes.collection import SceneCollection


def make_autoencoder(collection: SceneCollection, network: SceneNetworkConfig) -> SceneAutoencoder:
    """An untrained auto-encoder for the images and the box of a collection."""
    focal = collection.load_scene(collection.split("train")[0]).source.cameras.fx
    width, height = collection.image_size
    return SceneAutoencoder(
        **asdict(network),
        aabb=tuple(map(tuple, collection.aabb.tolist())),
        near=collection.near,
        far=collection.far,
        image_size=(height, width),
        focal_length=float(focal.min()),
        max_focal_length=float(focal.max()),
    ).pack_channels_last()


@dataclass
class ShortTraining:
    """Trains an auto-encoder, or a part of it, for few steps; equal seeds see equal batches.

    Attributes:
        sampler: of the batches.
        perceptual: of the losses; its device is where the training runs.
        loss: weights of the losses, which also say whether there is a discriminator.
        optimizer, discriminator_optimizer: their settings.
        steps: of the training.
        warmup_steps: steps of rising learning rate.
        adversarial_start: first step with a discriminator.
        seed: of the discriminator's weights and of everything random in the steps.
    """

    sampler: SceneSampler
    perceptual: PerceptualNetwork
    loss: StageOneLossConfig
    optimizer: OptimizerConfig
    discriminator_optimizer: OptimizerConfig
    steps: int
    warmup_steps: int = 50
    adversarial_start: int = 0
    seed: int = 0

    def run(self, model: SceneAutoencoder, trained: nn.Module | None = None) -> dict[str, Any]:
        """Trains `trained`, a part of `model`, or all of it.

        Returns:
            `seconds`, the number of the model's `parameters`, and `losses`, means over the last tenth of the steps.
        """
        trained = trained or model
        model.requires_grad_(False)
        trained.requires_grad_(True)
        parts: dict[str, tuple[nn.Module, OptimizerConfig]] = {"autoencoder": (trained, self.optimizer)}
        discriminator = make_discriminator(self.loss, model.image_size)
        if discriminator is not None:
            parts["discriminator"] = (discriminator.to(model.device), self.discriminator_optimizer)
        optimisers = [(module, config, config.setup(list(module.parameters()))) for module, config in parts.values()]
        schedule = CosineScheduleConfig(warmup_steps=self.warmup_steps, max_steps=self.steps).setup()
        schedule = schedule.get_scheduler(optimisers[0][2], self.optimizer.lr)
        last: list[dict[str, float]] = []
        begun = time.perf_counter()
        for step in track(range(self.steps), "Training", transient=True):
            losses = self._losses(model, discriminator if step >= self.adversarial_start else None, step)
            torch.stack(list(losses.values())).sum().backward()
            for module, config, optimiser in optimisers:
                if config.max_norm:
                    nn.utils.clip_grad_norm_(module.parameters(), config.max_norm)
                optimiser.step()
                optimiser.zero_grad()
            schedule.step()
            if step >= self.steps - max(1, self.steps // 10):
                last.append({name: float(value.detach()) for name, value in losses.items()})
        return {
            "seconds": round(time.perf_counter() - begun, 1),
            "parameters": sum(p.numel() for p in model.parameters()),
            "losses": {name: float(np.mean([losses[name] for losses in last if name in losses])) for name in last[-1]},
        }

    def _losses(self, model: SceneAutoencoder, discriminator: nn.Module | None, step: int) -> dict[str, Tensor]:
        torch.manual_seed(int(np.random.SeedSequence((self.seed, step, 0)).generate_state(1)[0]))
        batch = self.sampler.batch(step).to(model.device)
        voxels = model.encode(batch.source)
        rendered = model.render(voxels, batch.target.cameras)
        return stage_one_losses(self.loss, rendered, batch.target, voxels, self.perceptual, discriminator, step)
