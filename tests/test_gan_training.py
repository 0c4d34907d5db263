"""Baselines trained, saved, resumed, sampled and shown, by the commands that users call."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nerfstudio.cameras.rays import RayBundle
from PIL import Image
from safetensors.torch import load_file

from nfldm_ns.autoencoder.renderers import SceneRenderer
from nfldm_ns.baselines import training
from nfldm_ns.baselines.options import METHODS, BaselineOptions
from nfldm_ns.baselines.pipeline import BaselinePipeline, load_baseline
from nfldm_ns.baselines.registry import GENERATORS
from nfldm_ns.baselines.training import train_baseline
from nfldm_ns.commands import eval as eval_command
from nfldm_ns.commands import sample, train_gan
from nfldm_ns.diffusion.pipeline import scene_generators
from nfldm_ns.errors import UserInputError
from nfldm_ns.exports.points import scene_points
from nfldm_ns.generated.scene_files import check_dataset, load_generated_scene
from nfldm_ns.method_configs import gan_presets
from nfldm_ns.plugin.generated_run import render_views
from nfldm_ns.plugin.voxel_model import ray_pictures
from tests.small_baselines import SIZES, TRAINING, MeanLevels

GAN = replace(METHODS["gsn"], critic="stylegan2")
KINDS = {
    "gsn": GAN,
    "graf": replace(METHODS["graf"], critic="stylegan2"),
    "hologan": replace(METHODS["hologan"], critic="stylegan2", learned_cameras=True),
    "eg3d": replace(METHODS["eg3d"], critic="stylegan2"),
    "gaudi": METHODS["gaudi"],
}


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network of LPIPS is replaced: what is tested here does not depend on what it has learned."""
    monkeypatch.setattr(training, "load_lpips", lambda name: None)
    monkeypatch.setattr(training, "PerceptualNetwork", lambda metric: MeanLevels())


def quiet(share: float, losses: dict[str, float]) -> None:
    pass


