"""The stages of the demo, each through the functions behind the command of the same purpose."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder
from nfldm_ns.collect.doom_collection import collect
from nfldm_ns.demo.denoisers import DenoiserJob, save_latents, train_denoisers
from nfldm_ns.demo.evaluation import evaluate, render_samples
from nfldm_ns.demo.folder import DemoFolder
from nfldm_ns.demo.page import picture_sections, write_page
from nfldm_ns.demo.runner import Report, Stage
from nfldm_ns.demo.scene_training import EXPERIMENT, train_scene_autoencoder
from nfldm_ns.demo.settings import DemoSettings
from nfldm_ns.demo.summary import write_summary
from nfldm_ns.diffusion.latent_memory import encode_latents
from nfldm_ns.diffusion.pipeline import load_pipeline
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
        device: of all stages but the first, which takes what nerfstudio finds.
    """

    def __init__(self, root: Path, settings: DemoSettings, seed: int, device: str) -> None:
        self.folder, self.settings, self.seed, self.device = DemoFolder(root), settings, seed, device

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
        return [
            Stage("collect", "Collecting scenes from VizDoom", self.collect, s.collection, ("data",)),
            Stage(
                "stage1",
                "Stage 1: training the scene auto-encoder (ns-train)",
                self.train_scene_autoencoder,
                scene_training,
                (EXPERIMENT,),
            ),
            Stage("encode", "Encoding all scenes into voxels", self.encode, None, ("voxels",)),
            Stage(
                "stage2",
                "Stage 2: training the latent auto-encoder",
                self.train_latent_autoencoder,
                {"model": s.latent_model, "training": s.latent_training},
                ("stage2",),
            ),
            Stage("stage3", "Stage 3: training the three denoisers", self.train_denoisers, denoisers, ("stage3",)),
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

    def collect(self, report: Report) -> dict[str, Any]:
        options = self.settings.collection
        workers = max(1, torch.get_num_threads())
        made = collect(
            self.folder.data, options, workers, lambda done: report(done / options.num_scenes, f"{done} scenes")
        )
        collection = SceneCollection.open(self.folder.data)
        collection.require_train_and_test()
        return {"scenes": made.num_scenes}

    def train_scene_autoencoder(self, report: Report) -> None:
        train_scene_autoencoder(
            self.folder.root,
            self.folder.data,
            self.settings.scene_autoencoder_steps,
            self.seed,
            self.settings.scene_autoencoder_options,
            self.folder.logs / "stage1.log",
            report,
        )

    def encode(self, report: Report) -> None:
        autoencoder = load_scene_autoencoder(self.folder.stage1)
        encode_collection(SceneCollection.open(self.folder.data), autoencoder, self.folder.voxels, self.device, report)

    def train_latent_autoencoder(self, report: Report) -> None:
        training = self.settings.latent_training
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
        settings, store = self.settings, VoxelStore.open(self.folder.voxels)
        latent_autoencoder = load_latent_autoencoder(self.folder.stage2)
        latents = self.folder.stage3 / "latents"
        if not latents.is_dir():
            model = latent_autoencoder.to(self.device)
            memory = encode_latents(
                store, model, store.splits["train"], settings.quarter_turns, on_progress=lambda s: report(0.1 * s)
            )
            save_latents(latents, memory)
        processes = 1 if self.device == "cuda" else min(settings.denoiser_processes, torch.get_num_threads())
        train_denoisers(self._jobs(), latents, self.folder.stage2, processes, lambda share: report(0.1 + 0.9 * share))
        save_pipeline(self.folder.stage3, store.load_autoencoder(), latent_autoencoder.cpu(), settings.temperatures)

    def _jobs(self) -> list[DenoiserJob]:
        """Trainings of the denoisers, the longest first."""
        settings = self.settings
        order = sorted(STAGES, key=lambda stage: -settings.denoiser_shares[stage])
        total = sum(settings.denoiser_shares.values())
        return [
            DenoiserJob(
                stage,
                self.folder.stage3 / stage,
                settings.denoiser_models[stage],
                settings.denoiser_training[stage],
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
        )

    def report(self, report: Report) -> None:
        begun = time.monotonic()
        sections = picture_sections(self.folder, self.settings, report)
        names = [stage.name for stage in self.stages()]
        seconds = time.monotonic() - begun
        summary = write_summary(self.folder, names, self.seed, self.settings.length, self.device, seconds)
        write_page(self.folder, sections, summary)


def _loss_note(losses: dict[str, float]) -> str:
    return "  ".join(f"{name.removesuffix('_loss')} {value:.3g}" for name, value in losses.items())
