"""What the adversarial losses do for the images of one stage 1, at equal numbers of steps.

    python benchmarks/adversarial.py --data data/map08 [--load-config outputs/.../config.yml] [--steps 250]

Starts from a stage 1 that was trained without a discriminator: the run of `--load-config`, which must be such a one, or
one that it trains first for `--base-steps` at the size of `nfldm-scene-ae-tiny`. Then the image decoder alone is tuned,
on the same batches, once for each of

- none: no discriminator;
- projected: small heads on features of the perceptual network;
- stylegan2: on pixels, with lazy R1;
- stylegan2 + augment: the same with differentiable augmentation.

The voxels stay as they are, so that only the images differ, and steps are quick. Prints PSNR, LPIPS and FID of the
target views of held-out scenes, and writes one picture of evenly spaced scenes: real views, the base, and each variant.
Needs the weights of LPIPS and Inception (`nfldm-weights get lpips-vgg`, `nfldm-weights get fid-inception`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder, read_training_record
from nfldm_ns.autoencoder.losses import StageOneLossConfig, make_discriminator, stage_one_losses
from nfldm_ns.autoencoder.nerfstudio_trainer import CosineScheduleConfig
from nfldm_ns.autoencoder.novel_views import reconstruct
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.autoencoder.scene_sampler import SceneCache, SceneSampler, SceneSamplerConfig
from nfldm_ns.dataparsers.scene_collection import scene_outputs
from nfldm_ns.demo.evaluation import evenly
from nfldm_ns.errors import UserInputError, exit_on_bad_input
from nfldm_ns.evaluation.galleries import image_grid, write_png
from nfldm_ns.evaluation.metrics import ImageMetrics, extract_features, frechet_distance
from nfldm_ns.evaluation.weights import load_inception, load_lpips
from nfldm_ns.method_configs.presets import SCENE_AUTOENCODER
from nfldm_ns.method_configs.scene_ae import discriminator_optimizer
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import SceneBatch

PRESET = SCENE_AUTOENCODER["tiny"]


@dataclass
class Options:
    """What to compare, and for how long."""

    data: Path | None = None
    """scene collection; default: what the run of load_config was trained on"""
    load_config: Path | None = None
    """config.yml of a stage 1 trained without a discriminator; default: trains one"""
    base_steps: int = 400
    """steps of that training"""
    steps: int = 250
    """steps of each variant"""
    adversarial_mult: float = 0.05
    """weight of the adversarial loss"""
    r1_gamma: float = 0.5
    """of the stylegan2 variants"""
    num_scenes: int = 42
    """held-out scenes that are judged, evenly spaced"""
    picture_scenes: int = 4
    """of which so many, evenly spaced, are in the picture"""
    output: Path = Path("outputs/adversarial.png")
    """the picture"""
    threads: int = 2
    """CPU threads"""
    seed: int = 0
    """of weights and batches"""


def variants(options: Options) -> dict[str, StageOneLossConfig]:
    """Losses by name."""
    none = replace(StageOneLossConfig(**PRESET.loss), adversarial_mult=0.0, adversarial_start=0)
    pixels = replace(
        none,
        adversarial_mult=options.adversarial_mult,
        discriminator="stylegan2",
        discriminator_channel_base=2048,
        discriminator_channel_max=64,
        r1_gamma=options.r1_gamma,
    )
    return {
        "none": none,
        "projected": replace(none, adversarial_mult=options.adversarial_mult),
        "stylegan2": pixels,
        "stylegan2 + augment": replace(pixels, augment=("color", "translation", "cutout")),
    }


@dataclass
class Tuning:
    """What all trainings share."""

    sampler: SceneSampler
    perceptual: PerceptualNetwork
    seed: int

    def run(
        self,
        autoencoder: SceneAutoencoder,
        trained: nn.Module,
        config: StageOneLossConfig,
        steps: int,
        learning_rate: float,
    ) -> float:
        """Trains `trained`, a part of the auto-encoder, or all of it. Returns the seconds of a step."""
        torch.manual_seed(self.seed)
        discriminator = make_discriminator(config, autoencoder.image_size)
        autoencoder.requires_grad_(False)
        trained.requires_grad_(True)
        optimizers = [torch.optim.AdamW(trained.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=1e-4)]
        schedule = CosineScheduleConfig(warmup_steps=PRESET.warmup_steps, max_steps=steps).setup()
        rate = schedule.get_scheduler(optimizers[0], learning_rate)
        if discriminator is not None:
            settings = discriminator_optimizer(config, 2e-3 if config.discriminator == "stylegan2" else 1e-3)
            optimizers.append(settings.setup(discriminator.parameters()))
        begun = time.perf_counter()
        for step in range(steps):
            batch = self.sampler.batch(step)
            torch.manual_seed(self.seed * 1_000_003 + step)  # the same views for all variants
            grid = autoencoder.encode(batch.source)
            rendered = autoencoder.render(grid, batch.target.cameras)
            losses = stage_one_losses(config, rendered, batch.target, grid, self.perceptual, discriminator, step)
            for optimizer in optimizers:
                optimizer.zero_grad()
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            rate.step()
        return (time.perf_counter() - begun) / max(1, steps)


def untrained(collection: SceneCollection) -> SceneAutoencoder:
    """The tiny preset's auto-encoder for a collection."""
    data = scene_outputs(collection, collection.split("train")[0], "train").metadata
    aabb = tuple(tuple(corner) for corner in collection.aabb.tolist())
    sizes = {key: data[key] for key in ("near", "far", "image_size", "focal_length")}
    return SceneAutoencoder(**PRESET.network, **sizes, aabb=aabb).to(memory_format=torch.channels_last)