@pytest.fixture(scope="module")
def trained(box_room_collection, tmp_path_factory) -> dict[str, Path]:
    """A run of each kind, by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "load_lpips", lambda name: None)
        patch.setattr(training, "PerceptualNetwork", lambda metric: MeanLevels())
        runs = {name: tmp_path_factory.mktemp(name) for name in KINDS}
        for name, options in KINDS.items():
            train_baseline(box_room_collection, runs[name], options, SIZES, TRAINING, on_progress=quiet)
    return runs


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}.{name}": value
        for path in (run / "pipeline").rglob("*.safetensors")
        for name, value in load_file(path).items()
    }


# Training


@pytest.mark.parametrize("name", ["gsn", "gaudi"])
def test_a_resumed_training_gives_the_same_weights(trained, box_room_collection, tmp_path, name):
    reports = []

    def stop_after_three(share: float, losses: dict[str, float]) -> None:
        reports.append(losses)
        if len(reports) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_baseline(box_room_collection, tmp_path, KINDS[name], SIZES, TRAINING, on_progress=stop_after_three)
    assert not (tmp_path / "pipeline").exists()
    train_baseline(box_room_collection, tmp_path, KINDS[name], SIZES, TRAINING, on_progress=quiet)
    first, second = weights(trained[name]), weights(tmp_path)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_another_seed_gives_other_weights(trained, box_room_collection, tmp_path):
    other = replace(TRAINING, schedule=replace(TRAINING.schedule, seed=1, max_steps=1))
    train_baseline(box_room_collection, tmp_path, GAN, SIZES, other, on_progress=quiet)
    key = "generator.background.weight"
    assert not torch.equal(weights(trained["gsn"])[key], weights(tmp_path)[key])


def test_a_run_of_other_choices_is_refused(trained, box_room_collection):
    with pytest.raises(UserInputError, match="holds a training run of another preset"):
        train_baseline(box_room_collection, trained["gsn"], KINDS["eg3d"], SIZES, TRAINING, on_progress=quiet)


def test_pictures_of_the_same_scenes_are_logged(box_room_collection, tmp_path):
    schedule = replace(TRAINING.schedule, max_steps=2, validation_steps=1, report_to="tensorboard")
    watched = replace(TRAINING, schedule=schedule)
    train_baseline(box_room_collection, tmp_path, METHODS["gsn"], SIZES, watched, on_progress=quiet)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"adversarial_loss", "discriminator_loss", "seconds"} <= set(lines[-1])
    events = next((tmp_path / "tensorboard").rglob("events*"))
    assert b"baseline_samples" in events.read_bytes()


def test_a_time_budget_is_divided_between_gaudis_two_models():
    config = replace(TRAINING, schedule=replace(TRAINING.schedule, time_budget_s=100.0)).with_budgets()
    assert (config.schedule.time_budget_s, config.prior_schedule.time_budget_s) == (80.0, 20.0)
    assert TRAINING.with_budgets() is TRAINING


# The pipeline


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_pipeline_samples_the_same_however_it_is_loaded(trained, name):
    folder = trained[name] / "pipeline"
    first, run, plain = load_baseline(folder), load_baseline(trained[name]), BaselinePipeline.from_pretrained(folder)
    expected = first(2, scene_generators(5, 2))
    assert expected.cameras.shape == (2, 8) and expected.grids.density.shape == (2, 1, 4, 16, 16)
    for pipeline in (run, plain):
        output = pipeline(2, scene_generators(5, 2))
        assert torch.equal(output.grids.features, expected.grids.features)
        assert torch.equal(output.cameras.camera_to_worlds, expected.cameras.camera_to_worlds)
    alone = first(1, scene_generators(6, 1))
    torch.testing.assert_close(alone.grids.density, expected.grids.density[1:], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected.grids.density[0], expected.grids.density[1])


def test_calls_that_make_no_sense_are_refused(trained):
    gan, gaudi = load_baseline(trained["gsn"]), load_baseline(trained["gaudi"])
    with pytest.raises(ValueError, match="a GAN makes scenes in one step"):
        gan(1, num_inference_steps=3)
    for wrong in ({"num_scenes": 0}, {"num_inference_steps": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            gan(**wrong)
    assert (gan.default_steps, gaudi.default_steps) == (1, 30)
    few, many = (gaudi(1, scene_generators(0, 1), num_inference_steps=n).latents.scene for n in (2, 8))
    assert few.shape == (1, 8) and not torch.equal(few, many)


def test_broken_pipelines_are_refused(trained, tmp_path):
    with pytest.raises(UserInputError, match="is no trained baseline"):
        load_baseline(tmp_path)
    broken = shutil.copytree(trained["gaudi"] / "pipeline", tmp_path / "broken")
    config = broken / "generator" / "config.json"
    config.write_text(config.read_text().replace('"latent_dim": 8', '"latent_dim": 9'))
    with pytest.raises(UserInputError, match="is of another preset or version"):
        load_baseline(broken)
    config.write_text(config.read_text().replace('"latent_dim": 9', '"latent_dim": 8'))
    for name in ("generator", "prior"):
        (broken / name).rename(tmp_path / name)
        with pytest.raises(UserInputError, match=f"lacks component {name}"):
            load_baseline(broken)
        (tmp_path / name).rename(broken / name)
    shutil.rmtree(broken / "cameras")
    shutil.copytree(trained["gsn"] / "pipeline" / "cameras", broken / "cameras")
    with pytest.raises(UserInputError, match=r"the size of latents of generator is 9, .* is 12"):
        load_baseline(broken)
    colours = shutil.copytree(trained["gsn"] / "pipeline", tmp_path / "colours")
    shutil.rmtree(colours / "scene_autoencoder")
    shutil.copytree(trained["graf"] / "pipeline" / "scene_autoencoder", colours / "scene_autoencoder")
    with pytest.raises(UserInputError, match="the number of channels of generator is 4, .* is 3"):
        load_baseline(colours)


# Scenes


@pytest.mark.parametrize("name", KINDS)
def test_its_scenes_are_ordinary_generated_scenes(trained, tmp_path, name, capsys):
    sample.main([str(trained[name]), "--num-scenes", "2", "--seed", "7", "--output-dir", str(tmp_path)])
    assert "Walk through the first: ns-viewer" in capsys.readouterr().out
    folder = tmp_path / "scene_000007"
    check_dataset(folder)
    scene = load_generated_scene(folder)
    assert type(scene.renderer) is type(load_baseline(trained[name]).scene_autoencoder)
    assert scene.provenance["seed"] == 7 and len(scene.provenance["generator"]) == 16
    assert set(scene.latents) == {"scene", "pose"} and scene.cameras.shape == (8,)
    shown = render_views(scene, scene.cameras).images[0].mul(255).round().byte()
    on_disk = torch.frombuffer(bytearray(Image.open(folder / "images" / "source_00.png").tobytes()), dtype=torch.uint8)
    assert torch.equal(shown.permute(1, 2, 0).flatten(), on_disk)


def test_scenes_export(trained, tmp_path):
    sample.main([str(trained["gsn"]), "--num-scenes", "1", "--output-dir", str(tmp_path)])
    scene = load_generated_scene(tmp_path / "scene_000000")
    scene.grid.density[:, :, :, :2] = 30.0
    points = scene_points(scene, spacing=0.5)
    assert len(points.positions) > 0 and bool((points.positions[:, 1] < -1.5).all()), "on the wall that was added"


def test_single_rays_are_refused_where_a_network_makes_images_of_whole_ones(trained):
    origins = torch.zeros(2, 3)
    rays = RayBundle(origins, torch.eye(3)[:2], torch.ones(2, 1))
    for name, seen in (("gsn", True), ("hologan", False)):
        pipeline = load_baseline(trained[name])
        grid = pipeline(1, scene_generators(0, 1)).grids
        if seen:
            assert ray_pictures(pipeline.scene_autoencoder, grid, rays)["rgb"].shape == (2, 3)
            continue
        with pytest.raises(UserInputError, match="Single rays of this scene have no colours"):
            ray_pictures(pipeline.scene_autoencoder, grid, rays)


def test_what_a_baseline_cannot_do_is_said(trained, box_room_collection, tmp_path, capsys):
    run, out = str(trained["gsn"]), ["--output-dir", str(tmp_path / "out")]
    wrong = {
        "a baseline diffuses one latent: give one number": [run, "--num-inference-steps", "1", "2", "1", *out],
        "a GAN makes scenes in one step": [run, "--num-inference-steps", "4", *out],
        "--guidance-scale cannot be other than 1": [run, "--guidance-scale", "2", *out],
        "was trained without BEV maps": [run, "--bev", str(tmp_path / "map.png"), *out],
    }
    for said, args in wrong.items():
        with pytest.raises(SystemExit) as stopped:
            sample.main(args)
        assert stopped.value.code == 2 and said in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        eval_command.main([f"{run}/pipeline", "--data", str(box_room_collection.root), "--fvd", "no", *out])
    assert stopped.value.code == 2 and "another kind of pipeline" in capsys.readouterr().err


# The command


def test_the_command_trains_what_is_asked_for(box_room_collection, tmp_path, monkeypatch, capsys):
    preset = gan_presets.GanPreset(SIZES, TRAINING)
    monkeypatch.setattr(gan_presets, "GAN_PRESETS", {"tiny": preset})
    asked = ["--method", "eg3d", "--critic", "stylegan2", "--dual", "False", "--preset", "tiny", "--max-steps", "1"]
    args = [str(box_room_collection.root), "--output-dir", str(tmp_path), *asked, "--learning-rate", "0.01"]
    train_gan.main(args)
    assert "nfldm-sample" in capsys.readouterr().out
    run = json.loads((tmp_path / "run.json").read_text())
    expected = BaselineOptions(generator="triplane", critic="stylegan2")
    assert run["options"] == {**expected.__dict__}
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["step"] == 1 and line["learning_rate"] == pytest.approx(0.01)
    for wrong, said in {
        ("--method", "platonic-gan", "--dual", "True"): "--rendering colours has none",
        ("--method", "gaudi", "--patches", "True"): "--patches says nothing there",
        ("--method", "gsn", "--patch-steps", "9"): "--patch-steps is 9, but it is a number of steps for patches",
        ("--method", "graf", "--patch-steps", "-1"): "--patch-steps is -1",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            train_gan.main([str(box_room_collection.root), "--output-dir", str(tmp_path / "other"), *wrong])
        assert stopped.value.code == 2 and said in capsys.readouterr().err
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["tiny", "rooms", "base"])
def test_presets_fit_their_images(name):
    """Sizes of generators and renderers go together, and images of the size they are meant for are divided by them."""
    sizes = gan_presets.GAN_PRESETS[name].sizes
    with torch.device("meta"):
        renderer = SceneRenderer(**sizes.scene, **sizes.renderer)
        for kind, cls in GENERATORS.items():
            generator = cls(**sizes.scene, **sizes.generators[kind])
            assert generator.grid_shape == renderer.grid_shape
    assert 64 % (2 * renderer.config.feature_stride) == 0
