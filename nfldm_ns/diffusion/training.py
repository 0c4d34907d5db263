"""Trains the denoisers of g, c and f (paper, Sec. 3.3); each is a run by itself, on clean conditions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from diffusers.models.attention_processor import AttnProcessor
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from nfldm_ns.autoencoder.checkpoints import WEIGHTS, load_exactly, read_safetensors
from nfldm_ns.autoencoder.model_configs import build_model
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.autoencoder.scene_sampler import SceneCache
from nfldm_ns.diffusion.denoisers import KNOWN_WEIGHTS, CoarseDenoiser, FineDenoiser, GlobalDenoiser
from nfldm_ns.diffusion.distillation import Shortening, matched_contrasts, randomly_cooled
from nfldm_ns.diffusion.flow import FLOW, FlowNoise, make_flow_scheduler, prediction_type_of
from nfldm_ns.diffusion.joint_training import (
    CODES,
    CodeOptimiser,
    DenoiserWithCodes,
    JointConfig,
    code_name,
    new_codes,
    prior_gradient,
    save_codes,
    with_own_codes,
)
from nfldm_ns.diffusion.latent_memory import LatentMemory
from nfldm_ns.diffusion.latent_perceptual_loss import LatentPerceptualLoss
from nfldm_ns.diffusion.outpainting import drawn_for, to_columns
from nfldm_ns.diffusion.pipeline import PIPELINE_INDEX, NFLDMPipeline, assemble_pipeline
from nfldm_ns.diffusion.rendering_loss import EstimateRendering, signal_share
from nfldm_ns.diffusion.validation import DenoiserPictures
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder
from nfldm_ns.scenes.collection import bev_class, read_json
from nfldm_ns.scenes.writing import atomic_path
from nfldm_ns.training.draws import BatchShare, ItemDraws
from nfldm_ns.training.identity import model_hash, public_config, tensor_hash
from nfldm_ns.training.loop import ProgressCallback, keep_result, moving_averages, train
from nfldm_ns.training.posthoc_ema import check_length, synthesise
from nfldm_ns.training.run import RunFolder
from nfldm_ns.training.schedule import Schedule, batch_share, joint_batch_size, new_accelerator

Stage = Literal["global", "coarse", "fine"]
STAGES: tuple[Stage, ...] = ("global", "coarse", "fine")
PredictionType = Literal["v_prediction", "epsilon", "sample", "flow"]
LossWeighting = Literal["uniform", "min_snr"]
Condition = Literal["none", "bev"]
EVALUATION_BATCH = 8
NOISE_LEVELS = 10  # of the schedule, at which errors of v are compared
DENOISER_FOLDER = "denoiser"
DENOISERS = {"global": GlobalDenoiser, "coarse": CoarseDenoiser, "fine": FineDenoiser}
TrainingNoise: TypeAlias = DDPMScheduler | FlowNoise
Denoiser = GlobalDenoiser | CoarseDenoiser | FineDenoiser


@dataclass
class DiffusionTrainingConfig:
    """Training of one denoiser."""

    schedule: Schedule = field(default_factory=Schedule)
    prediction_type: PredictionType = "v_prediction"
    """"flow" trains for a rectified flow instead of a diffusion, see `flow.py`."""
    flow_shift: float = 1.0
    """Of the times of a flow, see `FlowNoise`; above 1 noisy ones are more frequent, in training and in sampling."""
    zero_terminal_snr: bool = True
    """The last training step is pure noise, which sampling starts from (Lin et al. 2024); not with "epsilon"."""
    loss_weighting: LossWeighting = "uniform"
    """Of timesteps, see `loss_weights`."""
    min_snr_gamma: float = 5.0
    """Where "min_snr" cuts the signal-to-noise ratio."""
    code_noise: float = 0.1
    """Standard deviation of noise on the scene code that conditions psi_c and psi_f: a sampled one is never exact."""
    coarse_noise: float = 0.1
    """Standard deviation of noise on the normalised c that conditions psi_f."""
    rendering_mult: float = 0.0
    """Weight of the rendering loss of what psi_c and psi_f estimate (DiffRF), see `rendering_loss.py`."""
    latent_perceptual_mult: float = 0.0
    """Weight of the difference of what stage 2's decoder makes of what psi_c and psi_f estimate, see
    `latent_perceptual_loss.py`."""
    joint: JointConfig | None = None
    """Also optimises c, or f, of the training scenes (SSDNeRF), see `joint_training.py`; not of psi_g."""
    condition_dropout: float = 0.0
    """Share of scenes whose code psi_c and psi_f do not see; above 0 allows a `guidance_scale` in sampling."""
    condition: Condition = "none"
    """With "bev" the denoisers also see the scene's semantic map."""
    bev_dropout: float = 0.15
    """Share of scenes whose map they do not see, drawn apart from `condition_dropout`, if there are maps."""
    known_share: float = 0.0
    """Share of scenes of which psi_c and psi_f are told a part; above 0 makes outpainters (`outpainting.py`)."""
    ema_decay: float = 0.999
    """Of the moving averages of the weights, which are what is kept; it rises to this value while training."""
    ema_length: float | None = None
    """Keep the average of this relative length instead, made of the snapshots of the schedule's `ema_profiles`; it may
    change when a finished training is run again."""


def stages_of(latent_autoencoder: LatentAutoencoder) -> tuple[Stage, ...]:
    """The latents that a stage 2 needs denoisers of: without g psi_g still samples the trajectory."""
    return tuple(stage for stage in STAGES if stage != "fine" or latent_autoencoder.config.use_fine)


def make_sampler(prediction_type: PredictionType, zero_terminal_snr: bool, flow_shift: float = 1.0) -> SchedulerMixin:
    """What a pipeline is saved with: DPM-Solver++ for a diffusion, Euler's method for a flow."""
    if prediction_type == FLOW:
        return make_flow_scheduler(flow_shift)
    return make_scheduler(prediction_type, zero_terminal_snr)


