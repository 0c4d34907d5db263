"""Trains the denoisers of g, c and f (paper, Sec. 3.3); each is a run by itself, on clean conditions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from nfldm_ns.autoencoder.checkpoints import WEIGHTS, load_exactly, read_safetensors
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.diffusion.denoisers import CoarseDenoiser, FineDenoiser, GlobalDenoiser
from nfldm_ns.diffusion.latent_memory import LatentMemory
from nfldm_ns.diffusion.pipeline import assemble_pipeline
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder
from nfldm_ns.latents.training import public_config
from nfldm_ns.latents.voxel_store import model_hash
from nfldm_ns.scenes.collection import read_json
from nfldm_ns.scenes.writing import atomic_path
from nfldm_ns.training import ProgressCallback, RunFolder, Schedule, batch_indices, train

Stage = Literal["global", "coarse", "fine"]
STAGES: tuple[Stage, ...] = ("global", "coarse", "fine")
DENOISER_FOLDER = "denoiser"
DENOISERS = {"global": GlobalDenoiser, "coarse": CoarseDenoiser, "fine": FineDenoiser}
Denoiser = GlobalDenoiser | CoarseDenoiser | FineDenoiser


@dataclass
class DiffusionTrainingConfig:
    """Training of one denoiser."""

    schedule: Schedule = field(default_factory=Schedule)
    prediction_type: Literal["v_prediction", "epsilon", "sample"] = "v_prediction"
    code_noise: float = 0.1
    """Standard deviation of noise on the scene code that conditions psi_c and psi_f: a sampled one is never exact."""
    coarse_noise: float = 0.1
    """Standard deviation of noise on the normalised c that conditions psi_f."""
    ema_decay: float = 0.999
    """Of the moving averages of the weights, which are what is kept; it rises to this value while training."""


def stages_of(latent_autoencoder: LatentAutoencoder) -> tuple[Stage, ...]:
    """The latents that a stage 2 needs denoisers of: without g psi_g still samples the trajectory."""
    return tuple(stage for stage in STAGES if stage != "fine" or latent_autoencoder.config.use_fine)


def make_scheduler(prediction_type: str = "v_prediction") -> DPMSolverMultistepScheduler:
    """DPM-Solver++ with a cosine schedule whose last step is pure noise."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction_type,
        algorithm_type="dpmsolver++",
        solver_order=2,
        timestep_spacing="trailing",
    )


