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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder, read_training_record
from nfldm_ns.autoencoder.losses import StageOneLossConfig
from nfldm_ns.autoencoder.novel_views import reconstruct
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.autoencoder.scene_sampler import SceneCache, SceneSampler, SceneSamplerConfig
from nfldm_ns.choice import evenly
from nfldm_ns.errors import UserInputError
from nfldm_ns.method_configs.presets import SCENE_AUTOENCODER
from nfldm_ns.method_configs.scene_ae import discriminator_optimizer
from nfldm_ns.metrics.images import ImageMetrics, extract_features, frechet_distance
from nfldm_ns.plugin.scene_ae_model import SceneNetworkConfig
from nfldm_ns.plugin.scene_ae_trainer import AdamWConfig
from nfldm_ns.pretrained.weights import load_inception, load_lpips
from nfldm_ns.reports.galleries import image_grid, write_png
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import SceneBatch
from shared.running import run
from shared.short_training import ShortTraining, make_autoencoder

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


def tuning(base: ShortTraining, options: Options, losses: dict[str, StageOneLossConfig]) -> dict[str, ShortTraining]:
    """The training of each variant, on the batches of that of the base."""
    return {
        name: replace(
            base,
            loss=loss,
            steps=options.steps,
            optimizer=AdamWConfig(lr=PRESET.learning_rate / 2, max_norm=1.0),
            discriminator_optimizer=discriminator_optimizer(loss, 2e-3 if loss.discriminator == "stylegan2" else 1e-3),
        )
        for name, loss in losses.items()
    }


def batches(collection: SceneCollection, scene_ids: list[str]) -> Iterator[SceneBatch]:
    for scene_id in scene_ids:
        yield collection.batch([collection.load_scene(scene_id)])


@torch.no_grad()
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
    data = options.data or Path(read_training_record(options.load_config)["data"])
    collection = SceneCollection.open(data)
    collection.require_train_and_test()
    lpips, losses = load_lpips("vgg"), variants(options)
    sampling = SceneSamplerConfig(**PRESET.sampling, seed=options.seed)
    training = ShortTraining(
        SceneSampler(SceneCache(collection, 8.0), collection.split("train"), sampling),
        PerceptualNetwork(lpips),
        losses["none"],
        optimizer=AdamWConfig(lr=PRESET.learning_rate, max_norm=1.0),
        discriminator_optimizer=discriminator_optimizer(losses["none"], PRESET.discriminator_learning_rate),
        steps=options.base_steps,
        warmup_steps=PRESET.warmup_steps,
        seed=options.seed,
    )

    torch.manual_seed(options.seed)
    if options.load_config is not None:
        base = load_scene_autoencoder(options.load_config)
    else:
        base = make_autoencoder(collection, SceneNetworkConfig(**PRESET.network))
        seconds = training.run(base)["seconds"] / options.base_steps
        print(f"base: {options.base_steps} steps without a discriminator, {seconds:.3f} s each", flush=True)

    scene_ids = evenly(collection.split("test"), options.num_scenes)
    real = torch.cat([batch.target.images for batch in batches(collection, scene_ids)])
    inception = load_inception()
    real_features = extract_features(inception, real.flatten(0, 1))
    print(f"{len(scene_ids)} held-out scenes, {len(real_features)} images; {options.steps} steps for each variant")
    print(f"{'':20s} {'PSNR (dB)':>9s} {'LPIPS':>7s} {'FID':>7s} {'s/step':>7s}")
    images = {"real": real}
    for name, tuned in {"base": None, **tuning(training, options, losses)}.items():
        autoencoder, seconds = copy.deepcopy(base), 0.0
        if tuned is not None:
            torch.manual_seed(options.seed)
            seconds = tuned.run(autoencoder, autoencoder.decoder)["seconds"] / options.steps
        metrics, images[name] = judge(autoencoder.eval(), collection, scene_ids, lpips)
        fid = frechet_distance(real_features, extract_features(inception, images[name].flatten(0, 1)))
        print(f"{name:20s} {metrics['psnr']:9.2f} {metrics['lpips']:7.3f} {fid:7.1f} {seconds:7.3f}", flush=True)

    shown = evenly(range(len(scene_ids)), options.picture_scenes)
    pictures = {f"scene {i + 1}": [views[i, 0] for views in images.values()] for i in shown}
    write_png(options.output, image_grid(pictures, list(images)))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    run(main, Options, __doc__)