def kind_of_sampler(scheduler: SchedulerMixin) -> dict[str, Any]:
    """Settings of the training whose denoisers a pipeline's scheduler samples, by their names in the configuration."""
    kind = prediction_type_of(scheduler)
    return {"prediction_type": kind, "zero_terminal_snr": scheduler.config.get("rescale_betas_zero_snr", kind == FLOW)}


def make_scheduler(
    prediction_type: PredictionType = "v_prediction", zero_terminal_snr: bool = True
) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ with a cosine schedule; other samplers of diffusers can be made from its config. Not for "flow".

    Args:
        zero_terminal_snr: the cosine is rescaled so that nothing of the signal is left in the last training step (Lin
            et al. 2024, Algorithm 1): `DDPMScheduler.from_config` of it, which training uses, has `alphas_cumprod[-1]`
            = 0, as has `DDIMScheduler`; DPM-Solver++, which works with its logarithm, has 2^-24. Without, it is 2e-9.
            Sampling starts at that step ("trailing").

    Raises:
        UserInputError: for "epsilon" with zero terminal SNR.
    """
    if prediction_type == "epsilon" and zero_terminal_snr:
        raise UserInputError(
            "A denoiser that predicts the noise (epsilon) learns nothing of the scene from pure noise: choose "
            "--prediction-type v_prediction, or --no-zero-terminal-snr."
        )
    solver = DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction_type,
        algorithm_type="dpmsolver++",
        solver_order=2,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    solver.register_to_config(clip_sample=False)  # latents are no images: DDIM would cut them to [-1, 1]
    return solver


def loss_weights(
    scheduler: TrainingNoise, timestep: Shaped[Tensor, " batch"], weighting: LossWeighting, gamma: float = 5.0
) -> Float[Tensor, " batch"]:
    """Weights of the squared errors of what a denoiser predicts.

    "uniform" is 1. "min_snr" is min-SNR-gamma (Hang et al. 2023): the squared error of the clean sample, however it is
    predicted, weighs min(SNR, gamma), where SNR = alpha_bar / (1 - alpha_bar). By what is predicted that is

    - sample: min(SNR, gamma)
    - epsilon: min(SNR, gamma) / SNR
    - v_prediction: min(SNR, gamma) / (SNR + 1)

    Flows have "uniform" alone.
    """
    if weighting == "uniform" or isinstance(scheduler, FlowNoise):
        return torch.ones_like(timestep, dtype=torch.float32)
    alpha = scheduler.alphas_cumprod.to(timestep.device)[timestep]
    snr = alpha / (1 - alpha)
    kind = scheduler.config.prediction_type
    divisor = {"sample": torch.ones_like(snr), "epsilon": snr, "v_prediction": snr + 1}[kind]
    return snr.clamp(max=gamma) / divisor


def diffusion_target(scheduler: TrainingNoise, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """What a denoiser is to predict, by the scheduler's prediction type; of a flow `noise - clean`."""
    if isinstance(scheduler, FlowNoise):
        return scheduler.get_velocity(clean, noise, timestep)
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return scheduler.get_velocity(clean, noise, timestep)
    return noise if kind == "epsilon" else clean


def predicted_velocity(
    scheduler: TrainingNoise,
    predicted: Float[Tensor, " batch *shape"],
    noisy: Float[Tensor, " batch *shape"],
    timestep: Shaped[Tensor, " batch"],
) -> Float[Tensor, " batch *shape"]:
    """v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) clean (Salimans & Ho 2022) as a prediction of any kind has it.

    Grows without bounds where a prediction says nothing of it: "epsilon" towards pure noise, "sample" towards none.
    What a flow's denoiser predicts is a velocity already, `noise - clean`.
    """
    if isinstance(scheduler, FlowNoise):
        return predicted
    kind = scheduler.config.prediction_type
    alpha_bar = scheduler.alphas_cumprod.to(timestep.device)[timestep].view(-1, *[1] * (noisy.ndim - 1))
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if kind == "epsilon":
        return (predicted - noise * noisy) / signal
    return (signal * noisy - predicted) / noise if kind == "sample" else predicted


