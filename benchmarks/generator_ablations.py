"""Variants of stages 2 and 3 trained equally long on the same encoded scenes, judged by the scenes they sample.

    python benchmarks/generator_ablations.py --voxels VOXELS --group levels --output-dir OUT [--seeds 0 1]
    python benchmarks/generator_ablations.py --voxels VOXELS --group joint --latent-autoencoder RUN --output-dir OUT \
        --denoiser-seconds 60 600 600

`levels` is the paper's ablation of the hierarchy: c alone, c and f, c and f and g. Each has a latent auto-encoder of
its own, trained from nothing on the same voxels, and denoisers of its own. `equivariance` (EQ-VAE) trains the latent
auto-encoder differently, too, from nothing or from `--initial-latent-autoencoder` on. `weighting`, `prediction` and
`averages` (of the weights, chosen afterwards as in EDM2; they share one training) are ways to train denoisers over one
latent auto-encoder. All else is the preset (`--base`), its schedules cut to `--latent-steps` and `--denoiser-steps`.

`joint` compares SSDNeRF's joint training of codes and denoisers (`nfldm-train-diffusion --joint`), and DiffRF's loss
of renderings, with two stages. Their steps cost more: `--denoiser-seconds` gives all the same time instead.

Prints FID and KID of sampled scenes to real test views, beside those of test scenes after both auto-encoders and of
real views of training scenes. The held-out loss is the squared error of v, unweighted, whatever was predicted and
however it was weighted (`velocity_errors`); it can be compared where the latents are the same, but for that of flows,
which is of another quantity.

Each variant leaves `<group>-<variant>-seed<seed>.json`, and what it was made from in `runs/`. An interrupted run
continues; models that variants or groups have in common are trained once.

Needs the weights of FID's Inception and of LPIPS (`nfldm-weights get fid-inception`, `lpips-vgg`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from latent_ablations import GROUPS as LATENT_GROUPS
from latent_ablations import Change, model_arguments, open_store, settings
from torch import nn

from nfldm_ns.autoencoder.scene_sampler import SceneCache
from nfldm_ns.diffusion.joint_training import JointConfig, with_codes_of_run
from nfldm_ns.diffusion.latent_memory import LatentMemory, encode_latents
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, load_pipeline
from nfldm_ns.diffusion.training import (
    STAGES,
    DiffusionTrainingConfig,
    Stage,
    load_denoiser,
    save_pipeline,
    stages_of,
    train_denoiser,
    velocity_errors,
)
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.latent_autoencoder import MODEL_FOLDER, LatentAutoencoder, load_latent_autoencoder
from nfldm_ns.latents.training import LatentTrainingConfig, train_latent_autoencoder
from nfldm_ns.latents.voxel_store import VoxelStore
from nfldm_ns.method_configs.latent_presets import DIFFUSION_PRESETS, LATENT_PRESETS
from nfldm_ns.pretrained.weights import load_lpips
from nfldm_ns.reports.report import Table
from nfldm_ns.scenes.collection import read_json
from nfldm_ns.training.identity import model_hash
from nfldm_ns.training.options import MixedPrecision, precision_here
from nfldm_ns.training.schedule import Schedule
from shared.comparisons import VariantOptions, find_result, fingerprint, stored
from shared.running import run
from shared.sampled_views import SampleJudge, SampleOptions, work_device


@dataclass(frozen=True)
class Variant:
    """Changes to a preset.

    Attributes:
        model: of the arguments of `LatentAutoencoder`.
        losses: of `LatentLossConfig`.
        training: of `DiffusionTrainingConfig`, for all denoisers.
        profiles: `ema_profiles` of the denoisers' schedules.
    """

    model: Change = field(default_factory=settings)
    losses: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    profiles: tuple[float, ...] = ()


EMA_PROFILES = (0.05, 0.1)
GROUPS: dict[str, dict[str, Variant]] = {
    "levels": {name: Variant(change) for name, change in LATENT_GROUPS["levels"].items()},
    "weighting": {name: Variant(training={"loss_weighting": name}) for name in ("uniform", "min_snr")},
    "prediction": {
        "v": Variant(),
        "sample": Variant(training={"prediction_type": "sample"}),
        "v, some terminal SNR": Variant(training={"zero_terminal_snr": False}),
        "epsilon, some terminal SNR": Variant(training={"prediction_type": "epsilon", "zero_terminal_snr": False}),
        "flow": Variant(training={"prediction_type": "flow"}),
        "v, latent perceptual loss": Variant(training={"latent_perceptual_mult": 0.3}),
    },
    "averages": {
        "usual": Variant(profiles=EMA_PROFILES),
        **{
            f"length {length}": Variant(training={"ema_length": length}, profiles=EMA_PROFILES)
            for length in (0.03, 0.06, 0.12, 0.24)
        },
    },
    "equivariance": {
        "plain": Variant(),
        **{f"weight {weight}": Variant(losses={"equivariance_mult": weight}) for weight in (0.25, 1.0)},
    },
    "joint": {
        "two stages": Variant(),
        "joint": Variant(training={"joint": JointConfig()}),
        "rendering loss": Variant(training={"rendering_mult": 0.3}),
    },
}
OF_STAGE_2 = ("levels", "equivariance")
"""Groups that change the latent auto-encoder."""
OF_C_AND_F = ("joint", "rendering_mult", "latent_perceptual_mult")
"""Of a training, what does not concern psi_g: it has neither views nor a decoder to be judged by."""
UNTIL_TIME_IS_OVER = 10**7  # steps
VIEWS_GIB = 1.0  # of memory, for views that codes or estimates are compared with
PAPER = {"levels": {"c": 46.43, "c + f": 43.52, "c + f + g": 35.69}}
"""FID in the paper's ablation of the hierarchy, of Carla."""


