"""`nfldm-train-diffusion`: stage 3."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from nfldm_ns.errors import UserInputError, exit_on_bad_input
from nfldm_ns.training.options import ScheduleOptions, is_first_process, looks_at_maps, process_device

if TYPE_CHECKING:
    from nfldm_ns.diffusion.joint_training import JointConfig
    from nfldm_ns.diffusion.pipeline import NFLDMPipeline
    from nfldm_ns.diffusion.training import Denoiser, Stage
    from nfldm_ns.latents.voxel_store import VoxelStore

HELD_OUT_SCENES = 64
KNOWN_SHARE = 0.75
VIEWS_GIB = 2.0  # of memory for the views that estimates are compared with
_OF_THE_TEACHER = {  # of a distillation, with what they are where they are not given
    "prediction_type": "v_prediction",
    "flow_shift": None,
    "zero_terminal_snr": True,
    "loss_weighting": None,
    "min_snr_gamma": None,
    "rendering_mult": None,
    "latent_perceptual_mult": None,
    "joint": False,
    "condition_dropout": None,
    "condition": "none",
    "bev_dropout": None,
    "outpainting": False,
}


@dataclass
class TrainDiffusion:
    """Train the denoisers of the global, the coarse and the fine latent; an interrupted run continues where it stopped.

    When all are there, they are saved as one pipeline. The trainings are independent: run them one after the other
    (all) or each on its own machine. The same command trains on a CPU or one GPU; on several GPUs or machines
    start it with `accelerate launch -m nfldm_ns.commands.train_diffusion`.
    """

    stage: tyro.conf.Positional[Literal["global", "coarse", "fine", "all"]]
    """Which denoiser."""
    voxels: Path
    """Encoded scenes, from nfldm-encode."""
    latent_autoencoder: Path
    """The run of nfldm-train-latent-ae, or a generator that has it inside."""
    output_dir: Path
    """One run folder per denoiser, and pipeline/ when all are trained."""
    preset: Literal["tiny", "rooms", "rooms128", "base", "paper", "streets-tiny", "streets", "streets-paper"] = "tiny"
    prediction_type: Literal["v_prediction", "epsilon", "sample", "flow"] = "v_prediction"
    """What the denoisers predict; epsilon needs `--no-zero-terminal-snr`, and flow trains them for a rectified flow
    instead of a diffusion, which has samplers of its own (FlowMatchEulerDiscreteScheduler, FlowMatchHeun...)."""
    flow_shift: float | None = None
    """Of a flow: above 1 noisy times are more frequent, in training and in sampling."""
    zero_terminal_snr: bool = True
    """Noise up to pure noise, which sampling starts from (Lin et al. 2024)."""
    loss_weighting: Literal["uniform", "min_snr"] | None = None
    """Of timesteps: all alike, or min-SNR-gamma (Hang et al. 2023)."""
    min_snr_gamma: float | None = None
    """gamma of min_snr."""
    rendering_mult: float | None = None
    """Weight of a further loss of the denoisers of c and f: what their estimates look like, rendered at views of the
    scenes (DiffRF). 0 by default; costs time."""
    latent_perceptual_mult: float | None = None
    """Weight of another one: how much what stage 2's decoder makes of their estimates in its hidden layers differs from
    what it makes of the true latents (latent perceptual loss). 0 by default."""
    joint: bool = False
    """Optimise c and f of the training scenes, too, under rendering and diffusion losses together (SSDNeRF's single
    stage); they begin as the encoder's. Train c before f. Costs time, and space in checkpoints."""
    joint_learning_rate: float | None = None
    """Of these codes, in their standard deviations (0.01 by default)."""
    joint_prior_mult: float | None = None
    """Weight of what the denoisers think of the codes, beside the error of rendered views (0.3 by default)."""
    joint_steps: int | None = None
    """Steps of the codes in each pass, with one gradient of the prior (2 by default)."""
    condition_dropout: float | None = None
    """Share of scenes whose code g the denoisers of c and f do not see, for `guidance_scale` in sampling."""
    condition: Literal["none", "bev"] = "none"
    """bev: the denoisers also see the collection's semantic maps, for `nfldm-sample --bev`; one model then samples with
    and without a map."""
    bev_dropout: float | None = None
    """Share of scenes whose map they do not see (0.15 by default), drawn apart from `--condition-dropout`."""
    outpainting: bool = False
    """Train the denoisers of c and f to be told a part of the scene that is known already, for nfldm-world and
    nfldm-edit resample; one model then samples whole scenes, too. With `--initial-weights` of a generator that cannot,
    it learns that in addition."""
    known_share: float | None = None
    """Share of scenes of which a part is known (0.75 by default), with `--outpainting`."""
    initial_weights: Path | None = None
    """What to begin from, of the same preset and options (but `--outpainting`, which may be new): the output folder of
    an earlier training, a pipeline folder, or the name of a model that comes with this package."""
    distil: Path | None = None
    """A trained generator, or the name of one that comes with this package, whose denoisers learn to sample in few
    steps what they sample in its default steps now. What they know and predict is the generator's, and of the preset
    the trainings count. Denoisers that are not distilled stay as they are, so that `global`, which needs it most, may
    be enough."""
    distil_steps: int = 4
    """Steps per latent that are left."""
    quarter_turns: bool | None = None
    """Also learn from the scenes turned by multiples of 90 degrees."""
    ema_profiles: tuple[float, ...] = ()
    """Relative lengths, such as 0.05 0.1, of averages of the weights that are kept for a choice afterwards (EDM2)."""
    ema_snapshot_every: int | None = None
    """Steps between snapshots of them in the run folders; by default as many as between checkpoints."""
    ema_length: float | None = None
    """Keep the average of this relative length, made of the snapshots: run the finished command again with another."""
    schedule: tyro.conf.OmitArgPrefixes[ScheduleOptions] = field(default_factory=ScheduleOptions)

    def run(self) -> None:
        from nfldm_ns.autoencoder.scene_sampler import SceneCache
        from nfldm_ns.diffusion.distillation import Shortening, require_same_latents
        from nfldm_ns.diffusion.joint_training import with_codes_of_run
        from nfldm_ns.diffusion.latent_memory import encode_latents
        from nfldm_ns.diffusion.training import (
            held_out_errors,
            kind_of_sampler,
            save_pipeline,
            stages_of,
            train_denoiser,
        )
        from nfldm_ns.latents.latent_autoencoder import load_latent_autoencoder
        from nfldm_ns.latents.voxel_store import VoxelStore
        from nfldm_ns.method_configs.latent_presets import DIFFUSION_PRESETS
        from nfldm_ns.models import resolve_model
        from nfldm_ns.scenes.writing import write_json

        self._known_share(), self._joint_config()  # bad input is found before anything is read
        teachers = self._teachers()
        store = VoxelStore.open(self.voxels)
        latent_autoencoder = load_latent_autoencoder(resolve_model(self.latent_autoencoder))
        self._require_its_voxels(store)
        if teachers is not None:
            require_same_latents(str(self.distil), teachers.latent_autoencoder, latent_autoencoder)
        latent_autoencoder.to(process_device())
        preset = DIFFUSION_PRESETS[self.preset]
        turns = preset.quarter_turns if self.quarter_turns is None else self.quarter_turns
        with_maps = looks_at_maps(self.condition, self.bev_dropout)
        if teachers is not None:
            with_maps = teachers.bev_size is not None
        memory = encode_latents(store, latent_autoencoder, store.splits["train"], turns, with_maps=with_maps)
        held_out = None
        if with_maps and store.splits["test"] and teachers is None:  # a student's v is of longer steps
            scenes, cameras = store.splits["test"][:HELD_OUT_SCENES], memory.num_cameras
            held_out = encode_latents(store, latent_autoencoder, scenes, False, cameras, with_maps=True)
        scene_autoencoder = store.load_autoencoder()
        seen = bool(self.rendering_mult) or self.joint
        views = (SceneCache(store.load_collection(), VIEWS_GIB), store.splits["train"]) if seen else None
        given = {**self.schedule.given(), "ema_profiles": tuple(self.ema_profiles)}
        if self.ema_snapshot_every is not None:
            given["ema_snapshot_every"] = self.ema_snapshot_every
        names = (
            *("prediction_type", "flow_shift", "zero_terminal_snr", "loss_weighting", "min_snr_gamma"),
            *("condition_dropout", "condition", "bev_dropout", "ema_length", "rendering_mult"),
            "latent_perceptual_mult",
        )
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        changes |= {"known_share": self._known_share(), "joint": self._joint_config()}
        if teachers is not None:
            changes |= kind_of_sampler(teachers.scheduler)
        for stage in stages_of(latent_autoencoder) if self.stage == "all" else (self.stage,):
            training = preset.training[stage]
            training = replace(training, schedule=replace(training.schedule, **given), **changes)
            given_to_all = (memory, latent_autoencoder, self.output_dir / stage, preset.models[stage], training)
            if self.joint and stage == "fine":
                known = with_codes_of_run(memory, self.output_dir / "coarse", latent_autoencoder)
                given_to_all = (known, *given_to_all[1:])
            denoiser = train_denoiser(
                stage,
                *given_to_all,
                scene_autoencoder=scene_autoencoder,
                initial=self._initial(stage),
                shortening=None if teachers is None else Shortening.of(teachers, stage, self.distil_steps),
                views=views,
            )
            if held_out is not None and is_first_process():
                errors = held_out_errors(stage, denoiser, held_out, training)
                write_json(self.output_dir / stage / "held_out.json", errors)
                told = ", ".join(f"{errors[k]['mean']:.4f} {k.replace('_', ' ')}" for k in ("with_map", "without_map"))
                what = "the flow" if self.prediction_type == "flow" else "v"
                print(f"Mean squared error of {what} on {errors['scenes']} held-out scenes, {stage}: {told}")
        if not is_first_process():
            return
        saved = save_pipeline(
            self.output_dir, scene_autoencoder, latent_autoencoder, preset.temperatures, teacher=teachers
        )
        print(f"The pipeline is in {saved}" if saved else f"Still to train: the other denoisers in {self.output_dir}")

    def _known_share(self) -> float:
        if self.known_share is not None and not self.outpainting:
            raise UserInputError("--known-share is of what --outpainting tells denoisers: add it.")
        if not self.outpainting:
            return 0.0
        share = KNOWN_SHARE if self.known_share is None else self.known_share
        if not 0 < share <= 1:
            raise UserInputError(f"--known-share is {share:g}: give a share of the scenes, above 0 and at most 1.")
        return share

    def _joint_config(self) -> "JointConfig | None":
        from nfldm_ns.diffusion.joint_training import JointConfig

        names = ("learning_rate", "prior_mult", "steps")
        given = {name: getattr(self, f"joint_{name}") for name in names if getattr(self, f"joint_{name}") is not None}
        if not self.joint:
            if given:
                option = f"--joint-{next(iter(given)).replace('_', '-')}"
                raise UserInputError(f"{option} is of the codes that --joint optimises: add it.")
            return None
        config = JointConfig(**given)
        config.check()
        return config

    def _teachers(self) -> "NFLDMPipeline | None":
        """The generator that is distilled.

        Raises:
            UserInputError: if there is none, or it cannot be.
        """
        if self.distil is None:
            return None
        from nfldm_ns.diffusion.distillation import check_distillable
        from nfldm_ns.diffusion.pipeline import load_pipeline

        if self.initial_weights is not None:
            raise UserInputError("--distil begins with the weights of its teacher: leave out --initial-weights.")
        given = [name for name, plain in _OF_THE_TEACHER.items() if getattr(self, name) != plain]
        if given:
            raise UserInputError(
                f"--distil takes what denoisers know and predict from its generator: leave out "
                f"{', '.join('--' + name.replace('_', '-') for name in given)}."
            )
        pipeline = load_pipeline(self.distil)
        check_distillable(str(self.distil), pipeline, self.distil_steps)
        return pipeline

    def _initial(self, stage: "Stage") -> "Denoiser | None":
        from nfldm_ns.diffusion.training import load_initial_denoiser
        from nfldm_ns.models import resolve_model

        if self.initial_weights is None:
            return None
        return load_initial_denoiser(resolve_model(self.initial_weights), stage)

    def _require_its_voxels(self, store: "VoxelStore") -> None:
        """Raises `UserInputError` where the run of stage 2 says that it learned voxels of another stage 1."""
        from nfldm_ns.scenes.collection import read_json

        path = self.latent_autoencoder / "run.json"
        if path.is_file() and read_json(path).get("scene_autoencoder") != store.autoencoder_hash:
            raise UserInputError(
                f"{self.latent_autoencoder} was trained on voxels of another scene auto-encoder than those in "
                f"{store.root}: give the voxels it was trained on."
            )


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    command = tyro.cli(TrainDiffusion, prog="nfldm-train-diffusion", args=args)
    with exit_on_bad_input():
        command.run()


if __name__ == "__main__":
    main()
