"""Trains baselines: what every one of them shares."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn

from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.scene_sampler import SceneCache, SceneSampler, SceneSamplerConfig
from nfldm_ns.baselines.assembly import BaselineSizes, make_objective, needs_perceptual
from nfldm_ns.baselines.autodecoder import AutodecoderObjective
from nfldm_ns.baselines.folder import PIPELINE_FOLDER
from nfldm_ns.baselines.latent_prior import train_latent_prior
from nfldm_ns.baselines.objective import Objective, PassLosses
from nfldm_ns.baselines.options import BaselineOptions
from nfldm_ns.baselines.pipeline import BaselinePipeline
from nfldm_ns.diffusion.pipeline import save_without_origin
from nfldm_ns.diffusion.training import make_scheduler
from nfldm_ns.pretrained.weights import load_lpips
from nfldm_ns.reports.galleries import image_grid
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.training.identity import public_config
from nfldm_ns.training.loop import ProgressCallback, keep_result, moving_averages, train
from nfldm_ns.training.run import RunFolder
from nfldm_ns.training.schedule import Schedule, batch_share, joint_batch_size, new_accelerator
from nfldm_ns.training.trackers import Pictures

MEMORY_GIB = 2.0  # for scenes that were read
PRIOR_FOLDER = "latent_prior"
NUM_PICTURES, VIEWS_SHOWN = 6, 3


@dataclass(frozen=True)
class BaselineTrainingConfig:
    """Training of a baseline."""

    schedule: Schedule = field(default_factory=Schedule)
    prior_schedule: Schedule = field(default_factory=Schedule)
    """Of the diffusion model of GAUDI's latents."""
    prior_share: float = 0.2
    """Of a time budget, for this model."""
    views_per_scene: int = 2
    """Images of each scene in a pass, as many real as rendered ones."""
    perceptual: Literal["vgg", "alex"] = "vgg"
    """The network of LPIPS whose features the projected critic sees, and of GAUDI's loss of images."""
    ema_decay: float = 0.999
    """Of the moving averages of the weights, which are what is kept; it rises to this value while training."""
    patch_steps: int = 0
    """Steps in which GRAF's smallest patches shrink from the whole image to its pixels; 0 for all scales at once."""

    def with_budgets(self) -> BaselineTrainingConfig:
        """With a time budget divided between an auto-decoder and the diffusion model after it."""
        whole = self.schedule.time_budget_s
        if whole is None:
            return self
        first, second = (1 - self.prior_share) * whole, self.prior_share * whole
        return replace(
            self,
            schedule=replace(self.schedule, time_budget_s=first),
            prior_schedule=replace(self.prior_schedule, time_budget_s=second),
        )


def train_baseline(
    collection: SceneCollection,
    output_dir: Path | str,
    options: BaselineOptions,
    sizes: BaselineSizes,
    config: BaselineTrainingConfig,
    *,
    on_progress: ProgressCallback | None = None,
) -> Path:
    """Trains a baseline on the training scenes of a collection, continuing an interrupted run.

    Args:
        output_dir: becomes a run folder (see `RunFolder`) with the averaged weights in `pipeline/`, a
            `BaselinePipeline`; the diffusion model of an auto-decoder has a run folder of its own in there.

    Returns:
        the folder of the pipeline.

    Raises:
        UserInputError: if choices do not go together or do not fit the collection, or weights are missing.
    """
    options.check()
    output_dir = Path(output_dir)
    config = config.with_budgets() if options.objective == "autodecoder" else config
    accelerator = new_accelerator(config.schedule, output_dir)
    perceptual = None
    if needs_perceptual(options):
        perceptual = PerceptualNetwork(load_lpips(config.perceptual)).to(accelerator.device)
    torch.manual_seed(config.schedule.seed)
    objective = make_objective(collection, options, sizes, perceptual, config.patch_steps).to(accelerator.device)
    identity = _identity(collection, options, objective, config, accelerator)
    ema = moving_averages(objective, config.ema_decay)
    sampler = _real_scenes(collection, config, accelerator)

    def make_losses(wrapped: nn.Module) -> PassLosses:
        return objective.losses(wrapped, sampler, batch_share(config.schedule, accelerator), accelerator.device)

    train(
        RunFolder(output_dir, identity, accelerator),
        objective,
        make_losses,
        config.schedule,
        accelerator,
        rates=objective.rates,
        betas=objective.betas,
        ema=ema,
        render=BaselinePictures(objective) if config.schedule.validation_steps else None,
        description="Auto-decoder" if options.objective == "autodecoder" else "Generator and discriminator",
        on_progress=on_progress,
    )
    ema.copy_to(objective.parameters())
    objective.cpu()
    parts: dict[str, Any] = {
        "scene_autoencoder": objective.renderer,
        "generator": objective.generator,
        "cameras": objective.cameras,
    }
    if isinstance(objective, AutodecoderObjective):
        latents = objective.latents.weight.detach()
        extra = (sizes.prior, config.prior_schedule, identity, config.ema_decay, on_progress)
        parts["prior"] = train_latent_prior(latents, output_dir / PRIOR_FOLDER, *extra)
        parts["scheduler"] = make_scheduler()
    pipeline = BaselinePipeline(**parts)

    def save(path: Path) -> None:
        save_without_origin(pipeline, path)

    keep_result(output_dir / PIPELINE_FOLDER, accelerator, save)
    return output_dir / PIPELINE_FOLDER


def _real_scenes(collection: SceneCollection, config: BaselineTrainingConfig, accelerator: Accelerator) -> SceneSampler:
    sampling = SceneSamplerConfig(
        scenes_per_batch=config.schedule.batch_size,
        num_source_views=config.views_per_scene,
        num_target_views=1,
        quarter_turns=False,
        seed=config.schedule.seed,
    )
    cache = SceneCache(collection, MEMORY_GIB)
    processes = (accelerator.num_processes, accelerator.process_index)
    return SceneSampler(cache, collection.split("train"), sampling, *processes)


def _identity(
    collection: SceneCollection,
    options: BaselineOptions,
    objective: Objective,
    config: BaselineTrainingConfig,
    accelerator: Accelerator,
) -> dict[str, Any]:
    models: dict[str, nn.Module] = {
        "generator": objective.generator,
        "renderer": objective.renderer,
        "cameras": objective.cameras,
    }
    return {
        "kind": "baseline",
        "collection": {"name": collection.name, "scenes": len(collection.splits["train"])},
        "options": asdict(options),
        "models": {name: public_config(model) for name, model in models.items()},
        "perceptual": config.perceptual,
        **({"patch_steps": config.patch_steps} if options.patches else {}),
        "views_per_scene": config.views_per_scene,
        "seed": config.schedule.seed,
        "batch_size": joint_batch_size(config.schedule, accelerator),
    }


class BaselinePictures:
    """A few views of a few scenes, of the same latents every time."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    @torch.no_grad()
    def __call__(self) -> Pictures:
        """One picture with a row per scene."""
        objective = self.objective
        latents = objective.example_latents(NUM_PICTURES)
        scene, pose = latents.split(objective.parts.latent_dims, dim=1)
        count = min(VIEWS_SHOWN, int(objective.cameras.config.num_cameras))
        views = torch.arange(count, device=latents.device).expand(len(latents), count)
        shown = objective.renderer.render(objective.generator(scene), objective.cameras(pose, views)).rgb
        columns = {f"view {i}": shown[:, i].clamp(0, 1).cpu() for i in range(count)}
        return {"baseline_samples": image_grid(columns)}