@dataclass(kw_only=True)
class Options(VariantOptions, SampleOptions):
    """Train and compare variants of stages 2 and 3."""

    voxels: Path
    """encoded scenes, from nfldm-encode"""
    latent_autoencoder: Path | None = None
    """a run of nfldm-train-latent-ae to use as it is, in groups that do not change stage 2"""
    initial_latent_autoencoder: Path | None = None
    """a run or pipeline whose stage 2 is trained on in the group equivariance; by default it begins from nothing"""
    latent_steps: int | None = None
    """training steps of each latent auto-encoder; by default the preset's"""
    denoiser_steps: tuple[int, int, int] | None = None
    """training steps of the denoisers of g, c and f; by default the preset's"""
    denoiser_seconds: tuple[float, float, float] | None = None
    """time of the trainings of g, c and f instead of steps, which then depend on the machine"""
    mixed_precision: MixedPrecision | None = None
    """of the denoisers' trainings; by default the preset's"""
    temperatures: tuple[float, float, float] | None = None
    """of the initial noise of g, c and f; by default the preset's"""

    def latent_training(self, variant: Variant, seed: int) -> LatentTrainingConfig:
        """Training of stage 2."""
        training = LATENT_PRESETS[self.base].training
        schedule = cut(training.schedule, self.latent_steps, seed)
        precision = precision_here(None) or schedule.mixed_precision
        losses = replace(training.losses, **variant.losses)
        return replace(training, schedule=replace(schedule, mixed_precision=precision), losses=losses)

    def denoiser_training(self, variant: Variant, seed: int) -> dict[Stage, DiffusionTrainingConfig]:
        """Trainings of stage 3."""
        steps = dict(zip(STAGES, self.denoiser_steps or (None,) * 3, strict=True))
        seconds = dict(zip(STAGES, self.denoiser_seconds or (None,) * 3, strict=True))
        return {
            stage: replace(
                training,
                schedule=replace(
                    self._schedule(training.schedule, steps[stage], seconds[stage], seed), ema_profiles=variant.profiles
                ),
                **(variant.training if stage != "global" else of_global(variant.training)),
            )
            for stage, training in DIFFUSION_PRESETS[self.base].training.items()
        }

    def _schedule(self, schedule: Schedule, max_steps: int | None, seconds: float | None, seed: int) -> Schedule:
        precision = precision_here(self.mixed_precision) or schedule.mixed_precision
        if seconds is not None and max_steps is None:
            max_steps = UNTIL_TIME_IS_OVER
        return replace(cut(schedule, max_steps, seed), mixed_precision=precision, time_budget_s=seconds)


