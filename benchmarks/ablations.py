"""Variants of stage 1 trained equally long on the same batches, judged on held-out places.

    python benchmarks/ablations.py --data DATA --group lifting --steps 1000 --output-dir OUT [--seeds 0 1]

Every variant of a group is the preset (`--base`) with a few changes: `GROUPS` below. It is trained with the preset's
optimiser and its schedule shortened to `--steps`. Seeds, batches and, where shapes allow it, the first weights of
variants are the same. Each variant leaves `<group>-<variant>-seed<seed>.json`; those that are there are not trained
again, so an interrupted run continues. Prints a table, beside the nearest source view and the mean training image;
*sky on voxels* and *known on voxels* are the shares of rays over pixels of unknown and of known depth that end there.

Needs the weights of LPIPS (`nfldm-weights get lpips-vgg`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from rich.progress import track

from nfldm_ns.autoencoder.checkpoints import (
    WEIGHTS,
    learned_refinement,
    load_initial_weights,
    read_safetensors,
    scene_autoencoder_folder,
)
from nfldm_ns.autoencoder.losses import StageOneLossConfig
from nfldm_ns.autoencoder.novel_views import (
    MEAN_IMAGE_SCENES,
    SceneScores,
    ViewJudge,
    mean_training_image,
    reconstruct,
)
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.autoencoder.scene_sampler import SceneCache, SceneSampler, SceneSamplerConfig
from nfldm_ns.choice import evenly
from nfldm_ns.method_configs.presets import SCENE_AUTOENCODER, SceneAutoencoderPreset
from nfldm_ns.method_configs.scene_ae import scene_autoencoder_config
from nfldm_ns.metrics.images import nearest_source_view
from nfldm_ns.plugin.scene_ae_model import SceneNetworkConfig
from nfldm_ns.pretrained.weights import load_lpips
from nfldm_ns.reports.report import Table
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import SceneBatch
from shared.comparisons import VariantOptions, stored
from shared.running import run
from shared.short_training import ShortTraining, make_autoencoder


@dataclass(frozen=True)
class Variant:
    """Changes to a preset.

    Attributes:
        network: of `SceneNetworkConfig`.
        loss: of `StageOneLossConfig`.
        sampling: of `SceneSamplerConfig`.
    """

    network: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)


def other_choices(name: str, preset: str) -> dict[str, Variant]:
    """A variant for each value that a field of `SceneNetworkConfig` may take beside that of the presets."""
    values = get_args(get_type_hints(SceneNetworkConfig)[name])
    return {f"{name} {value}": Variant({name: value}) for value in values if value != preset}


def grid(z: int, y: int, x: int, num_depth_bins: int, num_samples: int) -> Variant:
    """Voxels, with bins and samples of rays as fine as the presets with such voxels have them."""
    return Variant({"grid_shape": (z, y, x), "num_depth_bins": num_depth_bins, "num_samples": num_samples})


GROUPS: dict[str, dict[str, Variant]] = {
    "grid": {
        "32x32x8": grid(8, 32, 32, num_depth_bins=32, num_samples=40),
        "64x64x16": grid(16, 64, 64, num_depth_bins=64, num_samples=96),
        "128x128x32": grid(32, 128, 128, num_depth_bins=64, num_samples=128),
    },
    "lifting": {
        "the preset": Variant(),
        **other_choices("fusion", preset="attention"),
        **other_choices("splatting", preset="filled"),
        "density from voxels": Variant({"density_from": "voxels"}),
    },
    "fusion": {"attention": Variant(), **other_choices("fusion", preset="attention")},
    "sky": {f"opacity_mult {mult:g}": Variant(loss={"opacity_mult": mult}) for mult in (0.0, 0.2, 1.0)},
    "adversarial": {
        "none": Variant(loss={"adversarial_mult": 0.0}),
        "projected": Variant(loss={"adversarial_mult": 0.05, "discriminator": "projected"}),
        "stylegan2": Variant(
            loss={
                "adversarial_mult": 0.05,
                "discriminator": "stylegan2",
                "discriminator_channel_base": 2048,
                "discriminator_channel_max": 64,
                "r1_gamma": 0.2,
                "augment": ("color", "translation", "cutout"),
            }
        ),
    },
}


@dataclass(kw_only=True)
class Options(VariantOptions):
    """Train and compare variants of stage 1."""

    data: Path
    """the scene collection"""
    steps: int = 1000
    """training steps of each"""
    num_eval_scenes: int | None = None
    """test scenes, evenly chosen; by default all"""


def begun(
    collection: SceneCollection, network: dict[str, Any], seed: int, initial_weights: Path | None = None
) -> SceneAutoencoder:
    """An auto-encoder with random weights, or those of a trained one, with its learned refinement if it has one."""
    torch.manual_seed(seed)
    if initial_weights is None:
        return make_autoencoder(collection, SceneNetworkConfig(**network))
    path = scene_autoencoder_folder(initial_weights) / WEIGHTS
    model = make_autoencoder(collection, SceneNetworkConfig(**{**network, **learned_refinement(initial_weights)}))
    load_initial_weights(model, read_safetensors(path), path)
    return model


def train(
    collection: SceneCollection,
    preset: SceneAutoencoderPreset,
    variant: Variant,
    steps: int,
    seed: int,
    perceptual: PerceptualNetwork,
    initial_weights: Path | None = None,
) -> tuple[SceneAutoencoder, dict[str, Any]]:
    """A trained variant, perhaps begun from a trained one, and what `ShortTraining.run` says of it."""
    loss = {**preset.loss, **variant.loss}
    settings = scene_autoencoder_config("ablation", replace(preset, loss=loss)).optimizers
    loss_config = StageOneLossConfig(**loss)
    model = begun(collection, {**preset.network, **variant.network}, seed, initial_weights)
    model.to(perceptual_device(perceptual))
    sampling = SceneSamplerConfig(**{**preset.sampling, **variant.sampling, "seed": seed})
    training = ShortTraining(
        SceneSampler(SceneCache(collection, limit_gib=8.0), collection.split("train"), sampling),
        perceptual,
        loss_config,
        settings["autoencoder"]["optimizer"],
        settings["discriminator"]["optimizer"],
        steps,
        preset.warmup_steps,
        # The discriminator sets in after the same share of the training as in the preset.
        loss_config.adversarial_start * steps // preset.max_num_iterations,
        seed,
    )
    measured = training.run(model)
    return model.eval(), measured


def perceptual_device(perceptual: PerceptualNetwork) -> torch.device:
    return next(perceptual.parameters()).device


# Scores


def test_batches(collection: SceneCollection, num_scenes: int | None, device: torch.device) -> Iterator[SceneBatch]:
    """Test scenes, evenly chosen, two at a time."""
    ids = collection.split("test")
    ids = evenly(ids, num_scenes or len(ids))
    for first in track(range(0, len(ids), 2), "Novel views", transient=True):
        yield collection.batch([collection.load_scene(i) for i in ids[first : first + 2]]).to(device)


@torch.no_grad()
def score(
    model: SceneAutoencoder, collection: SceneCollection, num_scenes: int | None, perceptual: PerceptualNetwork
) -> SceneScores:
    """Novel views of test scenes."""
    scores = SceneScores()
    for batch in test_batches(collection, num_scenes, model.device):
        judge = ViewJudge(batch.target, batch.aabb, perceptual)
        scores.add(batch.scene_ids, judge.score(reconstruct(model, batch)))
    return scores


@torch.no_grad()
def score_baselines(
    collection: SceneCollection, num_scenes: int | None, perceptual: PerceptualNetwork
) -> dict[str, dict[str, float]]:
    """The nearest source view and the mean training image."""
    device = perceptual_device(perceptual)
    train_ids = collection.split("train")
    every = -(-len(train_ids) // MEAN_IMAGE_SCENES)
    mean = mean_training_image(collection.batch([collection.load_scene(i)]) for i in train_ids[::every]).to(device)
    scores = {"nearest view": SceneScores(), "mean image": SceneScores()}
    for batch in test_batches(collection, num_scenes, device):
        judge = ViewJudge(batch.target, batch.aabb, perceptual)
        scores["nearest view"].add(batch.scene_ids, judge.score_images(nearest_source_view(batch)))
        scores["mean image"].add(batch.scene_ids, judge.score_images(mean.expand_as(batch.target.images)))
    return {name: values.mean() for name, values in scores.items()}


# All variants


def main(options: Options) -> None:
    variants = options.begin(GROUPS, SCENE_AUTOENCODER)
    collection = SceneCollection.open(options.data)
    collection.require_train_and_test()
    perceptual = PerceptualNetwork(load_lpips("vgg")).to("cuda" if torch.cuda.is_available() else "cpu")
    preset = SCENE_AUTOENCODER[options.base]
    judged = {"data": str(options.data.resolve()), "num_eval_scenes": options.num_eval_scenes}
    baselines = stored(
        options.output_dir / "baselines.json",
        judged,
        lambda: {"scores": score_baselines(collection, options.num_eval_scenes, perceptual)},
    )

    def run(variant: Variant, seed: int) -> dict[str, Any]:
        model, training = train(collection, preset, variant, options.steps, seed, perceptual)
        scores = score(model, collection, options.num_eval_scenes, perceptual)
        return {"training": training, "scores": scores.mean(), "num_images": scores.num_images}

    rows: list[list[Any]] = [[name, None, *cells(scores)] for name, scores in baselines["scores"].items()]
    for name, variant in variants.items():
        for seed in options.seeds:
            settings = {**judged, "preset": asdict(preset), "steps": options.steps, "seed": seed, **asdict(variant)}
            path = options.result(name, seed)
            result = stored(path, settings, partial(run, variant, seed))
            time_per_step = 1000 * result["training"]["seconds"] / options.steps
            rows.append([name, seed, *cells(result["scores"]), time_per_step, result["training"]["parameters"]])
            print(f"{path}: LPIPS {result['scores']['lpips']:.3f}, {result['training']['seconds']} s", flush=True)
    caption = f"`{options.group}`: `{options.base}` for {options.steps} steps, the same batches for all."
    rows = [row + [None] * (len(COLUMNS) - len(row)) for row in rows]
    print("\n" + Table(COLUMNS, rows, caption, digits=DIGITS).markdown())


METRICS = ("psnr", "ssim", "lpips", "depth_mae_m", "depth_mae_in_box_m", "accumulation_unknown", "accumulation_known")
COLUMNS = (
    "",
    "seed",
    "PSNR (dB)",
    "SSIM",
    "LPIPS (VGG)",
    "depth error (m)",
    "depth error in the box (m)",
    "sky on voxels",
    "known on voxels",
    "ms per step",
    "parameters",
)
DIGITS = (0, 0, 2, 3, 3, 2, 2, 2, 2, 0, 0)


def cells(scores: dict[str, float]) -> list[float | None]:
    """Scores in the order of the columns."""
    return [scores.get(metric) for metric in METRICS]


if __name__ == "__main__":
    run(main, Options, __doc__)