def signal_and_noise(
    scheduler: TrainingNoise, timestep: Shaped[Tensor, " batch"]
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """alpha and sigma of `x_t = alpha x_0 + sigma eps`."""
    if isinstance(scheduler, FlowNoise):
        time = timestep / scheduler.num_timesteps
        return 1 - time, time
    alpha_bar = scheduler.alphas_cumprod.to(timestep.device)[timestep]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def estimated_clean(
    scheduler: TrainingNoise,
    predicted: Float[Tensor, " batch *shape"],
    noisy: Float[Tensor, " batch *shape"],
    timestep: Shaped[Tensor, " batch"],
) -> Float[Tensor, " batch *shape"]:
    """x_0 as a prediction of any kind has it; "epsilon" must not have a zero terminal SNR."""
    signal, noise = (part.view(-1, *[1] * (noisy.ndim - 1)) for part in signal_and_noise(scheduler, timestep))
    if isinstance(scheduler, FlowNoise):
        return noisy - noise * predicted
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return predicted
    return (noisy - noise * predicted) / signal if kind == "epsilon" else signal * noisy - noise * predicted


def spread_timesteps(count: int, num_timesteps: int, seed: int | None = None) -> Int[Tensor, " count"]:
    """Random timesteps that cover the range evenly, in random order: a steadier loss.

    Args:
        seed: of these numbers; None for torch's own state.
    """
    return (_spread_shares(count, seed) * num_timesteps).long().clamp(max=num_timesteps - 1)


def _spread_shares(count: int, seed: int | None) -> Float[Tensor, " count"]:
    """Random numbers that cover [0, 1) evenly, in random order."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    start = torch.rand((), generator=generator)
    return (torch.randperm(count, generator=generator) + start) / count


def mean_by_scene(
    error: Float[Tensor, "batch channels *cells"], known_cells: Bool[Tensor, "batch y x"] | None = None
) -> Float[Tensor, " batch"]:
    """The mean error of each scene, over the cells that an outpainter is not told."""
    if known_cells is None:
        return error.flatten(1).mean(1)
    unknown = (~known_cells).to(error.dtype)
    return (error.mean(1) * unknown).flatten(1).sum(1) / unknown.flatten(1).sum(1)


class DenoisingPass(NamedTuple):
    """What a denoiser makes of some scenes with noise.

    Attributes:
        clean: samples in normalised units.
        noise: standard normal.
        noisy: both together.
        predicted: by the denoiser.
        known_cells: what an outpainter is told of each; None where nothing is told.
    """

    clean: Float[Tensor, " batch *shape"]
    noise: Float[Tensor, " batch *shape"]
    noisy: Float[Tensor, " batch *shape"]
    predicted: Float[Tensor, " batch *shape"]
    known_cells: Bool[Tensor, "batch y x"] | None


class DiffusionLosses:
    """Losses of one pass of one denoiser.

    What is drawn for a scene depends on its place in the sequence of all scenes, and the timesteps are spread over all
    scenes of a step: however a step is split into passes and processes, it is the same.

    Args:
        share: what this process works on; by default everything.
        with_map: False hides the maps of all scenes from a denoiser that knows maps.
        rendering: for `rendering_mult`.
        perceptual: for `latent_perceptual_mult`.
    """

    def __init__(
        self,
        stage: Stage,
        wrapped: nn.Module,
        denoiser: Denoiser,
        memory: LatentMemory,
        config: DiffusionTrainingConfig,
        device: torch.device,
        share: BatchShare | None = None,
        with_map: bool = True,
        rendering: EstimateRendering | None = None,
        perceptual: LatentPerceptualLoss | None = None,
    ) -> None:
        self.with_map, self.rendering, self.perceptual = with_map, rendering, perceptual
        self.stage, self.wrapped, self.denoiser = stage, wrapped, denoiser
        self.memory, self.config, self.device = memory, config, device
        self.share = share or batch_share(config.schedule)
        self.scheduler = training_noise(config)

    def __call__(self, number: int) -> dict[str, Tensor]:
        share = self.share
        step, part = share.place(number)
        timestep = self.timesteps(share.joint_batch_size, share.seed + step)[part]
        indices, draws = share.items(len(self.memory), number), share.draws(number, self.device)
        if self.rendering is None and self.perceptual is None:
            return {"loss": self.loss(indices, timestep, draws)}
        return self.losses_of_estimate(indices, timestep.to(self.device), draws)

    def losses_of_estimate(
        self, indices: list[int], timestep: Shaped[Tensor, " batch"], draws: ItemDraws
    ) -> dict[str, Tensor]:
        """The loss of the prediction, and those of the estimate it makes: of its renderings and decoder features."""
        turns = draws.integers(self.memory.num_turns)
        pass_ = self.predict(indices, timestep, draws, turns=turns)
        signal, sigma = signal_and_noise(self.scheduler, timestep)
        estimate = estimated_clean(self.scheduler, pass_.predicted, pass_.noisy, timestep)
        share = signal_share(signal, sigma)
        losses = {"loss": self._error(pass_, timestep)}
        if self.rendering is not None:
            rendered = self.rendering(estimate, share, indices, turns, draws)
            losses["rendering_loss"] = self.config.rendering_mult * rendered
        if self.perceptual is not None:
            error = self.perceptual(estimate, pass_.clean, share, indices, turns)
            losses["latent_perceptual_loss"] = self.config.latent_perceptual_mult * error
        return losses

    def timesteps(self, count: int, seed: int) -> Shaped[Tensor, " count"]:
        """Timesteps of a batch; those of a flow are no whole numbers."""
        if isinstance(self.scheduler, FlowNoise):
            return self.scheduler.timesteps(_spread_shares(count, seed))
        return spread_timesteps(count, self.scheduler.config.num_train_timesteps, seed)

    def loss(
        self, indices: list[int], timestep: Shaped[Tensor, " batch"], draws: ItemDraws, augment: bool = True
    ) -> Float[Tensor, ""]:
        """Weighted mean squared error of the prediction for some scenes."""
        timestep = timestep.to(self.device)
        return self._error(self.predict(indices, timestep, draws, augment), timestep)

    def _error(self, pass_: DenoisingPass, timestep: Tensor) -> Float[Tensor, ""]:
        """Weighted mean squared error, of cells that an outpainter is not told: told ones only have to be repeated."""
        target = diffusion_target(self.scheduler, pass_.clean, pass_.noise, timestep)
        error = F.mse_loss(pass_.predicted, target, reduction="none")
        weights = loss_weights(self.scheduler, timestep, self.config.loss_weighting, self.config.min_snr_gamma)
        return (weights * mean_by_scene(error, pass_.known_cells)).mean()

    def velocity_error(
        self, indices: list[int], timestep: Shaped[Tensor, " batch"], draws: ItemDraws
    ) -> Float[Tensor, " batch"]:
        """Squared error of v for some scenes, without weights, whatever a diffusion predicts; of a flow see below."""
        timestep = timestep.to(self.device)
        pass_ = self.predict(indices, timestep, draws, augment=False)
        velocity = predicted_velocity(self.scheduler, pass_.predicted, pass_.noisy, timestep)
        return (velocity - self.scheduler.get_velocity(pass_.clean, pass_.noise, timestep)).square().flatten(1).mean(1)

    def predict(
        self,
        indices: list[int],
        timestep: Shaped[Tensor, " batch"],
        draws: ItemDraws,
        augment: bool = True,
        turns: Int[Tensor, " batch"] | None = None,
    ) -> DenoisingPass:
        """What the denoiser makes of some scenes with noise.

        Args:
            turns: of the scenes, where they were drawn already.
        """
        clean, conditions = self.sample_and_conditions(indices, draws, augment, turns)
        noise = draws.normal(clean)
        noisy = self.scheduler.add_noise(clean, noise, timestep)
        predicted = self.wrapped(noisy, timestep, **conditions).float()
        return DenoisingPass(clean, noise, noisy, predicted, conditions.get("known_cells"))

    def sample_and_conditions(
        self, indices: list[int], draws: ItemDraws, augment: bool = True, turns: Int[Tensor, " batch"] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The clean sample in normalised units, and what the denoiser gets besides it."""
        turns = draws.integers(self.memory.num_turns) if turns is None else turns
        pick = partial(self.memory.pick, indices=indices, turns=turns, device=self.device)
        code = pick("scene_code")
        conditions: dict[str, Tensor] = {}
        if self.denoiser.config.bev_classes:
            conditions["bev"] = self.memory.pick_maps(indices, turns, self.device)
            if not self.with_map:
                conditions["drop_bev"] = torch.ones(len(indices), dtype=torch.bool, device=self.device)
            elif augment and self.denoiser.config.bev_dropout > 0:
                conditions["drop_bev"] = draws.uniform().to(self.device) < self.denoiser.config.bev_dropout
        if self.stage == "global":
            return self.denoiser.code(code), conditions
        if augment and self.config.code_noise > 0:
            code = code + self.config.code_noise * self.denoiser.code.std * draws.normal(code)
        conditions["scene_code"] = code
        if augment and self.denoiser.config.condition_dropout > 0:
            conditions["drop_code"] = draws.uniform().to(self.device) < self.denoiser.config.condition_dropout
        if self.stage == "coarse":
            clean = pick("coarse").flatten(1, 2)
            return self.denoiser.latent(clean), {**conditions, **self._known(clean, draws, augment)}
        coarse = pick("coarse_codes")
        if augment and self.config.coarse_noise > 0:
            std = self.denoiser.coarse.std.unflatten(0, coarse.shape[1:3])
            coarse = coarse + self.config.coarse_noise * std * draws.normal(coarse)
        fine = pick("fine")
        return self.denoiser.latent(fine), {**conditions, "coarse": coarse, **self._known(fine, draws, augment)}

    def _known(self, clean: Float[Tensor, "batch channels y x"], draws: ItemDraws, augment: bool) -> dict[str, Tensor]:
        """The part of each scene that an outpainter is told, if there is any."""
        share = self.denoiser.config.known_share
        if not share or not augment:
            return {}
        rows, columns = self.denoiser.config.coarse_shape[2:]
        cells = draws.each(drawn_for((rows, columns), share)).to(self.device)
        return {"known": clean, "known_cells": to_columns(cells, clean.shape[-1] // columns)}


class JointLosses(DiffusionLosses):
    """Losses of a joint training, each of which also moves the codes of some of its scenes, see `joint_training.py`.

    Args:
        codes: moves them.
        others: of `DiffusionLosses`, with a rendering.
    """

    def __init__(self, codes: CodeOptimiser, *others: Any, **settings: Any) -> None:
        super().__init__(*others, **settings)
        self.codes = codes

    def losses_of_estimate(
        self, indices: list[int], timestep: Shaped[Tensor, " batch"], draws: ItemDraws
    ) -> dict[str, Tensor]:
        """The loss of the prediction; what the views of the moved codes lost before is logged."""
        assert self.rendering is not None
        turns = draws.integers(self.memory.num_turns)
        pass_ = self.predict(indices, timestep, draws, turns=turns)
        rows = self.codes.rows(indices, turns)
        first = [list(zip(indices, turns.tolist(), strict=True)).index(row) for row in rows]
        with torch.no_grad():
            estimate = estimated_clean(self.scheduler, pass_.predicted, pass_.noisy, timestep)[first]
            levels = (part[first] for part in signal_and_noise(self.scheduler, timestep))
            prior = prior_gradient(pass_.clean[first], estimate, *levels)
        chosen, turned = [index for index, _ in rows], torch.tensor([turn for _, turn in rows])
        alike = torch.ones(len(rows), device=self.device)

        def lost(values: Tensor) -> Tensor:
            assert self.rendering is not None
            return self.rendering(values, alike, chosen, turned, draws)

        with torch.autocast(self.device.type, enabled=False):
            began = self.codes(rows, prior, lost)
        moved = self.codes.codes.values[torch.tensor(chosen), turned] - pass_.clean[first]
        return {
            "loss": self._error(pass_, timestep),
            "_code_rendering_loss": began,
            "_code_move": moved.square().mean().sqrt(),
        }


class DistillationLosses(DiffusionLosses):
    """Losses of a student, see `distillation.py`; scenes, their order and their noise are drawn as in any training.

    Args:
        shortening: its teacher and steps.
        others: of `DiffusionLosses`.
    """

    def __init__(self, shortening: Shortening, *others: Any) -> None:
        super().__init__(*others)
        self.shortening = shortening

    def loss(
        self, indices: list[int], timestep: Shaped[Tensor, " batch"], draws: ItemDraws, augment: bool = True
    ) -> Float[Tensor, ""]:
        """Mean squared difference of the student's samples from its teacher's; timesteps are the solver's."""
        clean, conditions = self.sample_and_conditions(indices, draws, augment)
        noise = randomly_cooled(draws.normal(clean), self.shortening.temperature, draws.uniform())
        error = self.shortening.error(self.wrapped, noise, conditions)
        return mean_by_scene(error, conditions.get("known_cells")).mean()


def training_scheduler(config: DiffusionTrainingConfig) -> DDPMScheduler:
    """The noise of a diffusion's training."""
    return DDPMScheduler.from_config(make_scheduler(config.prediction_type, config.zero_terminal_snr).config)


def training_noise(config: DiffusionTrainingConfig) -> TrainingNoise:
    """The noise of any training.

    Raises:
        UserInputError: for settings that do not go together.
    """
    _require_kind(config)
    return FlowNoise(config.flow_shift) if config.prediction_type == FLOW else training_scheduler(config)


def _require_kind(config: DiffusionTrainingConfig) -> None:
    if config.prediction_type != FLOW:
        if config.flow_shift != 1:
            raise UserInputError("--flow-shift shifts the times of a flow alone: add --prediction-type flow.")
        return
    make_flow_scheduler(config.flow_shift)
    if config.loss_weighting != "uniform":
        raise UserInputError(
            f"--loss-weighting {config.loss_weighting} weighs the timesteps of a diffusion: leave it out, or choose "
            "another --prediction-type than flow."
        )
    if not config.zero_terminal_snr:
        raise UserInputError("A flow always ends in pure noise: leave out --no-zero-terminal-snr.")


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


def _map_config(memory: LatentMemory, config: DiffusionTrainingConfig) -> dict[str, Any]:
    """What a denoiser has to know of maps."""
    if memory.maps is None:
        raise UserInputError("The latents were encoded without BEV maps: encode them again, with maps.")
    _require_share("--bev-dropout", config.bev_dropout)
    return {
        "bev_classes": max(bev_class.id for bev_class in memory.bev_classes) + 1,
        "bev_size": tuple(memory.maps.shape[2:]),
        "bev_dropout": config.bev_dropout,
    }


def train_denoiser(
    stage: Stage,
    memory: LatentMemory,
    latent_autoencoder: LatentAutoencoder,
    output_dir: Path | str,
    model_config: dict[str, Any],
    config: DiffusionTrainingConfig,
    *,
    scene_autoencoder: SceneAutoencoder | None = None,
    initial: Denoiser | None = None,
    shortening: Shortening | None = None,
    views: tuple[SceneCache, Sequence[str]] | None = None,
    on_progress: ProgressCallback | None = None,
) -> Denoiser:
    """Trains one denoiser, continuing an interrupted run.

    Args:
        memory: latents of the training scenes.
        output_dir: becomes a run folder (see `RunFolder`) with the averaged weights in `denoiser/`.
        model_config: sizes of the denoiser; the latents' shapes come from `latent_autoencoder`.
        scene_autoencoder: stage 1, for sample renders every `validation_steps`, `rendering_mult` and `joint`; None for
            none.
        initial: a denoiser of the same configuration to begin from, for a longer training; an outpainter may begin from
            one that is none.
        shortening: makes it a distillation, whose student begins as a copy of its teacher, whatever `model_config`;
            None for a training on the latents themselves.
        views: of the memory's scenes, and their ids in its order, for `rendering_mult` and `joint`.

    Returns:
        the denoiser with averaged weights, in evaluation mode.

    Raises:
        UserInputError: if the settings, the latents, their maps or the initial denoiser do not fit together.
    """
    training_noise(config)  # refuses what cannot be, before anything is written
    _require_snapshots(config)
    _require_renderings(config, scene_autoencoder, views)
    _require_share("--known-share", config.known_share)
    joint = config.joint if stage != "global" else None
    _require_joint(config, scene_autoencoder, views, shortening)
    accelerator = new_accelerator(config.schedule, output_dir)
    if joint is not None and accelerator.num_processes > 1:
        raise UserInputError("Joint training moves codes in one process: start it without 'accelerate launch'.")
    torch.manual_seed(config.schedule.seed)
    if shortening is None:
        denoiser = _untrained(stage, model_config, memory, latent_autoencoder, config)
    else:
        _require_shortening(shortening, initial)
        denoiser = copy.deepcopy(shortening.teacher).train().requires_grad_(True)  # type: ignore[assignment]
    denoiser = denoiser.to(accelerator.device)
    if accelerator.device.type == "cpu" and stage != "global":
        denoiser.unet.set_attn_processor(AttnProcessor())  # torch's fused attention is slow there, backward above all
    identity = {
        "kind": f"{stage} denoiser",
        "latent_autoencoder": model_hash(latent_autoencoder, latent_autoencoder.encoding),
        "model": public_config(denoiser),
        "seed": config.schedule.seed,
        "batch_size": joint_batch_size(config.schedule, accelerator),
        "prediction_type": config.prediction_type,
        "zero_terminal_snr": config.zero_terminal_snr,
        "loss_weighting": config.loss_weighting,
    }
    if config.known_share and stage != "global":
        identity["loss_of"] = "unknown cells"
    if config.prediction_type == FLOW:
        identity["flow_shift"] = config.flow_shift
    if config.rendering_mult and stage != "global":
        identity["rendering_mult"] = config.rendering_mult
    if config.latent_perceptual_mult and stage != "global":
        identity["latent_perceptual_mult"] = config.latent_perceptual_mult
    if joint is not None:
        identity |= {"joint": asdict(joint), "codes": tensor_hash(memory.coarse)}
    if config.schedule.ema_profiles:
        identity["ema_profiles"] = config.schedule.ema_profiles
    if config.condition == "bev":
        identity["bev_classes"] = [asdict(bev_class) for bev_class in memory.bev_classes]
    if initial is not None:
        _begin_from(initial, denoiser)
        identity["initial_weights"] = model_hash(initial)
    if shortening is not None:
        shortening.teacher.to(accelerator.device).eval().requires_grad_(False)
        identity |= _shortening_identity(shortening)
    folder = RunFolder(output_dir, identity, accelerator)
    ema = moving_averages(denoiser, config.ema_decay)
    trained: nn.Module = denoiser
    if joint is not None:
        assert not isinstance(denoiser, GlobalDenoiser)
        memory = with_own_codes(memory, code_name(denoiser))
        trained = DenoiserWithCodes(denoiser, new_codes(denoiser, memory))

    def make_losses(wrapped: nn.Module) -> DiffusionLosses:
        share = batch_share(config.schedule, accelerator)
        given = (stage, wrapped, denoiser, memory, config, accelerator.device, share)
        if shortening is not None:
            return DistillationLosses(shortening, *given)
        rendering = None
        if (config.rendering_mult or joint) and not isinstance(denoiser, GlobalDenoiser):
            assert scene_autoencoder is not None and views is not None
            frozen = (latent_autoencoder, scene_autoencoder)
            frozen = tuple(model.to(accelerator.device).requires_grad_(False) for model in frozen)
            scenes, shown = (1, 2) if joint is None else (joint.num_scenes, joint.num_views)
            rendering = EstimateRendering(denoiser, *frozen, memory, *views, num_scenes=scenes, num_views=shown)
        if isinstance(trained, DenoiserWithCodes):
            assert joint is not None
            optimiser = CodeOptimiser(trained.denoiser, trained.codes, memory, joint)
            return JointLosses(optimiser, *given, rendering=rendering)
        perceptual = None
        if config.latent_perceptual_mult and not isinstance(denoiser, GlobalDenoiser):
            frozen_stage2 = latent_autoencoder.to(accelerator.device).requires_grad_(False)
            perceptual = LatentPerceptualLoss(denoiser, frozen_stage2, memory)
        return DiffusionLosses(*given, rendering=rendering, perceptual=perceptual)

    render = None
    if scene_autoencoder is not None and config.schedule.validation_steps:
        scheduler = make_sampler(config.prediction_type, config.zero_terminal_snr, config.flow_shift)
        pictures = (memory, latent_autoencoder, scene_autoencoder)
        if shortening is None:
            render = DenoiserPictures(stage, denoiser, scheduler, *pictures)
        else:
            few = copy.deepcopy(shortening.scheduler)
            render = DenoiserPictures(stage, denoiser, few, *pictures, steps=shortening.steps)

    train(
        folder,
        trained,
        make_losses,
        config.schedule,
        accelerator,
        ema=ema,
        render=render,
        description=f"Denoiser of the {stage} latent",
        on_progress=on_progress,
    )
    if joint is not None:
        name = code_name(denoiser)  # type: ignore[arg-type]
        keep_result(Path(output_dir) / CODES, accelerator, lambda path: save_codes(path, name, memory))
    if config.ema_length is None:
        ema.copy_to(denoiser.parameters())
    else:
        load_average(denoiser, output_dir, config.ema_length)
    keep_result(Path(output_dir) / DENOISER_FOLDER, accelerator, denoiser.save_pretrained)
    return denoiser.eval()


def _untrained(
    stage: Stage,
    model_config: dict[str, Any],
    memory: LatentMemory,
    latent_autoencoder: LatentAutoencoder,
    config: DiffusionTrainingConfig,
) -> Denoiser:
    """A new denoiser that knows the conditions of its training."""
    if stage != "global":
        model_config = {**model_config, "condition_dropout": config.condition_dropout}
        model_config = {**model_config, "known_share": config.known_share}
    if config.condition == "bev":
        model_config = {**model_config, **_map_config(memory, config)}
    if config.prediction_type == FLOW:
        model_config = {**model_config, "flow": True}
    return new_denoiser(stage, model_config, memory, latent_autoencoder)


def _require_shortening(shortening: Shortening, initial: Denoiser | None) -> None:
    if initial is not None:
        raise ValueError("a student begins with the weights of its teacher: give no initial denoiser")
    if not 1 <= shortening.steps < shortening.teacher_steps:
        raise ValueError(f"{shortening.steps} steps are not fewer than the teacher's {shortening.teacher_steps}")


def _shortening_identity(shortening: Shortening) -> dict[str, Any]:
    return {
        "distilled_from": model_hash(shortening.teacher),
        "distil_steps": shortening.steps,
        "distil_teacher_steps": shortening.teacher_steps,
        "distil_temperature": shortening.temperature,
        "distil_scheduler": type(shortening.scheduler).__name__,
    }


def load_average(denoiser: Denoiser, run_folder: Path | str, length: float) -> None:
    """Gives a denoiser the average of its weights of any relative length (see `posthoc_ema.py`).

    Args:
        run_folder: of its training, with snapshots.

    Raises:
        UserInputError: for a length that none has, and if the snapshots are missing, broken, or of another denoiser.
    """
    load_exactly(
        denoiser, {**denoiser.state_dict(), **synthesise(run_folder, length)}, f"the snapshots in {run_folder}"
    )


def _require_snapshots(config: DiffusionTrainingConfig) -> None:
    if config.ema_length is None:
        return
    check_length("--ema-length", config.ema_length)
    if not config.schedule.ema_profiles:
        raise UserInputError("--ema-length is made of snapshots: add the --ema-profiles that they were taken of.")


def _require_renderings(config: DiffusionTrainingConfig, renderer: SceneAutoencoder | None, views: object) -> None:
    if not 0 <= config.rendering_mult < float("inf"):
        raise UserInputError(f"--rendering-mult is {config.rendering_mult}: give a finite number of at least 0.")
    if not 0 <= config.latent_perceptual_mult < float("inf"):
        raise UserInputError(
            f"--latent-perceptual-mult is {config.latent_perceptual_mult}: give a finite number of at least 0."
        )
    if config.rendering_mult and (renderer is None or views is None):
        raise ValueError("rendering_mult needs scene_autoencoder and views")


def _require_joint(
    config: DiffusionTrainingConfig, renderer: SceneAutoencoder | None, views: object, shortening: Shortening | None
) -> None:
    if config.joint is None:
        return
    config.joint.check()
    others = config.rendering_mult or config.latent_perceptual_mult
    if others or shortening is not None or config.schedule.ema_profiles:
        raise UserInputError(
            "Joint training goes without --rendering-mult, --latent-perceptual-mult, --distil and --ema-profiles: "
            "leave them out."
        )
    if renderer is None or views is None:
        raise ValueError("joint training needs scene_autoencoder and views")


def _require_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise UserInputError(f"{name} is {share}, but must be from 0 to 1: it is a share of scenes.")


def _begin_from(initial: Denoiser, denoiser: Denoiser) -> None:
    """Gives a denoiser the weights of another; those of an outpainter that the other has not stay zero."""
    given, wanted = public_config(initial), public_config(denoiser)
    if wanted.get("known_share") and not isinstance(initial, GlobalDenoiser):
        given["known_share"] = wanted["known_share"]
    differing = sorted(name for name in {*given, *wanted} if given.get(name) != wanted.get(name))
    if type(initial) is not type(denoiser) or differing:
        raise UserInputError(
            f"The initial {type(initial).__name__} does not fit what is to be trained "
            f"({', '.join(differing) or type(denoiser).__name__}): give one of the same preset and options."
        )
    own = denoiser.state_dict()
    state = {**{name: own[name] for name in own if name.startswith(KNOWN_WEIGHTS)}, **initial.state_dict()}
    load_exactly(denoiser, state, "the initial denoiser")


@torch.no_grad()
def evaluate_denoiser(
    stage: Stage,
    denoiser: Denoiser,
    memory: LatentMemory,
    config: DiffusionTrainingConfig,
    num_scenes: int = 32,
    draws: int = 4,
    seed: int = 0,
    with_map: bool = True,
) -> float:
    """Mean loss on scenes, with fixed noise and times; compare training and held-out scenes to see overfitting.

    Args:
        with_map: False hides the maps from a denoiser that knows them.
    """
    device = next(denoiser.parameters()).device
    losses = DiffusionLosses(stage, denoiser, denoiser, memory, config, device, with_map=with_map)
    num_scenes = min(num_scenes, len(memory))
    total = 0.0
    for first in range(0, num_scenes * draws, EVALUATION_BATCH):
        numbers = range(first, min(first + EVALUATION_BATCH, num_scenes * draws))
        timestep = losses.timesteps(len(numbers), seed + first)
        indices = [number % num_scenes for number in numbers]
        total += len(numbers) * float(losses.loss(indices, timestep, ItemDraws(seed, numbers, device), augment=False))
    return total / (num_scenes * draws)


@torch.no_grad()
def velocity_errors(
    stage: Stage,
    denoiser: Denoiser,
    memory: LatentMemory,
    config: DiffusionTrainingConfig,
    num_scenes: int = 64,
    seed: int = 0,
    with_map: bool = True,
) -> dict[int, float]:
    """Mean squared error of v by timestep, at the middles of `NOISE_LEVELS` equal parts of the noise's schedule.

    Unlike the loss it can be compared between weightings and prediction types, and without a zero terminal SNR; the
    training's ends, at which only some predictions have a v, are left out.

    Of a flow it is the error of `noise - clean`, in units of its own: at timesteps 1000 t, which are other levels of
    noise, and larger than an error of v at the same level by the factor 1 / (t^2 + (1 - t)^2). Flows can be compared
    with one another, not with diffusions.

    Args:
        memory: of held-out scenes, of which the first are taken; noise is fixed.
        num_scenes: how many.
        with_map: False hides the maps from a denoiser that knows them.
    """
    device = next(denoiser.parameters()).device
    losses = DiffusionLosses(stage, denoiser, denoiser, memory, config, device, with_map=with_map)
    noise = losses.scheduler
    num_timesteps = noise.num_timesteps if isinstance(noise, FlowNoise) else noise.config.num_train_timesteps
    num_scenes = min(num_scenes, len(memory))
    errors = {}
    for level in range(NOISE_LEVELS):
        timestep = (2 * level + 1) * num_timesteps // (2 * NOISE_LEVELS)
        found = []
        for first in range(0, num_scenes, EVALUATION_BATCH):
            scenes = range(first, min(first + EVALUATION_BATCH, num_scenes))
            draws = ItemDraws(seed, [level * num_scenes + scene for scene in scenes], device)
            found.append(losses.velocity_error(list(scenes), torch.full((len(scenes),), timestep), draws))
        errors[timestep] = float(torch.cat(found).mean())
    return errors


def held_out_errors(
    stage: Stage, denoiser: Denoiser, memory: LatentMemory, config: DiffusionTrainingConfig
) -> dict[str, Any]:
    """Mean `velocity_errors` of a denoiser that knows maps, on held-out scenes, with their maps and without.

    Those of a flow, which are of another quantity, say so: `prediction_type` is "flow".

    Args:
        memory: of all scenes to judge by, with maps.
    """
    errors = {
        name: velocity_errors(stage, denoiser, memory, config, num_scenes=len(memory), with_map=with_map)
        for name, with_map in (("with_map", True), ("without_map", False))
    }
    kind = {"prediction_type": FLOW} if config.prediction_type == FLOW else {}
    return {
        name: {"mean": sum(found.values()) / len(found), "by_timestep": found} for name, found in errors.items()
    } | {"scenes": len(memory), **kind}


def load_denoiser(folder: Path) -> Denoiser | None:
    """A trained denoiser of a run folder; None if its training has not ended.

    Raises:
        UserInputError: if its files are broken.
    """
    folder = folder / DENOISER_FOLDER
    return _read_denoiser(folder) if (folder / "config.json").is_file() else None


def load_initial_denoiser(folder: Path, stage: Stage) -> Denoiser:
    """The denoiser of a stage of a finished training, given its output folder, or of a saved pipeline.

    Raises:
        UserInputError: if there is none, or its files are broken.
    """
    saved = folder / f"{stage}_denoiser" if (folder / PIPELINE_INDEX).is_file() else folder / stage / DENOISER_FOLDER
    if not (saved / "config.json").is_file():
        raise UserInputError(
            f"{saved} holds no trained denoiser: give the --output-dir of a finished training, a pipeline folder, or "
            "the name of a model that comes with this package."
        )
    return _read_denoiser(saved)


def _read_denoiser(folder: Path) -> Denoiser:
    path, weights = folder / "config.json", folder / WEIGHTS
    config = read_json(path)
    classes = {cls.__name__: cls for cls in DENOISERS.values()}
    name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(name, str) or name not in classes:
        raise UserInputError(f"{folder} holds no denoiser: delete it and run 'nfldm-train-diffusion' again.")
    return build_model(classes[name], config, path, read_safetensors(weights), weights)


def save_pipeline(
    output_dir: Path | str,
    scene_autoencoder: SceneAutoencoder,
    latent_autoencoder: LatentAutoencoder,
    temperatures: tuple[float, float, float] = (1.0, 1.0, 1.0),
    teacher: NFLDMPipeline | None = None,
) -> Path | None:
    """Saves `<output_dir>/pipeline` once all denoisers in `<output_dir>/{global,coarse,fine}` are trained.

    Args:
        temperatures: of g, c and f, the pipeline's default for sampling.
        teacher: the generator that denoisers were distilled from. Its own denoisers stand in for those that were not,
            and its stages 1 and 2 for those given, as its decoders may have been tuned since; contrasts make the
            latents of both vary alike (`matched_contrasts`).

    Returns:
        the pipeline's folder; None while a denoiser is missing.

    Raises:
        UserInputError: if the denoisers are of different trainings.
    """
    output_dir = Path(output_dir)
    stages = stages_of(latent_autoencoder)
    denoisers = {stage: load_denoiser(output_dir / stage) for stage in stages}
    trained = [stage for stage in stages if denoisers[stage] is not None]
    if not trained or (teacher is None and len(trained) < len(stages)):
        return None
    runs = {stage: read_json(output_dir / stage / "run.json") for stage in trained}
    if teacher is not None:
        return _save_student(output_dir, teacher, denoisers, runs)
    expected = model_hash(latent_autoencoder, latent_autoencoder.encoding)
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
    zero_snr = {bool(run.get("zero_terminal_snr")) for run in runs.values()}
    if len(zero_snr) > 1:
        raise UserInputError(
            f"Some denoisers in {output_dir} were trained with zero terminal SNR, others without: train them alike."
        )
    shifts = {run.get("flow_shift", 1.0) for run in runs.values()}
    if len(shifts) > 1:
        raise UserInputError(
            f"The denoisers in {output_dir} were trained with --flow-shift {' and '.join(map(str, sorted(shifts)))}: "
            "train them with one."
        )
    classes = [run.get("bev_classes", []) for run in runs.values()]
    if any(found != classes[0] for found in classes):
        without = [stage for stage, found in zip(runs, classes, strict=True) if not found]
        what = f"that of {without[0]} knows none" if without else "of different classes"
        raise UserInputError(
            f"Some denoisers in {output_dir} know BEV maps, {what}: train all with one --condition, on one collection."
        )
    told = {stage: bool(runs[stage]["model"].get("known_share")) for stage in stages if stage != "global"}
    if len(set(told.values())) > 1:
        raise UserInputError(
            f"Of the denoisers in {output_dir} that of {'f' if told['coarse'] else 'c'} is no outpainter: train both "
            "with --outpainting, or none."
        )
    components: dict[str, Any] = {f"{stage}_denoiser": denoisers.get(stage) for stage in STAGES}
    if any("distil_steps" in run for run in runs.values()):
        raise UserInputError(
            f"{output_dir} holds denoisers that were distilled: repeat the command that distilled them, with --distil."
        )
    components["scheduler"] = make_sampler(types.pop(), zero_snr.pop(), shifts.pop())
    components["bev_classes"] = [bev_class(entry) for entry in classes[0]]
    return _save(
        output_dir, assemble_pipeline(scene_autoencoder, latent_autoencoder, **components, temperatures=temperatures)
    )


def _save(output_dir: Path, pipeline: NFLDMPipeline) -> Path:
    with atomic_path(output_dir / "pipeline") as temporary:
        pipeline.save_pretrained(temporary)
    return output_dir / "pipeline"


def _save_student(
    output_dir: Path,
    teacher: NFLDMPipeline,
    denoisers: dict[Stage, Denoiser | None],
    runs: dict[Stage, dict[str, Any]],
) -> Path:
    """The teacher's pipeline with the denoisers that were distilled from its own, and as few steps as those take."""
    few = {run.get("distil_steps") for run in runs.values()}
    if len(few) > 1 or None in few:
        raise UserInputError(
            f"Some denoisers in {output_dir} were distilled to other numbers of steps than others, or not at all: "
            "distil all with one --distil-steps, in a folder of their own."
        )
    for stage, run in runs.items():
        if run["distilled_from"] != model_hash(getattr(teacher, f"{stage}_denoiser")):
            raise UserInputError(
                f"The denoiser in {output_dir / stage} was distilled from another generator: give --distil that one, "
                "or choose another --output-dir."
            )
    teacher.to("cpu")
    distilled = {f"{stage}_denoiser": found.eval() for stage, found in denoisers.items() if found is not None}
    pipeline = NFLDMPipeline(**{**teacher.components, **distilled, "default_steps": few.pop()})
    pipeline.register_to_config(contrasts=matched_contrasts(pipeline, teacher))
    return _save(output_dir, pipeline)