def of_global(training: dict[str, Any]) -> dict[str, Any]:
    """What of it concerns psi_g."""
    return {name: value for name, value in training.items() if name not in OF_C_AND_F}


def cut(schedule: Schedule, max_steps: int | None, seed: int) -> Schedule:
    return replace(schedule, max_steps=schedule.max_steps if max_steps is None else max_steps, seed=seed)


@dataclass
class Trainer:
    """Trains generators; what was made with the same settings is not made again.

    Attributes:
        folder: for the runs, `stage2-<fingerprint of its settings>` and `stage3-<...>`.
    """

    store: VoxelStore
    folder: Path
    _encoded: tuple[tuple[str, bool], LatentMemory] | None = None

    def stage2(
        self, model_config: dict[str, Any], training: LatentTrainingConfig, initial: LatentAutoencoder | None
    ) -> LatentAutoencoder:
        """A latent auto-encoder trained from nothing, or from `initial` on."""
        made_with = {"voxels": self.voxels, "model": model_config, "training": asdict(training)}
        if initial is not None:
            made_with["initial"] = model_hash(initial)
        run = self._run("stage2", made_with)
        if not (run / MODEL_FOLDER).is_dir():
            lpips = self.lpips if training.losses.lpips_mult else None
            train_latent_autoencoder(self.store, run, model_config, training, lpips=lpips, initial=initial)
        return load_latent_autoencoder(run)

    def stage3(
        self,
        latent_autoencoder: LatentAutoencoder,
        models: Mapping[Stage, dict[str, Any]],
        training: Mapping[Stage, DiffusionTrainingConfig],
        quarter_turns: bool,
    ) -> Path:
        """The run with trained denoisers of all latents there are, and the pipeline.

        Runs that differ in the length of their averages alone are one.
        """
        stages = stages_of(latent_autoencoder)
        made_with = {
            "voxels": self.voxels,
            "latent_autoencoder": model_hash(latent_autoencoder),
            "models": {stage: models[stage] for stage in stages},
            "training": {stage: asdict(replace(training[stage], ema_length=None)) for stage in stages},
            "quarter_turns": quarter_turns,
        }
        run = self._run("stage3", made_with)
        averaged = any(training[stage].schedule.ema_profiles for stage in stages)
        if missing := [stage for stage in stages if averaged or load_denoiser(run / stage) is None]:
            memory = self._memory(latent_autoencoder, quarter_turns)
            for stage in missing:
                known, config = memory, training[stage]
                if stage == "fine" and config.joint:
                    known = with_codes_of_run(memory, run / "coarse", latent_autoencoder)
                train_denoiser(
                    stage, known, latent_autoencoder, run / stage, models[stage], config, **self._views_for(config)
                )
        if averaged or not (run / "pipeline").is_dir():
            save_pipeline(run, self.store.load_autoencoder(), latent_autoencoder)
        return run

    def _views_for(self, config: DiffusionTrainingConfig) -> dict[str, Any]:
        """What trainings that look at views need besides."""
        if not (config.joint or config.rendering_mult):
            return {}
        views = SceneCache(self.store.load_collection(), VIEWS_GIB), self.store.splits["train"]
        return {"scene_autoencoder": self.store.load_autoencoder(), "views": views}

    def _memory(self, latent_autoencoder: LatentAutoencoder, quarter_turns: bool) -> LatentMemory:
        """Latents of the training scenes; the last ones are kept, as variants that share them follow each other."""
        wanted = (model_hash(latent_autoencoder), quarter_turns)
        if self._encoded is None or self._encoded[0] != wanted:
            latent_autoencoder.to(work_device())
            scenes = self.store.splits["train"]
            self._encoded = (wanted, encode_latents(self.store, latent_autoencoder, scenes, quarter_turns))
        return self._encoded[1]

    @property
    def voxels(self) -> dict[str, Any]:
        """What the models learn from."""
        return {"scene_autoencoder": self.store.autoencoder_hash, "scenes": self.store.splits["train"]}

    @cached_property
    def lpips(self) -> nn.Module:
        return load_lpips("vgg").to(work_device())

    def _run(self, kind: str, made_with: dict[str, Any]) -> Path:
        run = self.folder / f"{kind}-{fingerprint(made_with)}"
        stored(run / "settings.json", made_with, dict)
        return run


