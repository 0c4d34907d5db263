"""All that decides what the demo computes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nfldm_ns.collect.doom_collection import CollectionOptions
from nfldm_ns.diffusion.training import DiffusionTrainingConfig, Stage
from nfldm_ns.latents.training import LatentTrainingConfig

TRAININGS = ("stage1", "stage2", "stage3")  # stages whose time grows with their steps


@dataclass(frozen=True)
class DemoSettings:
    """Sizes and lengths of all stages; step counts are fixed, so that the same seed gives the same result.

    Attributes:
        collection: the domain, and how many scenes of it.
        scene_autoencoder_steps: training steps of stage 1.
        scene_autoencoder_preset: the numbers behind `nfldm-scene-ae-tiny`, for the record: other numbers, another run.
        scene_autoencoder_options: further options of `ns-train nfldm-scene-ae-tiny`.
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
