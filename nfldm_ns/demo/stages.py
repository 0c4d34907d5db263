"""The stages of the demo, each through the functions behind the command of the same purpose."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder
from nfldm_ns.collect.doom_collection import collect
from nfldm_ns.demo.budget import Clock, TimeBudget
from nfldm_ns.demo.denoisers import DenoiserJob, save_latents, train_denoisers
from nfldm_ns.demo.evaluation import evaluate, render_samples
from nfldm_ns.demo.folder import DemoFolder
from nfldm_ns.demo.page import picture_sections, write_page
from nfldm_ns.demo.runner import Report, Stage
from nfldm_ns.demo.scene_training import EXPERIMENT, train_scene_autoencoder
from nfldm_ns.demo.settings import DemoSettings
from nfldm_ns.demo.shares import DENOISER_SHARES, TRAINING_SHARE
from nfldm_ns.demo.summary import write_summary
from nfldm_ns.diffusion.latent_memory import encode_latents
from nfldm_ns.diffusion.pipeline import load_pipeline, save_in_half_precision
from nfldm_ns.diffusion.training import STAGES, save_pipeline
from nfldm_ns.latents.latent_autoencoder import load_latent_autoencoder
from nfldm_ns.latents.training import train_latent_autoencoder
from nfldm_ns.latents.voxel_store import VoxelStore, encode_collection
from nfldm_ns.models import GENERATOR
from nfldm_ns.pretrained.weights import load_inception, load_lpips
from nfldm_ns.sampling.scenes import sample_scenes
from nfldm_ns.scenes.collection import SceneCollection


class Demo:
    """What each stage does.

    Args:
        root: the demo's folder.
        settings: with their seed.
        device: of all stages.
    """

    def __init__(self, root: Path, settings: DemoSettings, seed: int, device: str) -> None:
        self.folder = DemoFolder(root, settings.scene_autoencoder_method)
        self.settings, self.seed, self.device = settings, seed, device
        limit = settings.time_budget_s
        self.budget = None if limit is None else TimeBudget(root, limit)

    def stages(self) -> list[Stage]:
        """All stages in order; their settings are what decides whether they must be repeated."""
        s = self.settings
        evaluation = {"num_images": s.num_images, "views_per_scene": s.views_per_scene}
        sampling = {"seed": self.seed, "num_scenes": s.num_scenes, "num_inference_steps": s.num_inference_steps}
        scene_training = {
            "seed": self.seed,
            "steps": s.scene_autoencoder_steps,
            "preset": s.scene_autoencoder_preset,
            "options": s.scene_autoencoder_options,
        }
        denoisers = {
            "models": s.denoiser_models,
            "training": s.denoiser_training,
            "quarter_turns": s.quarter_turns,
            "temperatures": s.temperatures,
        }
        ships = ("model",) if s.half_precision else ()
        timed = self._timed
        return [
            Stage("collect", "Collecting scenes from VizDoom", self.collect, timed(s.collection), ("data",)),
            Stage(
                "stage1",
                "Stage 1: training the scene auto-encoder (ns-train)",
                self.train_scene_autoencoder,
                timed(scene_training),
                (EXPERIMENT,),
            ),
            Stage("encode", "Encoding all scenes into voxels", self.encode, self._encoding(), ("voxels",)),
            Stage(
                "stage2",
                "Stage 2: training the latent auto-encoder",
                self.train_latent_autoencoder,
                timed({"model": s.latent_model, "training": s.latent_training}),
                ("stage2",),
            ),
            Stage(
                "stage3",
                "Stage 3: training the three denoisers",
                self.train_denoisers,
                timed(denoisers),
                ("stage3", *ships),
            ),
            Stage(
                "sample",
                "Sampling new scenes",
                self.sample,
                {**sampling, **evaluation},
                ("generated", "evaluation/samples"),
            ),
            Stage(
                "shipped",
                "Sampling from the model that comes with the package",
                self.sample_shipped,
                {**sampling, "num_scenes": s.num_shipped_scenes, "model": GENERATOR},
                ("shipped",),
            ),
            Stage(
                "evaluate",
                "Judging novel views and samples",
                self.evaluate,
                evaluation,
                ("evaluation/metrics.json",),
            ),
            Stage(
                "report",
                "Writing the page",
                self.report,
                {"video_frames": s.video_frames},
                ("report.json", "index.html"),
            ),
        ]

    def _timed(self, settings: Any) -> Any:
        """Settings of a stage that a time budget ends."""
        limit = self.settings.time_budget_s
        return settings if limit is None else {"time_budget_s": limit, "settings": settings}

    def _encoding(self) -> dict[str, Any] | None:
        return {"all_views": True} if self.settings.encode_all_views else None

    def _clock(self, stage: str) -> Clock:
        """Of a stage that begins now."""
        return Clock() if self.budget is None else self.budget.clock(stage)

    def _cores(self) -> int:
        """Cores that data is made and read with."""
        return len(os.sched_getaffinity(0)) if self.settings.all_cores else max(1, torch.get_num_threads())

    def collect(self, report: Report) -> dict[str, Any]:
        options, clock = self.settings.collection, self._clock("collect")

        def progress(done: int) -> None:
            report(max(done / options.num_scenes, clock.share()), f"{done} scenes")

        made = collect(self.folder.data, options, self._cores(), progress, clock.left())
        collection = SceneCollection.open(self.folder.data)
        collection.require_train_and_test()
        return {"scenes": made.num_scenes}

    def train_scene_autoencoder(self, report: Report) -> None:
        device = ("--machine.device-type", self.device)
        train_scene_autoencoder(
            self.folder.root,
            self.folder.data,
            self.settings.scene_autoencoder_steps,
            self.seed,
            (*self.settings.scene_autoencoder_options, *device),
            self.folder.logs / "stage1.log",
            report,
            self.settings.scene_autoencoder_method,
            self._clock("stage1").left(TRAINING_SHARE),
        )

    def encode(self, report: Report) -> None:
        encode_collection(
            SceneCollection.open(self.folder.data),
            load_scene_autoencoder(self.folder.stage1),
            self.folder.voxels,
            self.device,
            report,
            batch_size=self.settings.encode_batch,
            all_views=self.settings.encode_all_views,
            num_threads=min(self._cores(), self.settings.encode_batch),
        )

    def train_latent_autoencoder(self, report: Report) -> None:
        clock = self._clock("stage2")
        training = _in_time(self.settings.latent_training, clock.left(TRAINING_SHARE))
        lpips = load_lpips("vgg").to(self.device) if training.losses.lpips_mult else None
        train_latent_autoencoder(
            VoxelStore.open(self.folder.voxels),
            self.folder.stage2,
            dict(self.settings.latent_model),
            training,
            lpips=lpips,
            on_progress=lambda share, losses: report(share, _loss_note(losses)),
        )

    def train_denoisers(self, report: Report) -> None:
        settings, store, clock = self.settings, VoxelStore.open(self.folder.voxels), self._clock("stage3")
        latent_autoencoder = load_latent_autoencoder(self.folder.stage2)
        latents = self.folder.stage3 / "latents"
        if not latents.is_dir():
            model = latent_autoencoder.to(self.device)
            memory = encode_latents(
                store,
                model,
                store.splits["train"],
                settings.quarter_turns,
                on_progress=lambda s: report(0.1 * s),
                with_maps=settings.with_maps,
            )
            save_latents(latents, memory)
        processes = 1 if self.device == "cuda" else min(settings.denoiser_processes, torch.get_num_threads())
        jobs = self._jobs(clock.left(TRAINING_SHARE))
        train_denoisers(jobs, latents, self.folder.stage2, processes, lambda share: report(0.1 + 0.9 * share))
        save_pipeline(self.folder.stage3, store.load_autoencoder(), latent_autoencoder.cpu(), settings.temperatures)
        if settings.half_precision:
            save_in_half_precision(self.folder.stage3 / "pipeline", self.folder.model)

    def _jobs(self, seconds: float | None = None) -> list[DenoiserJob]:
        """Trainings of the denoisers, the longest first, one after the other in so many seconds."""
        settings = self.settings
        order = sorted(STAGES, key=lambda stage: -settings.denoiser_shares[stage])
        total = sum(settings.denoiser_shares.values())
        return [
            DenoiserJob(
                stage,
                self.folder.stage3 / stage,
                settings.denoiser_models[stage],
                _in_time(settings.denoiser_training[stage], seconds and seconds * DENOISER_SHARES[stage]),
                settings.denoiser_shares[stage] / total,
            )
            for stage in order
        ]

    def sample(self, report: Report) -> None:
        settings = self.settings
        pipeline = load_pipeline(self.folder.stage3 / "pipeline").to(self.device)
        render_samples(
            pipeline,
            self.folder.generated,
            self.folder.samples,
            settings,
            self.seed,
            str(self.folder.stage3 / "pipeline"),
            report,
            self._clock("sample").over,
        )

    def sample_shipped(self, report: Report) -> None:
        settings, pipeline = self.settings, load_pipeline().to(self.device)
        self.folder.shipped.mkdir(exist_ok=True)
        folders = sample_scenes(
            pipeline,
            self.folder.shipped,
            settings.num_shipped_scenes,
            self.seed,
            num_inference_steps=settings.num_inference_steps,
            source=GENERATOR,
        )
        for done, folder in enumerate(folders, 1):
            report(done / settings.num_shipped_scenes, folder.name)

    def evaluate(self, report: Report) -> None:
        evaluate(
            SceneCollection.open(self.folder.data),
            load_scene_autoencoder(self.folder.stage1).to(self.device),
            load_latent_autoencoder(self.folder.stage2).to(self.device),
            self.folder.evaluation,
            self.settings,
            load_lpips("vgg").to(self.device),
            load_inception().to(self.device),
            report,
            self._clock("evaluate"),
        )

    def report(self, report: Report) -> None:
        begun = time.monotonic()
        sections = picture_sections(self.folder, self.settings, report)
        names = [stage.name for stage in self.stages()]
        seconds = time.monotonic() - begun
        summary = write_summary(self.folder, names, self.seed, self.settings.length, self.device, seconds)
        write_page(self.folder, sections, summary)


def _in_time(training: Any, seconds: float | None) -> Any:
    """A training that ends after so many seconds."""
    if seconds is None:
        return training
    return replace(training, schedule=replace(training.schedule, time_budget_s=seconds))


def _loss_note(losses: dict[str, float]) -> str:
    return "  ".join(f"{name.removesuffix('_loss')} {value:.3g}" for name, value in losses.items())
