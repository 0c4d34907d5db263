"""The scripts in benchmarks/ run, at the smallest sizes, and write what they promise."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
import tyro
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor, nn

from nfldm_ns.autoencoder.checkpoints import save_scene_autoencoder
from nfldm_ns.autoencoder.grid_optimisation import GridOptimiserConfig
from nfldm_ns.autoencoder.lifting import Fusion, Splatting, depth_bins, fuse_frustums
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.diffusion.pipeline import NFLDMPipeline
from nfldm_ns.diffusion.training import STAGES, DiffusionTrainingConfig, make_scheduler
from nfldm_ns.diffusion.windows import WindowGrid
from nfldm_ns.editing.region import box_region
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.cameras import look_along, surround_cameras
from nfldm_ns.generated.scene_files import GeneratedScene
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder, load_latent_autoencoder
from nfldm_ns.latents.training import LatentTrainingConfig
from nfldm_ns.latents.voxel_store import encode_collection
from nfldm_ns.method_configs.gan_presets import GAN_PRESETS, GanPreset
from nfldm_ns.method_configs.latent_presets import DIFFUSION_PRESETS, LATENT_PRESETS, DiffusionPreset, LatentPreset
from nfldm_ns.method_configs.presets import SCENE_AUTOENCODER
from nfldm_ns.method_configs.refine import refine_trainer_config
from nfldm_ns.metrics.images import kernel_distance
from nfldm_ns.metrics.layout import LayoutSettings, map_layout
from nfldm_ns.plugin.generated_run import write_generated_scene
from nfldm_ns.plugin.scene_ae_model import SceneNetworkConfig
from nfldm_ns.pretrained.weights import load_lpips
from nfldm_ns.reconstruction.fine_tuning import FineTuningConfig
from nfldm_ns.reconstruction.poses import PoseConfig
from nfldm_ns.reconstruction.reconstruction import ReconstructionConfig
from nfldm_ns.refine.hub_loading import load_hub_prior
from nfldm_ns.refine.hub_priors import TextPrior
from nfldm_ns.refine.settings import RefinementConfig
from nfldm_ns.refine.view_prior import ViewPrior
from nfldm_ns.refine.view_prompts import DIRECTIONS
from nfldm_ns.sampling.world_folders import make_world
from nfldm_ns.sampling.worlds import WorldSettings
from nfldm_ns.scenes.collection import BevClass, SceneCollection
from nfldm_ns.scenes.views import Views, make_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.training.schedule import Schedule
from tests.pretrained import require_weights
from tests.small_baselines import SIZES, TRAINING, MeanLevels, small_renderer
from tests.small_models import (
    BACKGROUND_CHANNELS,
    DENOISER_SIZES,
    LATENT_SIZES,
    MeanColor,
    random_grid,
    small_pipeline,
    small_scene_autoencoder,
)
from tests.synthetic import AABB
from tests.test_distillation import GaussianPrior
from tests.tiny_priors import save_image_variation_prior

SMALL_NETWORK = {
    "grid_shape": (4, 16, 16),
    "feature_channels": 4,
    "num_depth_bins": 8,
    "num_samples": 12,
    "encoder_channels": (8, 8),
    "decoder_channels": (8, 8),
}


def script(name: str) -> ModuleType:
    """A script of benchmarks/ as a module."""
    path = Path(__file__).parent.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name.replace('/', '_')}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset for the box rooms."""
    preset = replace(SCENE_AUTOENCODER["tiny"], network=SMALL_NETWORK, image_size=32, max_num_iterations=4)
    loss = {**preset.loss, "adversarial_start": 2, "lpips_views": 1}
    sampling = {"scenes_per_batch": 1, "num_target_views": 2}
    monkeypatch.setitem(SCENE_AUTOENCODER, "small", replace(preset, loss=loss, sampling=sampling))


