"""All that decides what the demo computes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nfldm_ns.collect.doom_collection import CollectionOptions
from nfldm_ns.demo.shares import TIME_SHARES
from nfldm_ns.diffusion.training import DiffusionTrainingConfig, Stage
from nfldm_ns.latents.training import LatentTrainingConfig

METHOD = "nfldm-scene-ae-tiny"
GIB_PER_SCALE = 5.0  # of a GPU's memory, for once the presets' batches
TRAININGS = ("stage1", "stage2", "stage3")  # stages whose time grows with their steps


@dataclass(frozen=True)
class DemoSettings:
    """Sizes and lengths of all stages; step counts are fixed, so that the same seed gives the same result.

    Attributes:
        collection: the domain, and how many scenes of it.
        scene_autoencoder_steps: training steps of stage 1.
        scene_autoencoder_preset: the numbers behind the method, for the record: other numbers, another run.
        scene_autoencoder_options: further options of `ns-train`.
        scene_autoencoder_method: of nerfstudio.
        latent_model: arguments of `LatentAutoencoder`.
        latent_training: training of stage 2.
        denoiser_models: sizes of the denoisers.
        denoiser_training: their trainings.
        quarter_turns: whether the denoisers learn from turned scenes, too.
        temperatures: of g, c and f in sampling, see `NFLDMPipeline`.
        denoiser_shares: how long each of them trains, relative to the others.
        denoiser_processes: how many denoisers train side by side (one after the other on a GPU).
        num_scenes: generated scenes that are written as folders.
        num_shipped_scenes: scenes of the model that comes with the package, to compare with.
        num_inference_steps: denoising steps of each latent.
        num_images: images per set for FID and KID, and held-out views that are judged.
        views_per_scene: how many of them show one scene.
        video_frames: of each fly-through.
        expected_seconds: by stage, on two CPU cores: for the remaining time at the start, and to choose a length.
        reference_gflops: speed of those cores (`measure_gflops`).
        length: share of the trainings' steps that is left.
        encode_all_views: whether training places are encoded from all of their views.
        encode_batch: scenes encoded at once.
        all_cores: whether data is made and read with all cores of the machine.
        half_precision: whether the generator is also left in half precision.
        time_budget_s: ends all stages after so many seconds; results then depend on the machine's speed.
        for_gpu: whether precision and batches follow the device, which is to be a GPU.
    """

    collection: CollectionOptions
    scene_autoencoder_steps: int
    latent_model: Mapping[str, Any]
    latent_training: LatentTrainingConfig
    denoiser_models: Mapping[Stage, Mapping[str, Any]]
    denoiser_training: Mapping[Stage, DiffusionTrainingConfig]
    denoiser_shares: Mapping[Stage, float] = field(default_factory=lambda: {"global": 0.1, "coarse": 1.0, "fine": 1.0})
    scene_autoencoder_preset: Mapping[str, Any] = field(default_factory=dict)
    scene_autoencoder_options: tuple[str, ...] = ()
    quarter_turns: bool = True
    temperatures: tuple[float, float, float] = (1.0, 1.0, 1.0)
    denoiser_processes: int = 2
    num_scenes: int = 8
    num_shipped_scenes: int = 4
    num_inference_steps: int = 30
    num_images: int = 128
    views_per_scene: int = 4
    video_frames: int = 48
    expected_seconds: Mapping[str, float] = field(default_factory=dict)
    reference_gflops: float = 190.0
    length: float = 1.0
    scene_autoencoder_method: str = METHOD
    encode_all_views: bool = False
    encode_batch: int = 1
    all_cores: bool = False
    half_precision: bool = False
    time_budget_s: float | None = None
    for_gpu: bool = False

    @property
    def with_maps(self) -> bool:
        """Whether denoisers see semantic maps."""
        return any(training.condition == "bev" for training in self.denoiser_training.values())

    def on_device(self, device: str, memory_gib: float = 0.0) -> DemoSettings:
        """The same for the device, if it is made for a GPU: half precision and large batches there alone.

        Args:
            memory_gib: of the GPU.
        """
        if not self.for_gpu:
            return self
        cuda = device == "cuda"
        scale, precision = (batch_scale(memory_gib), "bf16") if cuda else (1, "no")  # a CPU is slow in bf16
        scenes = self.scene_autoencoder_preset["sampling"]["scenes_per_batch"] * scale
        options = (
            *("--pipeline.model.precision", "bf16" if cuda else "fp32"),
            *("--pipeline.datamanager.sampling.scenes-per-batch", str(scenes)),
        )
        return replace(
            self,
            scene_autoencoder_options=(*self.scene_autoencoder_options, *options),
            encode_batch=self.encode_batch * scale,
            latent_training=_scaled(self.latent_training, scale, precision),
            denoiser_training={name: _scaled(t, scale, precision) for name, t in self.denoiser_training.items()},
        )

    def within(self, time_budget_s: float) -> DemoSettings:
        """The same in so many seconds, shared out by `TIME_SHARES`."""
        expected = {name: time_budget_s * share for name, share in TIME_SHARES.items()}
        return replace(self, time_budget_s=time_budget_s, expected_seconds=expected)

    def with_seed(self, seed: int) -> DemoSettings:
        """The same with one seed for everything."""
        scenes = replace(self.collection.scenes, seed=seed)
        return replace(
            self,
            collection=replace(self.collection, scenes=scenes),
            latent_training=_seeded(self.latent_training, seed),
            denoiser_training={name: _seeded(training, seed) for name, training in self.denoiser_training.items()},
        )

    def with_length(self, share: float) -> DemoSettings:
        """The same with a share of the steps of all trainings."""
        if share == 1:
            return self
        start = self.scene_autoencoder_preset.get("loss", {}).get("adversarial_start", 0)
        options = ("--pipeline.model.loss.adversarial-start", str(round(start * share)))
        seconds = {name: value * (share if name in TRAININGS else 1) for name, value in self.expected_seconds.items()}
        return replace(
            self,
            scene_autoencoder_steps=_shortened(self.scene_autoencoder_steps, share),
            scene_autoencoder_options=(*self.scene_autoencoder_options, *options),
            latent_training=_with_steps(self.latent_training, share),
            denoiser_training={name: _with_steps(training, share) for name, training in self.denoiser_training.items()},
            expected_seconds=seconds,
            length=self.length * share,
        )


def batch_scale(memory_gib: float) -> int:
    """How many times the batches of the presets, which were made for two CPU cores, fit a GPU: 1, 2, 4 or 8."""
    return next((scale for scale in (8, 4, 2) if memory_gib >= GIB_PER_SCALE * scale), 1)


def _scaled(training: Any, scale: int, precision: str) -> Any:
    schedule = training.schedule
    return replace(
        training,
        schedule=replace(schedule, batch_size=schedule.batch_size * scale, mixed_precision=precision),
    )


def _shortened(steps: int, share: float) -> int:
    return max(1, round(steps * share))


def _with_steps(training: Any, share: float) -> Any:
    steps = _shortened(training.schedule.max_steps, share)
    return replace(training, schedule=replace(training.schedule, max_steps=steps))


def _seeded(training: Any, seed: int) -> Any:
    return replace(training, schedule=replace(training.schedule, seed=seed))


def plain(value: Any) -> Any:
    """Settings as JSON."""
    return json.loads(json.dumps(value, default=lambda v: str(v) if isinstance(v, Path) else asdict(v)))


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that change with any of the settings."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:16]