def held_out_losses(
    pipeline: NFLDMPipeline, store: VoxelStore, training: Mapping[Stage, DiffusionTrainingConfig]
) -> dict[str, Any]:
    """`velocity_errors` of each denoiser on test scenes, and their `mean`, by latent."""
    model = pipeline.latent_autoencoder
    num_cameras = pipeline.global_denoiser.config.num_cameras
    memory = encode_latents(store, model, store.splits["test"], quarter_turns=False, num_cameras=num_cameras)
    losses: dict[str, Any] = {}
    for stage in stages_of(model):
        denoiser = getattr(pipeline, f"{stage}_denoiser")
        errors = velocity_errors(stage, denoiser, memory, training[stage], num_scenes=len(memory))
        losses[stage] = {"mean": sum(errors.values()) / len(errors), "by_timestep": errors}
    return losses


def training_minutes(run: Path, stages: tuple[Stage, ...]) -> float:
    """Wall time of the denoisers' trainings, over all interruptions."""
    states = [state for stage in stages for state in run.glob(f"{stage}/checkpoint-*/state.json")]
    return sum(read_json(state)["seconds"] for state in states) / 60


@dataclass
class Comparison:
    """All that the variants of a group have in common."""

    options: Options
    store: VoxelStore
    judge: SampleJudge
    trainer: Trainer
    latent_autoencoder: LatentAutoencoder | None
    initial: LatentAutoencoder | None
    temperatures: tuple[float, float, float]

    def settings(self, variant: Variant, seed: int) -> dict[str, Any]:
        """Everything that the result of a variant depends on."""
        options, given = self.options, self.latent_autoencoder
        model = model_arguments(LATENT_PRESETS[options.base], variant.model)
        stage2 = {"model": model, "training": asdict(options.latent_training(variant, seed))}
        if self.initial is not None:
            stage2["initial"] = model_hash(self.initial)
        return {
            "voxels": self.trainer.voxels,
            "latent_autoencoder": model_hash(given) if given else stage2,
            "denoisers": DIFFUSION_PRESETS[options.base].models,
            "training": {name: asdict(config) for name, config in options.denoiser_training(variant, seed).items()},
            "temperatures": self.temperatures,
            "num_inference_steps": options.num_inference_steps,
            "judged": self.judge.protocol,
        }

    def run(self, variant: Variant, seed: int) -> dict[str, Any]:
        """Trains and judges a variant, unless another group did."""
        if (known := find_result(self.options.output_dir, self.settings(variant, seed))) is not None:
            return known
        preset, training = DIFFUSION_PRESETS[self.options.base], self.options.denoiser_training(variant, seed)
        stage2 = self.latent_autoencoder
        if stage2 is None:
            model_config = model_arguments(LATENT_PRESETS[self.options.base], variant.model)
            stage2 = self.trainer.stage2(model_config, self.options.latent_training(variant, seed), self.initial)
        run = self.trainer.stage3(stage2, preset.models, training, preset.quarter_turns)
        pipeline = load_pipeline(run / "pipeline")
        pipeline.register_to_config(temperatures=self.temperatures)
        stages = stages_of(stage2)
        judged = run / (f"judged-{variant.training['ema_length']}" if "ema_length" in variant.training else "judged")
        samples, reconstructions = (look(pipeline, judged) for look in (self.judge.samples, self.judge.reconstructions))
        return {
            "distances": self.judge.distances(samples=samples, stage2=reconstructions),
            "distances_to_train": self.judge.distances(to="train", samples=samples),
            "held_out": held_out_losses(pipeline, self.store, training),
            "parameters": {s: sum(p.numel() for p in getattr(pipeline, f"{s}_denoiser").parameters()) for s in stages},
            "denoiser_minutes": round(training_minutes(run, stages), 2),
        }