def test_quality_of_a_run(box_room_collection: SceneCollection, tmp_path: Path) -> None:
    require_weights("lpips-vgg")
    record = {"data": str(box_room_collection.root), "method": "small", "step": 0}
    save_scene_autoencoder(small_scene_autoencoder(), tmp_path / "run", record)
    loss = "!!python/object:a.B\npipeline: !!python/object:c.D {model: {loss: {lpips_mult: 0.0, rgb_mult: 1.0}}}\n"
    (tmp_path / "run" / "config.yml").write_text(loss)
    quality = script("scene_ae_quality")
    options = quality.Options(
        tmp_path / "run" / "config.yml",
        tmp_path / "out",
        curve_views=(1, 8, 20),
        curve_scenes=1,
        bound_scenes=1,
        bounds=GridOptimiserConfig(max_steps=4, check_every=2),
        threads=torch.get_num_threads(),
    )
    quality.main(options)
    results = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert results["num_scenes"] == 2 and results["num_images"] == 8
    assert set(results["inputs"]) == {"nearest view", "mean image", "dense", "sparse", "none"}
    curves = {(row["input"], row["views"]): row["scores"] for row in results["curves"]}
    assert set(curves) == {(name, count) for name in ("nearest view", "dense", "none") for count in (1, 8)}
    first = results["curve_scene_ids"][0]
    assert curves["dense", 8]["psnr"] == pytest.approx(results["scenes"][first]["psnr"])
    assert curves["none", 8]["depth_mae_m"] > curves["dense", 8]["depth_mae_m"]
    assert set(results["bounds"]["scores"]) == {"encoder", "source views", "all views"}
    text = (tmp_path / "out" / "quality.md").read_text()
    assert "| RGB only | 8 |" in text and "Sky: no pixel of unknown depth" in text
    for name in ("pages.png", "curves.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert min(picture.size) > 100


def test_the_page_shows_best_middle_and_worst() -> None:
    quality = script("scene_ae_quality")
    scores = quality.SceneScores()
    for i in torch.randperm(40).tolist():
        scores.add([f"s{i:02d}"], {"lpips": torch.tensor([[[float(i), 1.0]]])})
    chosen = quality.chosen_scenes(scores)
    assert [int(name[1:]) for name, _ in chosen] == [0, 1, 2, 3, 4, 17, 18, 19, 20, 21, 22, 35, 36, 37, 38, 39]
    assert [label for _, label in chosen][::5] == [
        "best: 1 of 40",
        "middle: 18 of 40",
        "middle: 23 of 40",
        "worst: 40 of 40",
    ]


def test_ablations_continue_where_they_stopped(
    box_room_collection: SceneCollection, tmp_path: Path, small_preset: None, capsys: pytest.CaptureFixture[str]
) -> None:
    require_weights("lpips-vgg")
    ablations = script("ablations")
    options = ablations.Options(
        data=box_room_collection.root,
        output_dir=tmp_path,
        group="adversarial",
        steps=4,
        base="small",
        threads=torch.get_num_threads(),
    )
    ablations.main(options)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kinds = ("none", "projected", "stylegan2")
    assert set(written) == {"baselines.json", *(f"adversarial-{kind}-seed0.json" for kind in kinds)}
    losses = [
        json.loads(written[f"adversarial-{name}-seed0.json"])["training"]["losses"] for name in ("none", "projected")
    ]
    assert "discriminator_loss" not in losses[0] and losses[1]["discriminator_loss"] > 0
    assert "| projected | 0 |" in capsys.readouterr().out
    (tmp_path / "adversarial-none-seed0.json").unlink()
    ablations.main(options)
    again = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert again["adversarial-projected-seed0.json"] == written["adversarial-projected-seed0.json"]
    scores = [json.loads(files["adversarial-none-seed0.json"])["scores"] for files in (written, again)]
    assert scores[0] == scores[1]  # the same seed, the same result
    with pytest.raises(UserInputError, match="other settings"):
        ablations.main(replace(options, steps=5))
    with pytest.raises(UserInputError, match="no group"):
        ablations.main(replace(options, group="nothing"))


def test_trainings_begin_with_the_refinement_of_the_weights_they_begin_from(
    box_room_collection: SceneCollection, tmp_path: Path, small_preset: None
) -> None:
    require_weights("lpips-vgg")
    ablations = script("ablations")
    for channels in (0, 4):
        network = {**SMALL_NETWORK, "refinement_channels": channels}
        trained = ablations.begun(box_room_collection, network, seed=0)
        save_scene_autoencoder(trained, tmp_path / str(channels), {})
        model = ablations.begun(box_room_collection, SMALL_NETWORK, 1, tmp_path / str(channels))
        assert (model.refiner is None) == (channels == 0)
        there = model.state_dict()
        assert all(torch.equal(there[name], value) for name, value in trained.state_dict().items())
        assert len(there) == len(trained.state_dict())
    preset, lpips = SCENE_AUTOENCODER["small"], PerceptualNetwork(load_lpips("vgg"))
    model, _ = ablations.train(
        box_room_collection, preset, ablations.Variant(SMALL_NETWORK), 1, 0, lpips, tmp_path / "4"
    )
    assert not torch.equal(next(model.refiner.parameters()), next(trained.refiner.parameters()))


def test_latent_ablations_continue_and_share_what_is_equal(
    box_room_collection: SceneCollection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    require_weights("lpips-vgg")
    ablations = script("latent_ablations")
    store = encode_collection(box_room_collection, small_scene_autoencoder(), tmp_path / "voxels")
    training = LatentTrainingConfig(schedule=Schedule(batch_size=1), num_views=1)
    monkeypatch.setitem(LATENT_PRESETS, "small", LatentPreset(LATENT_SIZES, training))
    options = ablations.Options(
        voxels=store.root,
        output_dir=tmp_path / "out",
        group="levels",
        steps=2,
        base="small",
        num_eval_scenes=1,
        threads=torch.get_num_threads(),
    )
    ablations.main(options)
    names = {f"levels-{name}-seed0.json" for name in ("c", "c-f", "c-f-g")}
    assert {path.name for path in options.output_dir.glob("*.json")} == names
    printed = capsys.readouterr().out
    assert "| c + f + g | 0 |" in printed and "| V of stage 1 |" in printed
    (options.output_dir / "levels-c-seed0.json").unlink()
    others = {path: path.stat().st_mtime_ns for path in options.output_dir.glob("*.json")}
    ablations.main(options)
    assert {path: path.stat().st_mtime_ns for path in others} == others
    full = json.loads((options.output_dir / "levels-c-f-g-seed0.json").read_text())
    ablations.main(replace(options, group="density"))
    assert json.loads((options.output_dir / "density-log-seed0.json").read_text()) == full
    assert not (options.output_dir / "runs" / "density-log-seed0").exists()
    with pytest.raises(UserInputError, match="other settings"):
        ablations.main(replace(options, steps=3))


@pytest.mark.parametrize("factor", [4, 8, 16])
def test_latent_ablations_downsample_c(factor: int) -> None:
    ablations = script("latent_ablations")
    for preset in LATENT_PRESETS.values():
        arguments = ablations.model_arguments(preset, ablations.downsampling(factor))
        assert len(arguments["encoder_channels"]) == len(arguments["decoder_channels"])
        with torch.device("meta"):
            assert LatentAutoencoder(**arguments).downsampling == factor
        if factor == 4:
            assert arguments == ablations.model_arguments(preset, ablations.settings())


# Generators


@pytest.fixture
def no_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network in its place."""
    monkeypatch.setattr("shared.sampled_views.fetch_weights", lambda name: None)
    monkeypatch.setattr("shared.sampled_views.load_inception", MeanColor)


def results(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.slow
def test_generator_ablations_train_all_levels_and_continue(
    box_room_collection: SceneCollection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_inception: None,
) -> None:
    ablations = script("generator_ablations")
    store = encode_collection(box_room_collection, small_scene_autoencoder(), tmp_path / "voxels")
    training = LatentTrainingConfig(schedule=Schedule(batch_size=1), num_views=1)
    monkeypatch.setitem(LATENT_PRESETS, "small", LatentPreset(LATENT_SIZES, training))
    trainings = {stage: DiffusionTrainingConfig(schedule=Schedule(batch_size=2)) for stage in STAGES}
    monkeypatch.setitem(DIFFUSION_PRESETS, "small", DiffusionPreset(DENOISER_SIZES, trainings))
    options = ablations.Options(
        voxels=store.root,
        output_dir=tmp_path / "out",
        group="levels",
        base="small",
        latent_steps=1,
        denoiser_steps=(3, 2, 2),
        num_scenes=3,
        views_per_scene=2,
        num_inference_steps=2,
        threads=torch.get_num_threads(),
    )
    for change, said in (
        ({"group": "nothing"}, "no group nothing: choose one of levels"),
        ({"base": "huge"}, "no preset huge"),
        ({"denoiser_steps": (1, 0, 1)}, "at least 1"),
        ({"latent_autoencoder": tmp_path}, "leave out --latent-autoencoder"),
        ({"num_scenes": 100}, "fewer than 200 images"),
    ):
        with pytest.raises(UserInputError, match=said):
            ablations.main(replace(options, **change))
    ablations.main(options)
    found = results(options.output_dir)
    assert set(found) == {"floor", *(f"levels-{name}-seed0" for name in ("c", "c-f", "c-f-g"))}
    coarse, full = found["levels-c-seed0"], found["levels-c-f-g-seed0"]
    assert set(coarse["held_out"]) == {"global", "coarse"} and set(full["held_out"]) == set(STAGES)
    assert set(full["distances"]["fid"]) == set(full["distances"]["kid"]) == {"samples", "stage2"}
    assert full["settings"]["judged"]["num_images"] == 6
    assert full["settings"]["training"]["global"]["schedule"]["max_steps"] == 3
    printed = capsys.readouterr().out
    assert "| 46.43 |" in printed and "| 35.69 |" in printed and "| real training views |" in printed
    runs = options.output_dir / "runs"
    kinds = [path.name.split("-")[0] for path in sorted(runs.iterdir())]
    assert kinds == ["stage2"] * 3 + ["stage3"] * 3

    # What is there is not made again, also where only its result is lost, and what is lost comes out the same.
    (options.output_dir / "levels-c-seed0.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
    ablations.main(options)
    assert results(options.output_dir) == found
    after = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
    assert {path.name for path in before if before[path] != after[path]} <= {"settings.json"}
    with pytest.raises(UserInputError, match="other settings"):
        ablations.main(replace(options, latent_steps=2))

    # Averages of other lengths come from one training, and differ.
    trained = {path: load_latent_autoencoder(path).config for path in runs.glob("stage2-*")}
    stage2 = next(path for path, config in trained.items() if config.use_fine and config.use_global)
    averages = replace(
        options,
        group="averages",
        latent_autoencoder=stage2,
        variants=("usual", "length 0.03", "length 0.24"),
        output_dir=tmp_path / "averages",
    )
    ablations.main(averages)
    lengths = results(averages.output_dir)
    assert set(lengths) == {"floor", "averages-usual-seed0", "averages-length-0.03-seed0", "averages-length-0.24-seed0"}
    assert len(list((averages.output_dir / "runs").iterdir())) == 1
    held_out = [lengths[f"averages-length-{length}-seed0"]["held_out"]["fine"]["mean"] for length in ("0.03", "0.24")]
    assert held_out[0] != held_out[1]
    assert set(lengths["averages-usual-seed0"]["distances_to_train"]["kid"]) == {"samples"}

    # Stage 2 may be trained on from another, equivariant or not.
    equivariance = replace(
        options,
        group="equivariance",
        initial_latent_autoencoder=stage2,
        variants=("plain", "weight 1.0"),
        output_dir=tmp_path / "equivariance",
    )
    ablations.main(equivariance)
    assert len(list((equivariance.output_dir / "runs").iterdir())) == 4
    for change, said in (
        ({"variants": ("half",)}, "no variant half: choose one of plain, weight 0.25, weight 1.0"),
        ({"latent_autoencoder": stage2}, "equivariance trains a latent auto-encoder"),
        ({"group": "averages", "variants": ()}, "for the group equivariance alone"),
    ):
        with pytest.raises(UserInputError, match=said):
            ablations.main(replace(equivariance, **change))

    # Denoisers are compared over one latent auto-encoder, and the usual one is that of the levels.
    ablations.main(replace(options, group="weighting"))
    weightings = results(options.output_dir)
    assert weightings["weighting-uniform-seed0"] == full
    assert weightings["weighting-min_snr-seed0"]["distances"]["fid"]["stage2"] == full["distances"]["fid"]["stage2"]
    assert weightings["weighting-min_snr-seed0"]["held_out"] != full["held_out"]
    assert len(list(runs.glob("stage2-*"))) == 3 and len(list(runs.glob("stage3-*"))) == 4

    # Joint training and the rendering loss, within the same time; two stages are those of the levels otherwise.
    ablations.main(replace(options, group="joint"))
    joint = results(options.output_dir)
    assert joint["joint-two-stages-seed0"] == full
    assert len(list(runs.glob("stage3-*/fine/codes.safetensors"))) == 1
    assert joint["joint-joint-seed0"]["settings"]["training"]["coarse"]["joint"]["steps"] == 2
    assert joint["joint-joint-seed0"]["settings"]["training"]["global"]["joint"] is None
    timed = replace(options, group="joint", denoiser_steps=None, denoiser_seconds=(1.0, 2.0, 3.0))
    schedule = timed.denoiser_training(ablations.GROUPS["joint"]["joint"], 0)["fine"].schedule
    assert schedule.time_budget_s == 3.0 and schedule.max_steps > 10**6
    with pytest.raises(UserInputError, match="--denoiser-seconds"):
        ablations.main(replace(timed, denoiser_seconds=(1.0, 0.0, 3.0)))
    monkeypatch.setitem(
        ablations.GROUPS, "given", {"epsilon": ablations.GROUPS["prediction"]["epsilon, some terminal SNR"]}
    )
    given = next(runs.glob("stage2-*"))
    ablations.main(replace(options, group="given", latent_autoencoder=given, output_dir=tmp_path / "given"))
    assert not list((tmp_path / "given" / "runs").glob("stage2-*"))


class MeanMotion(nn.Module):
    """Stands for I3D: mean colours, and how much they change from frame to frame."""

    def forward(self, videos: Tensor) -> Tensor:
        changes = (videos[:, :, 1:] - videos[:, :, :-1]).abs().mean((2, 3, 4))
        return torch.cat([videos.mean((2, 3, 4)), changes], dim=1)


def test_flights_of_copies_of_real_scenes_have_no_distance(
    box_room_collection: SceneCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    baselines = script("gan_baselines")
    monkeypatch.setattr("shared.flights.fetch_weights", lambda name: None)
    monkeypatch.setattr("shared.flights.load_i3d", MeanMotion)
    stage1 = small_scene_autoencoder()
    ids = {split: box_room_collection.split(split) for split in ("test", "train")}
    flights = baselines.FlightJudge(box_room_collection, stage1, ids, 9, tmp_path)
    assert flights.num_scenes == 2, "the test split has no more"
    with torch.no_grad():
        sources = [box_room_collection.load_scene(name).source for name in flights.scene_ids["test"]]
        grids = [stage1.encode(Views.stack([source])) for source in sources]
        scenes = [GeneratedScene(grid, stage1, source.cameras) for grid, source in zip(grids, sources, strict=True)]
        copies = torch.stack([flights.sampled(scene) for scene in scenes])
        scenes[0].grid.density *= 0.1
        changed = torch.stack([flights.sampled(scene) for scene in scenes])
    assert flights.distance(copies) == pytest.approx(0, abs=1e-9)
    assert flights.distance(changed) > 1e-6
    assert flights.floor() > 1e-6
    kept = baselines.FlightJudge(box_room_collection, small_scene_autoencoder(1), ids, 9, tmp_path)
    assert all(torch.equal(kept.real[split], flights.real[split]) for split in ids), "logits are kept in the folder"
    with pytest.raises(UserInputError, match="one camera, which is no path"):
        flights.sampled(replace(scenes[0], cameras=scenes[0].cameras[:1]))


@pytest.mark.slow
def test_baselines_are_trained_equally_long_and_compared(
    box_room_collection: SceneCollection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_inception: None,
) -> None:
    baselines = script("gan_baselines")
    monkeypatch.setattr("nfldm_ns.baselines.training.load_lpips", lambda name: None)
    monkeypatch.setattr("nfldm_ns.baselines.training.PerceptualNetwork", lambda metric: MeanLevels())
    monkeypatch.setitem(GAN_PRESETS, "small", GanPreset(SIZES, TRAINING))
    monkeypatch.setattr("shared.flights.fetch_weights", lambda name: None)
    monkeypatch.setattr("shared.flights.load_i3d", MeanMotion)
    small_pipeline().save_pretrained(tmp_path / "pipeline")
    options = baselines.Options(
        data=box_room_collection.root,
        output_dir=tmp_path / "out",
        preset="small",
        methods=("gsn", "gaudi"),
        learning_rates=(1e-3, 1e-2),
        seconds=600.0,
        max_steps=1,
        pipeline=tmp_path / "pipeline",
        num_scenes=3,
        views_per_scene=2,
        num_inference_steps=2,
        threads=torch.get_num_threads(),
    )
    half = replace(options, mixed_precision="bf16").training(1e-3)
    assert half.schedule.mixed_precision == half.prior_schedule.mixed_precision == "bf16"
    for change, said in (
        ({"methods": ()}, "nothing to train"),
        ({"learning_rates": (0.0,)}, "must be above 0"),
        ({"views_per_scene": 20, "num_scenes": 1}, "fewer than 20 images"),
        ({"fvd_scenes": -1}, "give 0 for no FVD, or at least 2"),
        ({"fvd_scenes": 1}, "FVD would be of 1 scenes"),
        ({"fvd_stage1": tmp_path / "nothing"}, "no trained scene auto-encoder at .*nothing"),
    ):
        with pytest.raises(UserInputError, match=said):
            baselines.main(replace(options, **change))
    baselines.main(options)
    table = json.loads((options.output_dir / "table.json").read_text())
    assert {name: len(found) for name, found in table["methods"].items()} == {"ours": 1, "gsn": 2, "gaudi": 2}
    for name, found in table["methods"].items():
        for result in found:
            assert all(math.isfinite(result[key]) for key in ("fid", "kid", "kid_to_train", "fvd"))
            assert result["settings"]["fvd"]["scenes"] == 2, "the test split has no more"
            assert 0 <= result["precision"] <= 1 and 0 <= result["recall"] <= 1
        assert table["best"][name] == min(found, key=lambda result: result["kid_to_train"])
    gsn, gaudi = table["methods"]["gsn"], table["methods"]["gaudi"]
    assert [result["learning_rate"] for result in gsn] == [1e-3, 1e-2]
    assert gsn[0]["steps"] == [1] and gaudi[0]["steps"] == [1, 1], "auto-decoder and diffusion model"
    assert math.isfinite(table["floor"]["fvd"]["train"])
    assert Image.open(options.output_dir / "gsn-lr0.001.png").width > 64
    printed = capsys.readouterr().out
    assert "| real training views |" in printed and "| gaudi |" in printed and "| ours |" in printed
    before = {path: path.stat().st_mtime_ns for path in (options.output_dir / "runs").rglob("*") if path.is_file()}
    baselines.main(options)
    assert json.loads((options.output_dir / "table.json").read_text()) == table
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_views_of_baselines_are_of_the_size_of_the_real_images() -> None:
    baselines = script("gan_baselines")
    renderer = small_renderer("colours", num_samples=8, feature_stride=1, decoder_channels=(8,))
    scene = GeneratedScene(random_grid(1, channels=3), renderer, surround_cameras(4, (32, 32), 16.0))
    seen = baselines.seen_at(scene, (16, 8))
    assert baselines.sampled_views(seen, 2).shape == (2, 3, 8, 16)
    assert baselines.sampled_views(scene, 2).shape == (2, 3, 32, 32), "the scene itself stays"


def test_views_of_one_surface_agree_and_views_of_none_have_no_number() -> None:
    baselines = script("gan_baselines")
    renderer = small_renderer("colours", num_samples=64, feature_stride=1, decoder_channels=(8,))
    grid = random_grid(1, channels=3)
    grid.density.fill_(0)
    grid.density[..., :2] = grid.density[..., -2:] = 30.0
    grid.density[..., :2, :] = grid.density[..., -2:, :] = 30.0
    grid.features.fill_(0.5)
    cameras = surround_cameras(4, (32, 32), 16.0)
    found = baselines.view_consistency(GeneratedScene(grid, renderer, cameras))
    assert found["visible"] > 0.2 and found["l1"] < 0.02
    grid.density.fill_(0)
    empty = baselines.view_consistency(GeneratedScene(grid, renderer, cameras))
    assert empty["visible"] == 0
    assert baselines.finite_mean([0.1, 0.3, empty["l1"]]) == pytest.approx(0.2)
    assert baselines.finite_mean([empty["l1"]]) is None


def test_sampling_is_timed_and_compared(
    box_room_collection: SceneCollection, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_inception: None
) -> None:
    sampling = script("sampling")
    small_pipeline().save_pretrained(tmp_path / "pipeline")
    options = sampling.Options(
        pipeline=tmp_path / "pipeline",
        data=box_room_collection.root,
        output_dir=tmp_path / "out",
        samplers=("dpm++:2", "dpm++:16"),
        reference="ddim:64",
        temperatures=((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)),
        num_scenes=3,
        views_per_scene=2,
        num_inference_steps=3,
        repeats=1,
        threads=torch.get_num_threads(),
    )
    for change, said in (
        ({"samplers": ("ddim",)}, "ddim is no sampler with its steps"),
        ({"reference": "magic:3"}, "no sampler magic: choose one of dpm"),
        ({"data": None}, "give --data, or only --what cost"),
        ({"temperatures": ((1.0, -1.0, 1.0),)}, "negative number"),
        ({"num_scenes": 0}, "--num-scenes is 0"),
        ({"threads": 0}, "--threads is 0"),
    ):
        with pytest.raises(UserInputError, match=said):
            sampling.main(replace(options, **change))
    assert not options.output_dir.exists()
    sampling.main(options)
    found = results(options.output_dir)
    assert set(found) == {"cost", "samplers", "temperatures"}
    seconds = found["cost"]["seconds"]
    levels = ("global", "coarse", "fine")
    assert set(seconds) == {*levels, *(f"{level} step" for level in levels), "decoding", "view"}
    assert all(0 < seconds[f"{level} step"] < seconds[level] for level in levels)
    few, many = (found["samplers"]["samplers"][name]["picture_difference"] for name in ("dpm++:2", "dpm++:16"))
    assert many < few / 4, "more steps come closer to the same scenes"
    assert found["temperatures"]["temperatures"]["1-1-1"] != found["temperatures"]["temperatures"]["0-0-0"]
    printed = capsys.readouterr().out
    assert "| decoding V |" in printed and "| dpm++:16 |" in printed and "| 0, 0, 0 |" in printed
    before = {path: path.stat().st_mtime_ns for path in options.output_dir.rglob("*.png")}
    assert len(before) == (3 + 2) * 3 * (2 + 4) + 2 * 6
    sampling.main(replace(options, what=("samplers",), samplers=("dpm++:2", "unipc:2", "euler:2")))
    assert before == {path: path.stat().st_mtime_ns for path in before}
    again = results(options.output_dir)["samplers"]["samplers"]
    assert again["dpm++:2"] == found["samplers"]["samplers"]["dpm++:2"] and "euler:2" in again
    small_pipeline(seed=1).save_pretrained(tmp_path / "other")
    same, other = f"dpm++:2@{options.pipeline}", f"dpm++:2@{tmp_path / 'other'}"
    sampling.main(replace(options, what=("samplers",), reference="dpm++:2", samplers=(same, other)))
    both = results(options.output_dir)["samplers"]
    assert both["samplers"][same]["picture_difference"] == 0 < both["samplers"][other]["picture_difference"]
    assert both["samplers"]["dpm++:2"]["kid"] == both["samplers"][same]["kid"] == again["dpm++:2"]["kid"]
    assert both["others"][str(options.pipeline)] == both["components"] != both["others"][str(tmp_path / "other")]
    with pytest.raises(UserInputError, match="nowhere"):
        sampling.check(replace(options, samplers=("dpm++:2", "dpm++:2@nowhere")))
    small_pipeline(seed=1).save_pretrained(tmp_path / "pipeline")
    with pytest.raises(UserInputError, match="something else .*: choose another --output-dir"):
        sampling.main(options)


def test_samplers_have_steps_of_all_levels_or_of_each() -> None:
    sampling = script("sampling")
    for text, steps, pipeline, folder in (
        ("dpm++:20", 20, "", "dpmpp-20"),
        ("unipc:12,4,5", (12, 4, 5), "", "unipc-12-4-5"),
        ("unipc:4@out/pipe_1", 4, "out/pipe_1", "unipc-4-out-pipe_1"),
    ):
        sampler = sampling.Sampler.parse(text)
        found = (sampler.steps, sampler.pipeline, str(sampler), sampler.folder)
        assert found == (steps, pipeline, text, folder)
    for text in ("unipc:", "unipc:0", "unipc:12,4", "unipc:12,0,4", "unipc:a"):
        with pytest.raises(UserInputError, match="is no sampler with its steps"):
            sampling.Sampler.parse(text)


def test_samplers_have_the_noise_of_the_training_and_do_not_clip(tmp_path: Path) -> None:
    sampling = script("sampling")
    make_scheduler().save_pretrained(tmp_path)
    for trained in (make_scheduler(), DPMSolverMultistepScheduler.from_pretrained(tmp_path)):
        for name in sampling.SCHEDULERS:
            config = sampling.Sampler(name, 5).scheduler(trained).config
            assert config.prediction_type == "v_prediction" and config.timestep_spacing == "trailing"
            assert config.rescale_betas_zero_snr and config.beta_schedule == "squaredcos_cap_v2"
            assert not config.clip_sample


def test_the_difference_of_two_kids_and_its_error() -> None:
    sampling = script("sampling")
    reference, fake = torch.randn(100, 4).double(), torch.randn(100, 4).double() + 1
    assert sampling.kid_difference(reference, fake, fake, 4) == (0, 0)
    worse = fake + 0.2 + 0.1 * torch.randn(100, 4)
    difference, error = sampling.kid_difference(reference, worse, fake, 4)
    first, second = (kernel_distance(reference, features).mean for features in (worse, fake))
    assert difference == pytest.approx(first / second - 1)
    assert 0 < error < difference
    assert sampling.kid_difference(reference, worse[:20], fake[:20], 4)[1] is None


# Editing


class MeanDifference(torch.nn.Module):
    """Stands for LPIPS."""

    def forward(self, first: torch.Tensor, second: torch.Tensor, normalize: bool) -> torch.Tensor:
        return (first - second).abs().mean(dim=(1, 2, 3), keepdim=True)


def drawing_pipeline() -> NFLDMPipeline:
    """A pipeline that takes maps, and makes of each a scene with walls where the map has none of the floor."""
    pipeline = small_pipeline(maps={"bev_classes": 2, "bev_size": (16, 16), "bev_dropout": 0.1})

    class Drawing(NFLDMPipeline):
        def __call__(self, *args: Any, bev: torch.Tensor | None = None, guidance_scale: float = 1.0, **kwargs: Any):
            output = super().__call__(*args, **kwargs)
            if bev is not None and output.grids is not None:
                assert bev.shape == (1, 16, 16) and not bev.is_floating_point()
                walls = (bev == 0).float().flip(1)[:, None, None].expand_as(output.grids.density)
                output.grids = replace(output.grids, density=20 * walls)
            return output

    pipeline.__class__ = Drawing
    return pipeline


@pytest.fixture
def edit_options(box_room_collection: SceneCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script and its smallest options; networks that judge are small ones."""
    editing = script("editing")
    monkeypatch.setattr("shared.edited_views.load_inception", MeanColor)
    monkeypatch.setattr("shared.edited_views.load_lpips", MeanDifference)
    small_pipeline().save_pretrained(tmp_path / "pipeline")
    return editing, editing.Options(
        pipeline=tmp_path / "pipeline",
        data=box_room_collection.root,
        output_dir=tmp_path / "out",
        num_scenes=2,
        num_maps=2,
        num_variants=2,
        num_pairs=1,
        num_frames=3,
        num_inference_steps=2,
        region="box 1 -3 3 3",
        place="x > 1",
        seam=0.5,
        layout=LayoutSettings(radius_m=2.9, floor_z=-1.0, band_m=(0.5, 1.5), wall_m=0.8),
        repeats=1,
        picture_rows=2,
        threads=torch.get_num_threads(),
    )


@pytest.mark.slow
def test_editing_is_measured_once_and_drawn(edit_options: Any, capsys: pytest.CaptureFixture[str]) -> None:
    editing, options = edit_options
    for change, said in (
        ({"data": None}, "bev needs held-out maps: give --data"),
        ({"num_variants": 1}, "--num-variants is 1: give at least 2"),
        ({"threads": 0}, "--threads is 0"),
        ({"region": "somewhere", "what": ("resample",)}, "does not say where"),
    ):
        with pytest.raises(UserInputError, match=said):
            editing.main(replace(options, **change))
    editing.main(options)
    found = results(options.output_dir)
    assert set(found) == {"bev", "resample", "combine", "interpolate", "time"}
    assert set(found["bev"]["rows"]) == {"real scenes, stage 1", editing.REAL, "sampled without maps"}
    assert found["resample"]["kid"]["resampled"]["kid"] is not None and found["resample"]["share"] == 0.3125
    assert set(found["combine"]["kid"]) == {"not combined", "joined", "harmonised"}
    assert all(seconds > 0 for seconds in found["time"]["seconds"].values())
    printed = capsys.readouterr().out
    assert "takes no maps" in printed and "| harmonised |" in printed and "| resampling a region |" in printed
    for name in ("resample", "combine", "interpolate"):
        path = options.output_dir / f"{name}.png"
        with Image.open(path) as picture:
            assert min(picture.size) > 250
        assert path.stat().st_size < 300_000
    assert not (options.output_dir / "bev.png").exists()
    editing.main(replace(options, what=("bev", "combine"), num_pairs=3))
    assert results(options.output_dir) == found
    with pytest.raises(UserInputError, match="other settings"):
        editing.main(replace(options, what=("combine",), seam=1.0))


@pytest.mark.slow
def test_reconstructions_are_measured_once_and_drawn(
    box_room_collection: SceneCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    reconstruction = script("reconstruction")
    monkeypatch.setattr(reconstruction, "load_inception", MeanColor)
    monkeypatch.setattr(reconstruction, "fetch_weights", lambda name: None)
    monkeypatch.setattr(reconstruction, "load_lpips", lambda net: MeanDifference())
    small_pipeline().save_pretrained(tmp_path / "pipeline")
    options = reconstruction.Options(
        pipeline=tmp_path / "pipeline",
        data=box_room_collection.root,
        output_dir=tmp_path / "out",
        counts=(1, 2),
        num_scenes=1,
        num_views=4,
        config=ReconstructionConfig(num_inference_steps=2, fine_tuning=FineTuningConfig(steps=1)),
        num_photos=1,
        poses=PoseConfig(num_yaws=2, grid=1, kept=1, code=FineTuningConfig(steps=1)),
        threads=torch.get_num_threads(),
    )
    for change, said in (
        ({"num_views": 1}, "--num-views is 1: give at least 2"),
        ({"num_scenes": 5}, "has 2 places in its test split, too few"),
    ):
        with pytest.raises(UserInputError, match=said):
            reconstruction.main(replace(options, **change))
    reconstruction.main(options)
    found = results(options.output_dir)
    assert set(found) == {"views", "poses"} and set(found["views"]["counts"]) == {"1", "2"}
    for part in found["views"]["counts"].values():
        assert part["views"] == 4 and set(part["rows"]) == {"stage1", "stage2", "prior"}
        assert all(math.isfinite(value) for row in part["rows"].values() for value in row.values())
    assert len(found["poses"]["errors"]["estimated"]) == 1
    assert "| 1 | stage 1 |" in capsys.readouterr().out and len(list(options.output_dir.glob("*.png"))) == 2
    reconstruction.main(replace(options, num_photos=1))
    assert results(options.output_dir) == found
    with pytest.raises(UserInputError, match="other settings"):
        reconstruction.main(replace(options, seed=1))
    monkeypatch.setattr(reconstruction, "load_prior", lambda name: GaussianPrior(32))
    refined = {"priors": ("here/gaussian",), "prior_steps": 1, "what": ("views",), "counts": (1,)}
    reconstruction.main(replace(options, output_dir=tmp_path / "refined", **refined))
    rows = results(tmp_path / "refined")["views"]["counts"]["1"]["rows"]
    assert set(rows) == {"stage1", "stage2", "prior", "refined-here/gaussian"}
    assert rows["refined-here/gaussian"]["lpips"] != rows["prior"]["lpips"]
    assert "| 1 | refined by gaussian |" in capsys.readouterr().out


def test_streets_are_judged_and_drawn_by_stage(
    box_room_collection: SceneCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    streets = script("streets")
    monkeypatch.setattr(streets, "load_lpips", MeanDifference)
    monkeypatch.setattr(streets, "load_pipeline", lambda folder: drawing_pipeline())
    layout = LayoutSettings(radius_m=2.9, floor_z=-1.0, band_m=(0.5, 1.5), wall_m=0.8)
    options = streets.Options(
        data=box_room_collection.root,
        output_dir=tmp_path / "out",
        pipeline=tmp_path / "pipeline",
        num_scenes=2,
        num_shown=1,
        num_inference_steps=2,
        layout=layout,
        threads=torch.get_num_threads(),
    )
    streets.main(options)
    found = json.loads((tmp_path / "out" / "streets.json").read_text())
    assert set(found["views"]) == {streets.NEAREST, streets.MEAN, streets.STAGE1, streets.STAGE2}
    assert [v["scenes"] for v in found["skies"].values()] == [2] and found["skies"]["any"][streets.STAGE1] > 0
    sampled = found["maps"][streets.SAMPLED]
    assert sampled["floor"] > 0.9 > found["maps"][streets.STAGE1]["floor"] and sampled["wall"] > 0.8
    assert "| on the way from shuffled to real |" in capsys.readouterr().out
    with (
        Image.open(tmp_path / "out" / "panoramas.png") as panoramas,
        Image.open(tmp_path / "out" / "drive.png") as drive,
    ):
        assert panoramas.height == 4 * 98 and drive.height == 3 * 98 + 14 and drive.width > 7 * 96

    save_scene_autoencoder(small_scene_autoencoder(), tmp_path / "run", {"data": "", "method": "small", "step": 0})
    alone = replace(options, pipeline=None, stage1=tmp_path / "run", output_dir=tmp_path / "alone")
    streets.main(alone)
    assert set(json.loads((tmp_path / "alone" / "streets.json").read_text())["maps"]) == {streets.STAGE1}
    with pytest.raises(UserInputError, match="Give a trained model: --pipeline, or --stage1"):
        streets.main(replace(alone, stage1=None))


def test_maps_that_are_followed_score_like_real_scenes(edit_options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    editing, options = edit_options
    monkeypatch.setattr("shared.edited_views.load_pipeline", lambda folder: drawing_pipeline())
    editing.main(replace(options, what=("bev", "pictures")))
    found = results(options.output_dir)["bev"]
    sampled, without = found["rows"][editing.WITH_MAP], found["rows"]["sampled without maps"]
    assert sampled["floor"] > 0.9 and sampled["floor"] > sampled["shuffled_floor"] and sampled["wall"] > 0.8
    assert without["floor"] < sampled["floor"]
    assert (options.output_dir / "bev.png").stat().st_size < 300_000
    half = editing.way(
        {"floor": 0.6, "wall": 0.3, **dict.fromkeys(("shuffled_floor", "shuffled_wall"), 0.2)},
        {"floor": 1.0, "wall": 0.7},
    )
    assert half == pytest.approx({"floor": 0.5, "wall": 0.2})


def test_a_block_is_painted_where_floor_is_seen() -> None:
    editing = script("editing")
    aabb = torch.tensor([[-8.0, -8.0, -2.0], [8.0, 8.0, 2.0]])
    classes = [BevClass(0, "void", (0, 0, 0)), BevClass(1, "floor", (9, 9, 9))]
    bev = np.zeros((64, 64), np.uint8)
    bev[12:34, 30:34] = bev[12:34, 20:44] = 1  # from 0.5 m south of the origin to the north
    layout = map_layout(bev[None], classes, (48, 48), aabb)
    painted, yaw, block = editing.paint_block(bev, layout, classes, aabb, ("void",))
    assert yaw in (45.0, 90.0, 135.0)
    changed = np.argwhere(painted != bev)
    middle = (changed.mean(axis=0) + 0.5) / 4
    turn = math.radians(yaw)
    assert (middle[1] - 8, 8 - middle[0]) == pytest.approx((3 * math.cos(turn), 3 * math.sin(turn)), abs=0.3)
    rows, columns = block.nonzero().float().mean(dim=0).add(0.5).div(3).tolist()
    assert (columns - 8, rows - 8) == pytest.approx((3 * math.cos(turn), 3 * math.sin(turn)), abs=0.3)
    after = map_layout(painted[None], classes, (48, 48), aabb)
    assert not after.floor[0][block].any() and layout.floor[0][block].float().mean() > 0.5
    closed = np.zeros_like(bev)
    assert (
        editing.paint_block(closed, map_layout(closed[None], classes, (48, 48), aabb), classes, aabb, ("void",)) is None
    )


def test_pixels_outside_of_a_region_are_those_whose_rays_do_not_enter_it() -> None:
    views = script("shared/edited_views")
    grid = random_grid(1)
    region = box_region(grid, (1.0, -3.0, 3.0, 3.0))
    poses = look_along(torch.zeros(2, 3), torch.tensor([math.pi / 2, math.pi]), torch.zeros(2))  # north, west
    cameras = make_cameras(poses, 16.0, 16.0, 16.0, 16.0, 32, 32)
    near, far = torch.full((2, 1, 32, 32), 0.5), torch.full((2, 1, 32, 32), 2.9)
    in_front, beside = views.seen_outside(near, cameras, grid, region.columns)
    assert in_front.all() and beside[1].all()
    assert beside[0].all(dim=0).tolist() == [column < 16 + 16 / 3 for column in range(32)], "x = 1 m at y = 3 m"
    in_front, _ = views.seen_outside(far, cameras, grid, region.columns)
    assert in_front[1].all() and bool(in_front[0, :, :20].all()) and not in_front[0, :, 24:].any()


def test_kid_and_its_error() -> None:
    views = script("shared/edited_views")
    reference, fake = torch.randn(40, 3, 4).double(), torch.randn(40, 3, 4).double() + 1
    found = views.kid(reference, fake)
    assert found["kid"] == pytest.approx(kernel_distance(reference.flatten(0, 1), fake.flatten(0, 1)).mean)
    assert 0 < found["kid_error"] < found["kid"]
    few = views.kid(reference[:5], fake)
    assert views.kid_cells(few) == [few["kid"], None]


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    """With ten scenes in ten groups it would be exactly s / sqrt(n); here each group has the mean of its two."""
    values = torch.randn(20, generator=torch.Generator().manual_seed(0)).double()
    mean, error = script("shared/sampled_views").jackknife(lambda mask: float(values[mask(20)].mean()), 20)
    groups = values.view(2, 10).mean(0)
    assert mean == pytest.approx(float(values.mean())) and error == pytest.approx(float(groups.std() / math.sqrt(10)))


@pytest.mark.parametrize(("field", "choices"), [("fusion", Fusion), ("splatting", Splatting)])
def test_ablations_try_every_choice(field: str, choices: object) -> None:
    preset = getattr(SceneNetworkConfig(), field)
    tried = [variant.network.get(field, preset) for variant in script("ablations").GROUPS["lifting"].values()]
    assert set(tried) == set(get_args(choices))


@pytest.mark.parametrize("splatting", ["nearest", "filled"])
@pytest.mark.parametrize("fusion", ["occupancy", "attention"])
def test_the_plain_way_of_lifting_gives_the_same_voxels(fusion: str, splatting: str) -> None:
    stage1 = script("stage1")
    views = stage1.random_views(2, 3, 16)
    density, features = torch.rand(2, 3, 6, 8, 8), torch.randn(2, 3, 5, 8, 8)
    entries = (
        density,
        features,
        views.cameras,
        *depth_bins(0.1, 4.0, 6),
        torch.tensor(AABB),
        (4, 16, 16),
        fusion,
        splatting,
        torch.randn(2, 3, 8, 8) if fusion == "attention" else None,
        torch.rand(2, 3, 8, 8) > 0.3,
    )
    ours, plain = fuse_frustums(*entries), stage1.fuse_in_a_loop(*entries)
    torch.testing.assert_close(plain.density, ours.density, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(plain.features, ours.features, atol=1e-5, rtol=1e-4)


def test_parts_of_a_step(small_preset: None, capsys: pytest.CaptureFixture[str]) -> None:
    require_weights("lpips-vgg")
    stage1 = script("stage1")
    stage1.main(stage1.Options("small", torch.get_num_threads(), 1))
    printed = capsys.readouterr().out
    for line in ("backward", "optimiser", "peak memory of a step", "whole step, plain / this"):
        assert line in printed
    with pytest.raises(UserInputError, match="no preset"):
        stage1.main(stage1.Options("huge"))


# Refining


def test_refining_is_measured_before_and_after_and_continues(
    box_room_collection: SceneCollection, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_inception: None
) -> None:
    refining = script("refining")
    small_pipeline().save_pretrained(tmp_path / "pipeline")
    save_image_variation_prior(tmp_path / "prior")
    scene = box_room_collection.scene_dir(box_room_collection.splits["train"][0])
    options = refining.Options(
        refinement=RefinementConfig(prior=str(tmp_path / "prior"), clean_images=box_room_collection.root),
        data=box_room_collection.root,
        output_dir=tmp_path / "out",
        pipeline=tmp_path / "pipeline",
        guidances=("none", "negative"),
        styles=(scene,),
        num_scenes=3,
        views_per_scene=2,
        num_inference_steps=2,
        steps=2,
        rates=refining.LearningRates(features=0.5),
        threads=torch.get_num_threads(),
    )
    for change, said in (
        ({"steps": 0}, "--steps is 0"),
        ({"guidances": (), "styles": ()}, "nothing to refine with"),
        ({"styles": (tmp_path / "nowhere",)}, "There is no .*nowhere"),
        ({"refinement": RefinementConfig()}, "No prior was given"),
        ({"num_scenes": 100}, "fewer than 200 images"),
    ):
        with pytest.raises(UserInputError, match=said):
            refining.main(replace(options, **change))
    refining.main(options)
    printed = capsys.readouterr().out
    assert "| before |" in printed and "| negative |" in printed and "3 scenes, 2 steps each; 6 images" in printed
    found = results(options.output_dir)["refining"]
    before, refined = found["states"]["before"], found["states"]["none"]
    assert set(found["states"]) == {"before", "none", "negative"}
    assert before["depth"]["change_m"] == 0 < refined["depth"]["change_m"]
    assert all(refined[place]["fid"] != before[place]["fid"] for place in ("trajectory", "free"))
    change = refined["free"]["kid"] - before["free"]["kid"]
    assert refined["free"]["kid_change"] == pytest.approx(change / abs(before["free"]["kid"]))
    assert refined["seconds_per_100_steps"] > 0 and refined["peak_rss_gib"] > 0
    assert "seconds_per_100_steps" not in before and set(before["reprojection"]) == {"l1", "unmoved_l1", "visible"}
    pictures = {"before_and_after_none", "before_and_after_negative", "styles"}
    assert {path.stem for path in options.output_dir.glob("*.png")} == pictures

    # What is there is not made again; more scenes and guidances add to it.
    kept = {path: path.stat().st_mtime_ns for path in (options.output_dir / "records").rglob("*.safetensors")}
    assert len(kept) == 3 * 3 + 1
    ways = {"guidances": ("none", "classifier_free"), "objectives": ("sds", "csd")}
    more = replace(options, num_scenes=4, styles=(), **ways)
    refining.main(more)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    states = {"before", "none", "classifier_free", "classifier_free-csd"}
    assert set(results(options.output_dir)["refining"]["states"]) == states
    with pytest.raises(UserInputError, match="other settings"):
        refining.main(replace(options, steps=3))


def test_ways_of_refining_are_all_combinations_by_what_differs() -> None:
    refining = script("refining")
    options = refining.Options(
        refinement=RefinementConfig(prior="here/first"),
        data=Path("data"),
        output_dir=Path("out"),
        guidances=("none", "negative"),
        objectives=("sds", "csd"),
        priors=("here/first", "there/second"),
        lights=("plain", "shaded"),
    )
    ways = refining.ways(options)
    plain = ["none", "negative", "negative-csd", "none-second", "negative-second", "negative-csd-second"]
    assert set(ways) == {*plain, *(f"{name}-shaded" for name in plain)}
    last = ways["negative-csd-second-shaded"]
    assert (last.prior, last.distillation.objective, last.distillation.guidance) == ("there/second", "csd", "negative")
    assert last.shading.shaded_share == 0.5 and ways["none"].shading.shaded_share == 0
    with pytest.raises(UserInputError, match="Two of --priors are called second"):
        refining.ways(replace(options, priors=("here/second", "there/second")))
    annealed = refining.ways(replace(options, annealings=("uniform", "widening"), lights=("plain",)))
    widening = [name.replace("-second", "") + "-widening" + "-second" * ("-second" in name) for name in plain]
    assert set(annealed) == {*plain, *widening}
    assert annealed["negative-csd-widening-second"].distillation.time_annealing == "widening"
    assert {ways.distillation.time_annealing for name, ways in annealed.items() if "widening" not in name} == {
        "uniform"
    }
    listed = replace(options, refinement=RefinementConfig(), lights=("plain",))
    assert set(refining.ways(listed)) == set(plain)  # the first of them stands in for --prior


def test_refining_has_the_defaults_of_the_method() -> None:
    refining = script("refining")
    options = tyro.cli(refining.Options, args=["--data", "data", "--output-dir", "out", "--prior", "prior"])
    method = refine_trainer_config()
    assert replace(options.refinement, prior=None) == method.refinement and options.steps == method.max_num_iterations
    ours, theirs = options.rates.optimizers(), method.optimizers
    assert {name: str(group) for name, group in ours.items()} == {name: str(theirs[name]) for name in ours}
    changed = ["--rates.density", "0.5", "--guidances", "none", "--max-time", "0.5", "--floaters-mult", "3"]
    options = tyro.cli(refining.Options, args=["--data", "data", "--output-dir", "out", *changed])
    assert options.rates.optimizers()["density"]["optimizer"].lr == 0.5 and options.guidances == ("none",)
    assert options.refinement.distillation.max_time == 0.5 and options.refinement.regularisers.floaters_mult == 3


def test_small_pipelines_of_words_and_poses_are_trained_and_are_priors(
    box_room_collection: SceneCollection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    require_weights("lpips-alex")
    hub_priors = script("hub_priors")
    for name, value in {"SAMPLED": 1, "SAMPLING_STEPS": 2, "JUDGED_PASSES": 1, "HELD_OUT_PLACES": 1}.items():
        monkeypatch.setattr(hub_priors, name, value)
    options = hub_priors.Options(
        data=box_room_collection.root, output_dir=tmp_path, places=2, steps=2, batch_size=4, threads=1
    )
    hub_priors.main(options)
    found = results(tmp_path)["hub_priors"]
    assert {part: numbers["steps"] for part, numbers in found.items()} == {"autoencoder": 2, "text": 2, "views": 2}
    assert all(found[part]["held_out_loss"] > 0 for part in ("text", "views")) and found["autoencoder"]["psnr"] > 0
    assert "| text | 2 |" in capsys.readouterr().out and (tmp_path / "samples.png").is_file()
    words, views = (load_hub_prior(str(tmp_path / part)) for part in ("text", "views"))
    learned = hub_priors.Photos.read(box_room_collection, "train", 2)
    latents = words.encode(learned.images.float() / 255)
    assert isinstance(words, TextPrior) and isinstance(views, ViewPrior) and words.image_size == 64
    assert float(latents.std()) == pytest.approx(1, abs=0.02)
    saved = (tmp_path / "text" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    hub_priors.main(options)  # which finds all trainings done
    assert saved == (tmp_path / "text" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_small_pipelines_learn_words_and_views_of_the_same_place(box_room_collection: SceneCollection) -> None:
    hub_priors = script("hub_priors")
    pipelines = sys.modules["shared.small_pipelines"]
    photos = hub_priors.Photos.read(box_room_collection, "train", 2)
    per_place = len(photos.images) // 2
    numbers = torch.arange(len(photos.images))
    assert (photos.near // per_place == numbers[:, None] // per_place).all() and (photos.near != numbers[:, None]).all()
    assert photos.directions[[0, per_place]].tolist() == [DIRECTIONS.index("front")] * 2
    for colour, words in (
        ((0.2, 0.2, 0.2), "a dark grey room"),
        ((0.6, 0.5, 0.3), "a brown room"),
        ((0.6, 0.3, 0.35), "a red room"),
        ((0.1, 0.2, 0.6), "a blue room"),
        ((0.5, 0.9, 0.6), "a bright green room"),
    ):
        assert pipelines.describe(torch.tensor(colour)[:, None, None].expand(3, 4, 4)) == words


def test_the_prior_whose_memory_is_measured_has_the_sizes_of_stable_unclip():
    """865.9 million parameters of Stable Diffusion 2.1's U-Net, and the layers for embeddings of 2 x 1024 numbers."""
    with torch.device("meta"):
        networks = script("refining_memory").unclip_networks()
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert counts["unet"] == 865_910_724 + (2048 * 1280 + 1280) + (1280 * 1280 + 1280)
    assert counts["vae"] == 83_653_863
    assert counts["image_encoder"] == pytest.approx(632e6, rel=0.01)
    assert counts["text_encoder"] == pytest.approx(340e6, rel=0.01)


# Sharpness


def test_sharpness_compares_encoders_with_refined_and_optimised_voxels(box_room_collection, tmp_path, capsys):
    require_weights("lpips-vgg", "fid-inception")
    plain = small_scene_autoencoder()
    config = {key: value for key, value in plain.config.items() if not key.startswith("_")}
    plain.save_pretrained(tmp_path / "plain")
    type(plain)(**{**config, "refinement_channels": 8}).save_pretrained(tmp_path / "refining")
    sharpness = script("sharpness")
    options = sharpness.Options(
        (tmp_path / "plain", tmp_path / "refining"),
        box_room_collection.root,
        tmp_path / "out",
        num_scenes=1,
        steps=(1,),
        optimised_steps=1,
        all_images=True,
        num_images=11,
        threads=torch.get_num_threads(),
    )
    sharpness.main(options)
    rows = json.loads((tmp_path / "out" / "sharpness.json").read_text())["rows"]
    assert list(rows) == [
        "real views of training places",
        "nearest source view",
        "plain, encoder",
        "plain, then 1 of gradient descent",
        "refining, encoder",
        "refining, 1 steps",
        "refining, then 1 of gradient descent",
    ]
    for name, values in rows.items():
        assert np.isfinite([*values.values()]).all(), name
    assert rows["refining, 1 steps"]["seconds"] > rows["refining, encoder"]["seconds"]
    assert "11 views" in capsys.readouterr().out and (tmp_path / "out" / "sharpness.png").is_file()

    # A place whose record is lost is made again, and nothing else is; the numbers are the same.
    lost = next((tmp_path / "out" / "places" / "plain-encoder").iterdir())
    kept = {path: path.stat().st_mtime_ns for path in lost.parent.parent.rglob("*.json") if path != lost}
    lost.unlink()
    sharpness.main(options)
    assert lost.is_file() and all(
        path.stat().st_mtime_ns == time for path, time in kept.items() if "plain" in str(path)
    )
    again = json.loads((tmp_path / "out" / "sharpness.json").read_text())["rows"]
    for values in (*rows.values(), *again.values()):
        values.pop("seconds", None)
    assert again == rows
    with pytest.raises(UserInputError, match="made with other settings"):
        sharpness.main(replace(options, all_images=False))
    with pytest.raises(UserInputError, match="Two of --models are called plain"):
        sharpness.main(replace(options, models=(tmp_path / "plain",) * 2))


def test_exports_are_measured(tmp_path, capsys):
    """A room that is closed all around: rays meet its mesh, and splats show it."""
    density = torch.full((1, 1, 4, 16, 16), 20.0)
    density[:, :, 1:-1, 2:-2, 2:-2] = 0.0
    features = random_grid(1).features
    room = VoxelGrid(density, features, torch.tensor(AABB), torch.zeros(1, BACKGROUND_CHANNELS, 4))
    write_generated_scene(tmp_path / "room", room, small_scene_autoencoder(), surround_cameras(4, (32, 32), 16.0))
    exports = script("exports")
    options = exports.Options(
        scenes=(tmp_path / "room",),
        output_dir=tmp_path / "out",
        opacities=(0.4,),
        resolution_factors=(1,),
        fit_steps=(0, 2),
        ring_places=0,
    )
    exports.main(options)
    means = json.loads((tmp_path / "out" / "exports.json").read_text())["means"]
    meshes = ["mesh by depth, 1 per voxel", "mesh by density, 0.4"]
    assert [*means] == [*meshes, "splats, 0 steps", "splats, 2 steps"]
    for mesh in (means[name] for name in meshes):
        assert mesh["met"] > 0.9 and 0 < mesh["points_to_mesh"] < 0.4
        assert 0 < mesh["halves_to_mesh"] < 0.4 and 0 < mesh["halves_to_points"] < 0.4
    assert means[meshes[1]]["met"] == pytest.approx(1.0, abs=0.01)
    assert all(np.isfinite([*row.values()]).all() for row in means.values())
    assert "Means of 1 scenes." in capsys.readouterr().out and (tmp_path / "out" / "exports.png").is_file()


def test_splats_are_compared_with_real_views_and_with_a_walk_through_a_world(
    box_room_collection, tmp_path, monkeypatch, capsys
):
    splats = script("splats")
    save_scene_autoencoder(small_scene_autoencoder(), tmp_path / "stage1", {})
    make_world(small_pipeline(), tmp_path / "world", (12.0, 9.0), WorldSettings(num_inference_steps=1))
    monkeypatch.setattr(splats, "WALK_FPS", 1)
    options = splats.Options(
        output_dir=tmp_path / "out",
        data=box_room_collection.root,
        model=tmp_path / "stage1",
        num_places=2,
        worlds=(tmp_path / "world",),
        fit_steps=(0, 3),
        threads=torch.get_num_threads(),
    )
    for change, said in (({"data": None, "worlds": ()}, "give --data or --worlds"), ({"num_places": 0}, "at least 1")):
        with pytest.raises(UserInputError, match=said):
            splats.main(replace(options, **change))
    splats.main(options)
    means = json.loads((tmp_path / "out" / "splats.json").read_text())["means"]
    assert [*means] == ["places, 0 steps", "places, 3 steps", "worlds, 0 steps"]
    for row in (means["places, 0 steps"], means["places, 3 steps"]):
        assert row["lost"] == pytest.approx(row["rendered_to_real"] - row["splats_to_real"])
        assert np.isfinite([*row.values()]).all() and row["count"] > 100
    assert "real" not in str(means["worlds, 0 steps"].keys()) and means["worlds, 0 steps"]["splats_to_rendered"] > 5
    assert "2 places and 1 worlds" in capsys.readouterr().out and (tmp_path / "out" / "splats.png").is_file()


def test_a_result_says_how_to_repeat_it(tmp_path, monkeypatch, capsys):
    @dataclass
    class Options:
        """Measures nothing."""

        output_dir: Path
        seed: int = 0

    running = script("shared/running")
    monkeypatch.setattr(sys, "argv", ["benchmarks/nothing.py", "--output-dir", str(tmp_path), "--seed", "3"])
    running.run(lambda options: print(f"seed {options.seed}"), Options, None)
    made = json.loads((tmp_path / "record.json").read_text())
    assert made["command"] == f"python benchmarks/nothing.py --output-dir {tmp_path} --seed 3"
    assert made["seed"] == 3 and made["data"] is None and made["device"]["cores"] >= 1 and made["seconds"] >= 0
    assert made["commit"] == running.commit() and running.commit(tmp_path) == "unknown"
    assert capsys.readouterr().out.splitlines()[0] == "seed 3"


# A long capture


def test_a_walk_through_a_maze_is_a_capture_in_scannet_s_layout(tmp_path):
    from nfldm_ns.collect.capture_import import ImportOptions, load_views, world_poses
    from nfldm_ns.collect.checking import reprojection_agreement
    from nfldm_ns.collect.doom_collection import wad_path
    from nfldm_ns.collect.doom_geometry import UNITS_PER_METRE, DoomGeometry
    from nfldm_ns.collect.doom_mazes import MazeWad
    from nfldm_ns.collect.doom_places import can_stand
    from nfldm_ns.collect.formats.scannet import read_scannet

    long_capture = script("long_capture")
    geometry = DoomGeometry(MazeWad(wad_path("freedoom2")).read_map("MAZE7001"))
    spots = long_capture.walk(geometry, 0.3, 480, 0)
    steps = np.linalg.norm(np.diff(spots, axis=0), axis=1) / UNITS_PER_METRE
    assert len(spots) == 480 and steps.max() < 0.3 + 1e-6 and can_stand(geometry, spots).mean() > 0.95
    assert len(set(geometry.sector_at(spots).tolist())) > 5, "several rooms"

    options = long_capture.Options(tmp_path, frames=16, recorded_size=32)
    count = long_capture.record(tmp_path / "capture", options)
    capture = read_scannet(tmp_path / "capture")
    assert count == len(capture.frames) > 10
    imported = ImportOptions(image_size=(32, 32))
    views = load_views(capture, list(range(count)), world_poses(capture, imported), imported)
    assert reprojection_agreement(views).median_error < 0.05
    assert long_capture.record(tmp_path / "capture", options) == count, "once recorded, it is kept"


def test_lines_between_seams_are_half_a_stride_away_from_them():
    benchmark = script("worlds")
    windows = WindowGrid([0], [0, 9, 18], (12, 12))
    described = SimpleNamespace(windows=windows, corner=(-5.0, 1.0), cell=(0.5, 2.0))
    world = SimpleNamespace(description=described)
    half = benchmark.half_strides(world)
    assert half == (2.25, 0.0), "half of nine cells of half a metre"
    x = torch.tensor([10.4, 10.6, 19.4, 19.6])  # cells; windows meet in the middle of their overlaps
    points = torch.stack([x * 0.5 - 5.0, torch.full_like(x, 3.0)], dim=-1)[None]
    assert benchmark.strongest_window(world, points)[0, :, 1].tolist() == [0, 1, 1, 2]
    between = points - torch.tensor(half)  # where the lines of the control are
    assert benchmark.strongest_window(world, between)[0, :, 1].tolist() == [0, 0, 1, 1]
    described.windows = WindowGrid([0], [0], (12, 12))
    with pytest.raises(UserInputError, match="has no seam"):
        benchmark.half_strides(world)


def test_seams_cost_what_lines_between_them_do_not_explain(monkeypatch):
    benchmark = script("worlds")
    monkeypatch.setattr(benchmark, "load_inception", lambda: None)
    monkeypatch.setattr(benchmark, "extract_features", lambda network, sets: sets[0].flatten(1).double())
    torch.manual_seed(0)
    rooms, near, far = (shift + torch.rand(48, 3, 2, 2) for shift in (0.0, 0.2, 0.4))
    names = (*benchmark.KINDS, *benchmark.CONTROL)
    found = benchmark.measured(rooms, dict(zip(names, (far, near, far, near), strict=True)))
    assert found["kid_ratio"] > 1.5
    assert found["kid_ratio_of_seams"] == pytest.approx(1)
    found = benchmark.measured(rooms, dict(zip(names, (far, near, near, near), strict=True)))
    assert found["kid_ratio_of_seams"] == pytest.approx(found["kid_ratio"])
    assert found["kid_ratio_of_seams_error"] is None, "of one world"
    views = dict(zip(names, (far, near, near, near), strict=True))
    alike = {kind: pictures[:12].repeat(4, 1, 1, 1) for kind, pictures in views.items()}
    assert benchmark.measured(rooms, alike, 4)["kid_ratio_of_seams_error"] == pytest.approx(0, abs=1e-6)
    assert benchmark.measured(rooms, views, 4)["kid_ratio_of_seams_error"] > 0