def batches(collection: SceneCollection, scene_ids: list[str]) -> Iterator[SceneBatch]:
    for scene_id in scene_ids:
        yield collection.batch([collection.load_scene(scene_id)])


@torch.inference_mode()
def judge(
    autoencoder: SceneAutoencoder, collection: SceneCollection, scene_ids: list[str], lpips: nn.Module
) -> tuple[dict[str, float], Tensor]:
    """Metrics of the target views of some scenes, and the views `[scenes, views, 3, height, width]`."""
    metrics, views = ImageMetrics(lpips), []
    for batch in batches(collection, scene_ids):
        rgb = reconstruct(autoencoder, batch).rgb.clamp(0, 1)
        metrics.update(rgb, batch.target.images)
        views.append(rgb)
    return metrics.compute(), torch.cat(views)


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    if options.load_config is None and options.data is None:
        raise UserInputError("There is nothing to train on: give --data or --load-config.")
    loaded = options.load_config is not None
    data = options.data or Path(read_training_record(options.load_config)["data"])
    collection = SceneCollection.open(data)
    collection.require_train_and_test()
    sampling = SceneSamplerConfig(**PRESET.sampling, seed=options.seed)
    sampler = SceneSampler(SceneCache(collection, 8.0), collection.split("train"), sampling)
    lpips = load_lpips("vgg")
    tuning = Tuning(sampler, PerceptualNetwork(lpips), options.seed)
    losses = variants(options)

    torch.manual_seed(options.seed)
    base = load_scene_autoencoder(options.load_config) if loaded else untrained(collection)
    if not loaded:
        seconds = tuning.run(base, base, losses["none"], options.base_steps, PRESET.learning_rate)
        print(f"base: {options.base_steps} steps without a discriminator, {seconds:.3f} s each", flush=True)

    scene_ids = evenly(collection.split("test"), options.num_scenes)
    real = torch.cat([batch.target.images for batch in batches(collection, scene_ids)])
    inception = load_inception()
    real_features = extract_features(inception, real.flatten(0, 1))
    print(f"{len(scene_ids)} held-out scenes, {len(real_features)} images; {options.steps} steps for each variant")
    print(f"{'':20s} {'PSNR (dB)':>9s} {'LPIPS':>7s} {'FID':>7s} {'s/step':>7s}")
    images = {"real": real}
    for name, config in {"base": None, **losses}.items():
        autoencoder, seconds = copy.deepcopy(base), 0.0
        if config is not None:
            seconds = tuning.run(autoencoder, autoencoder.decoder, config, options.steps, PRESET.learning_rate / 2)
        metrics, images[name] = judge(autoencoder.eval(), collection, scene_ids, lpips)
        fid = frechet_distance(real_features, extract_features(inception, images[name].flatten(0, 1)))
        print(f"{name:20s} {metrics['psnr']:9.2f} {metrics['lpips']:7.3f} {fid:7.1f} {seconds:7.3f}", flush=True)

    shown = evenly(range(len(scene_ids)), options.picture_scenes)
    pictures = {f"scene {i + 1}": [views[i, 0] for views in images.values()] for i in shown}
    write_png(options.output, image_grid(pictures, list(images)))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    with exit_on_bad_input():
        main(tyro.cli(Options))