def prepare(options: Options) -> Comparison:
    """Checks the options, before anything long begins.

    Raises:
        UserInputError: for what cannot be.
    """
    steps = [options.latent_steps, *(options.denoiser_steps or ())]
    if any(not 0 < seconds < float("inf") for seconds in options.denoiser_seconds or ()):
        raise UserInputError("--denoiser-seconds must be finite and above 0: give other numbers.")
    if any(count is not None and count < 1 for count in steps):
        raise UserInputError("--latent-steps and --denoiser-steps must be at least 1: give larger numbers.")
    given = None
    if options.latent_autoencoder is not None:
        if options.group in OF_STAGE_2:
            raise UserInputError(
                f"The group {options.group} trains a latent auto-encoder for each variant: leave out "
                "--latent-autoencoder."
            )
        given = load_latent_autoencoder(options.latent_autoencoder)
    initial = None
    if options.initial_latent_autoencoder is not None:
        if options.group != "equivariance":
            raise UserInputError("--initial-latent-autoencoder is for the group equivariance alone: leave it out.")
        initial = load_latent_autoencoder(options.initial_latent_autoencoder)
    store = open_store(options.voxels)
    judge = SampleJudge(store.load_collection(), options.output_dir, options.evaluation_settings())
    temperatures = options.temperatures or DIFFUSION_PRESETS[options.base].temperatures
    return Comparison(options, store, judge, Trainer(store, options.output_dir / "runs"), given, initial, temperatures)


def main(options: Options) -> None:
    variants = options.begin(GROUPS, LATENT_PRESETS)
    comparison = prepare(options)
    judge, published = comparison.judge, PAPER.get(options.group)
    floor = stored(options.output_dir / "floor.json", judge.protocol, judge.floor)
    rows: list[list[Any]] = [["real training views", None, floor["fid"]["train"], floor["kid"]["train"], *[None] * 7]]
    for name, variant in variants.items():
        for seed in options.seeds:
            made_with = comparison.settings(variant, seed)
            result = stored(options.result(name, seed), made_with, partial(comparison.run, variant, seed))
            rows.append([name, seed, *cells(result)])
            print(f"{options.result(name, seed)}: FID {result['distances']['fid']['samples']:.1f}", flush=True)
    columns, digits = COLUMNS, DIGITS
    if published is not None:
        rows = [[*row, published.get(row[0])] for row in rows]
        columns, digits = (*COLUMNS, "the paper's FID, of Carla"), (*DIGITS, 2)
    caption = f"`{options.group}` with the preset `{options.base}`, {judge.settings.num_images} images in each set."
    print("\n" + Table(columns, rows, caption, digits=digits).markdown())


COLUMNS = (
    "",
    "seed",
    "FID of samples",
    "KID of samples",
    "KID to training views",
    "FID of stage 2",
    "KID of stage 2",
    "held-out loss of g",
    "of c",
    "of f",
    "minutes of stage 3",
)
DIGITS = (0, 0, 1, 4, 4, 1, 4, 4, 4, 4, 1)


def cells(result: dict[str, Any]) -> list[float | None]:
    """A result in the order of the columns."""
    fid, kid = result["distances"]["fid"], result["distances"]["kid"]
    to_train = result["distances_to_train"]["kid"]["samples"]
    distances = [fid["samples"], kid["samples"], to_train, fid["stage2"], kid["stage2"]]
    losses = [result["held_out"].get(stage, {}).get("mean") for stage in STAGES]
    return [*distances, *losses, result["denoiser_minutes"]]


if __name__ == "__main__":
    run(main, Options, __doc__)