def diffusion_target(scheduler: DDPMScheduler, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """What a denoiser is to predict, by the scheduler's prediction type."""
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return scheduler.get_velocity(clean, noise, timestep)
    return noise if kind == "epsilon" else clean


def spread_timesteps(batch_size: int, num_timesteps: int, device: torch.device | str = "cpu") -> Tensor:
    """Random timesteps that cover the range evenly within a batch, in random order: a steadier loss."""
    start = torch.rand(())
    share = (torch.randperm(batch_size) + start) / batch_size
    return (share * num_timesteps).long().clamp(max=num_timesteps - 1).to(device)


class DiffusionLosses:
    """Losses of one step of one denoiser."""

    def __init__(
        self,
        stage: Stage,
        wrapped: nn.Module,
        denoiser: Denoiser,
        memory: LatentMemory,
        config: DiffusionTrainingConfig,
        accelerator: Accelerator,
    ) -> None:
        self.stage, self.wrapped, self.denoiser = stage, wrapped, denoiser
        self.memory, self.config = memory, config
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.device = accelerator.device
        self.scheduler = DDPMScheduler.from_config(make_scheduler(config.prediction_type).config)

    def __call__(self, step: int) -> dict[str, Tensor]:
        schedule = self.config.schedule
        indices = batch_indices(len(self.memory), schedule.batch_size, step, schedule.seed, self.rank, self.world_size)
        return {"loss": self.loss(indices, torch.randint(self.memory.num_turns, (len(indices),)))}

    def loss(self, indices: list[int], turns: Tensor, augment: bool = True) -> Tensor:
        """Mean squared error of the prediction for some scenes, at random times."""
        clean, conditions = self.sample_and_conditions(indices, turns, augment)
        timestep = spread_timesteps(len(indices), self.scheduler.config.num_train_timesteps, self.device)
        noise = torch.randn_like(clean)
        noisy = self.scheduler.add_noise(clean, noise, timestep)
        predicted = self.wrapped(noisy, timestep, **conditions)
        return F.mse_loss(predicted.float(), diffusion_target(self.scheduler, clean, noise, timestep))

    def sample_and_conditions(self, indices: list[int], turns: Tensor, augment: bool) -> tuple[Tensor, dict[str, Any]]:
        """The clean sample in normalised units, and what the denoiser gets besides it."""
        code = self.memory.pick("scene_code", indices, turns, self.device)
        if self.stage == "global":
            return self.denoiser.code(code), {}
        if augment and self.config.code_noise > 0:
            code = code + self.config.code_noise * self.denoiser.code.std * torch.randn_like(code)
        conditions: dict[str, Any] = {"scene_code": code}
        if self.stage == "coarse":
            sample = self.memory.pick("coarse", indices, turns, self.device).flatten(1, 2)
        else:
            sample = self.memory.pick("fine", indices, turns, self.device)
            conditions["coarse"] = self.memory.pick("coarse_codes", indices, turns, self.device)
            conditions["coarse_noise"] = self.config.coarse_noise if augment else 0.0
        return self.denoiser.latent(sample), conditions


def new_denoiser(
    stage: Stage, model_config: dict[str, Any], memory: LatentMemory, latent_autoencoder: LatentAutoencoder
) -> Denoiser:
    """An untrained denoiser with the statistics of its latents.

    Raises:
        UserInputError: if the preset's sizes do not fit the latents, or there is no such latent.
    """
    if stage not in stages_of(latent_autoencoder):
        raise UserInputError("The latent auto-encoder has no fine latent: train the other denoisers only.")
    code_dim = memory.scene_code.shape[-1]
    coarse_shape, fine_shape = latent_autoencoder.coarse_shape, latent_autoencoder.fine_shape
    size = {"coarse": coarse_shape[-2:], "fine": fine_shape[-2:]}.get(stage)
    levels = len(model_config.get("channels", ())) - 1
    if size is not None and levels > 0 and any(n % 2**levels for n in size):
        raise UserInputError(
            f"The {stage} latent of {size[0]} x {size[1]} cells cannot be halved {levels} times: choose another preset."
        )
    if stage == "global":
        denoiser: Denoiser = GlobalDenoiser(
            **model_config,
            global_dim=latent_autoencoder.global_dim,
            num_cameras=memory.num_cameras,
            intrinsics=memory.intrinsics,
            image_size=memory.image_size,
        )
        denoiser.code.fit(memory.scene_code.flatten(0, 1))
        return denoiser
    if stage == "coarse":
        denoiser = CoarseDenoiser(**model_config, coarse_shape=coarse_shape, code_dim=code_dim)
        denoiser.latent.fit(memory.coarse.flatten(0, 1).flatten(1, 2))
    else:
        denoiser = FineDenoiser(**model_config, fine_shape=fine_shape, coarse_shape=coarse_shape, code_dim=code_dim)
        denoiser.latent.fit(memory.fine.flatten(0, 1))
        denoiser.coarse.fit(memory.coarse_codes.flatten(0, 1).flatten(1, 2))
    denoiser.code.fit(memory.scene_code.flatten(0, 1))
    return denoiser


def train_denoiser(
    stage: Stage,
    memory: LatentMemory,
    latent_autoencoder: LatentAutoencoder,
    output_dir: Path | str,
    model_config: dict[str, Any],
    config: DiffusionTrainingConfig,
    *,
    on_progress: ProgressCallback | None = None,
) -> Denoiser:
    """Trains one denoiser, continuing an interrupted run.

    Args:
        memory: latents of the training scenes.
        output_dir: becomes a run folder (see `RunFolder`) with the averaged weights in `denoiser/`.
        model_config: sizes of the denoiser; the latents' shapes come from `latent_autoencoder`.

    Returns:
        the denoiser with averaged weights, in evaluation mode.
    """
    accelerator = Accelerator(mixed_precision=config.schedule.mixed_precision)
    torch.manual_seed(config.schedule.seed)
    denoiser = new_denoiser(stage, model_config, memory, latent_autoencoder).to(accelerator.device)
    identity = {
        "kind": f"{stage} denoiser",
        "latent_autoencoder": model_hash(latent_autoencoder),
        "model": public_config(denoiser),
        "seed": config.schedule.seed,
        "batch_size": config.schedule.batch_size,
        "prediction_type": config.prediction_type,
    }
    folder = RunFolder(output_dir, identity)
    ema = EMAModel(denoiser.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)

    def make_losses(wrapped: nn.Module) -> DiffusionLosses:
        return DiffusionLosses(stage, wrapped, denoiser, memory, config, accelerator)

    train(
        folder,
        denoiser,
        make_losses,
        config.schedule,
        accelerator,
        ema=ema,
        description=f"Denoiser of the {stage} latent",
        on_progress=on_progress,
    )
    ema.copy_to(denoiser.parameters())
    if accelerator.is_main_process:
        with atomic_path(Path(output_dir) / DENOISER_FOLDER) as temporary:
            denoiser.save_pretrained(temporary)
    accelerator.wait_for_everyone()
    return denoiser.eval()


@torch.no_grad()
def evaluate_denoiser(
    stage: Stage,
    denoiser: Denoiser,
    memory: LatentMemory,
    config: DiffusionTrainingConfig,
    num_scenes: int = 32,
    draws: int = 4,
    seed: int = 0,
) -> float:
    """Mean loss on scenes, with fixed noise and times; compare training and held-out scenes to see overfitting."""
    accelerator = Accelerator()
    losses = DiffusionLosses(stage, denoiser, denoiser, memory, config, accelerator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        indices = list(range(min(num_scenes, len(memory))))
        values = []
        for _ in range(draws):
            for first in range(0, len(indices), 8):
                batch = indices[first : first + 8]
                turns = torch.randint(memory.num_turns, (len(batch),))
                values.extend([float(losses.loss(batch, turns, augment=False))] * len(batch))
    return sum(values) / len(values)


def load_denoiser(folder: Path) -> Denoiser | None:
    """A trained denoiser of a run folder; None if its training has not ended.

    Raises:
        UserInputError: if its files are broken.
    """
    if not (folder / DENOISER_FOLDER / "config.json").is_file():
        return None
    folder = folder / DENOISER_FOLDER
    config = read_json(folder / "config.json")
    classes = {cls.__name__: cls for cls in DENOISERS.values()}
    if config.get("_class_name") not in classes:
        raise UserInputError(f"{folder} holds no denoiser: delete it and run 'nfldm-train-diffusion' again.")
    denoiser = classes[config["_class_name"]].from_config(config)
    load_exactly(denoiser, read_safetensors(folder / WEIGHTS), folder / WEIGHTS)
    return denoiser.eval()


def save_pipeline(
    output_dir: Path | str,
    scene_autoencoder: SceneAutoencoder,
    latent_autoencoder: LatentAutoencoder,
    temperatures: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Path | None:
    """Saves `<output_dir>/pipeline` once all denoisers in `<output_dir>/{global,coarse,fine}` are trained.

    Args:
        temperatures: of g, c and f, the pipeline's default for sampling.

    Returns:
        the pipeline's folder; None while a denoiser is missing.

    Raises:
        UserInputError: if the denoisers are of different trainings.
    """
    output_dir = Path(output_dir)
    stages = stages_of(latent_autoencoder)
    denoisers = {stage: load_denoiser(output_dir / stage) for stage in stages}
    if any(denoiser is None for denoiser in denoisers.values()):
        return None
    runs = {stage: read_json(output_dir / stage / "run.json") for stage in stages}
    expected = model_hash(latent_autoencoder)
    for stage, run in runs.items():
        if run.get("latent_autoencoder") != expected:
            raise UserInputError(
                f"The denoiser in {output_dir / stage} was trained for another latent auto-encoder: train it again."
            )
    types = {run.get("prediction_type") for run in runs.values()}
    if len(types) > 1:
        raise UserInputError(
            f"The denoisers in {output_dir} predict different things ({', '.join(sorted(map(str, types)))}): train "
            "them with one --prediction-type."
        )
    components: dict[str, Any] = {f"{stage}_denoiser": denoisers.get(stage) for stage in STAGES}
    components["scheduler"] = make_scheduler(types.pop())
    pipeline = assemble_pipeline(scene_autoencoder, latent_autoencoder, **components, temperatures=temperatures)
    with atomic_path(output_dir / "pipeline") as temporary:
        pipeline.save_pretrained(temporary)
    return output_dir / "pipeline"
