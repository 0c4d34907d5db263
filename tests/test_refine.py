"""Refining generated scenes: views, losses, and the nerfstudio method."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro
from nerfstudio.utils.eval_utils import eval_setup
from torch import Tensor

from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.cameras import surround_cameras
from nfldm_ns.generated.scene_files import GeneratedScene, half_precision, load_generated_scene, renderer_of
from nfldm_ns.method_configs.refine import nfldm_refine
from nfldm_ns.plugin.generated_run import render_views, write_generated_scene
from nfldm_ns.plugin.refine import RefinedField, RefineTrainer, RefineTrainerConfig, refine_grid
from nfldm_ns.refine.distillation import DistillationConfig
from nfldm_ns.refine.images import example_images, read_square_images, render_images
from nfldm_ns.refine.loading import load_prior
from nfldm_ns.refine.prior import Condition
from nfldm_ns.refine.refiner import Refiner
from nfldm_ns.refine.settings import RefinementConfig, RegulariserConfig
from nfldm_ns.refine.views import ViewSampler, ViewSamplingConfig
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from tests.small_models import BACKGROUND_CHANNELS, small_scene_autoencoder
from tests.synthetic import AABB
from tests.test_distillation import GaussianPrior
from tests.test_seen_maps import north_wall
from tests.tiny_priors import save_image_variation_prior, save_text_prior


def room_grid() -> VoxelGrid:
    """A room with opaque walls at the border of the box, and a pillar in one quarter."""
    generator = torch.Generator().manual_seed(0)
    density = torch.full((1, 1, 4, 16, 16), 20.0)
    density[:, :, 1:-1, 2:-2, 2:-2] = 0.0
    density[:, :, :, 9:13, 9:13] = 20.0
    features = torch.rand(1, 4, 4, 16, 16, generator=generator) * 2 - 1
    background = torch.randn(1, BACKGROUND_CHANNELS, 4, generator=generator)
    return VoxelGrid(density, features, torch.tensor(AABB), background)


def room_scene() -> GeneratedScene:
    cameras = surround_cameras(6, (32, 40), 16.0)
    return GeneratedScene(room_grid(), renderer_of(small_scene_autoencoder()), cameras)


# Views


@pytest.mark.parametrize(("region", "reach"), [("square", math.sqrt(6) / 2), ("disc", math.sqrt(6 / math.pi))])
def test_views_are_uniform_in_free_space_of_six_square_metres(region, reach):
    scene = room_scene()
    sampler = ViewSampler(ViewSamplingConfig(region=region), scene.grid, scene.cameras)
    positions = sampler.positions(4000, torch.Generator().manual_seed(0))
    x, y = positions[:, 0], positions[:, 1]
    assert (positions[:, 2] == 0).all()
    inside = torch.maximum(x.abs(), y.abs()) if region == "square" else (x**2 + y**2).sqrt()
    assert 0.97 * reach < float(inside.max()) <= reach
    density, _ = scene.grid.sample(positions[None])
    assert (density < 1.0).all(), "nobody stands in the pillar"
    quarters = torch.stack([((x > 0) == right) & ((y > 0) == up) for right in (0, 1) for up in (0, 1)]).sum(1)
    assert quarters[3] < 0.5 * quarters[0], "which takes most of one quarter"
    assert quarters[:3].min() > 0.9 * quarters[:3].max()


def test_views_are_the_middle_squares_of_the_scenes_own():
    scene = room_scene()
    cameras = ViewSampler(ViewSamplingConfig(pitch=20), scene.grid, scene.cameras)(50, torch.Generator())
    assert cameras.shape == (1, 50) and int(cameras.height[0, 0]) == int(cameras.width[0, 0]) == 32
    assert (cameras.fx == 16).all() and (cameras.cx == 16).all() and (cameras.cy == 16).all()
    pitch = torch.rad2deg(torch.asin(-cameras.camera_to_worlds[0, :, 2, 2]))
    assert 15 < float(pitch.abs().max()) <= 20 + 1e-3


@pytest.mark.parametrize(("seen", "side"), [(16, 32), (32, 32), (48, 64)])
def test_an_upsampler_is_left_out_where_no_prior_sees_what_it_adds(tmp_path, seen, side):
    autoencoder = small_scene_autoencoder()
    autoencoder.grow_decoder(upsampling_channels=8)
    scene = GeneratedScene(room_grid(), renderer_of(autoencoder), surround_cameras(6, (64, 80), 32.0))
    wanted = tmp_path / "wanted"
    write_generated_scene(wanted, room_grid(), small_scene_autoencoder(), surround_cameras(6, (32, 32), 16.0))
    config = RefinementConfig(prior="gaussian", clean_images=wanted)
    cameras = Refiner(scene, GaussianPrior(seen), config).views(2, torch.Generator())
    assert int(cameras.width[0, 0]) == side and float(cameras.fx[0, 0]) == side / 2


def test_renders_of_scenes_with_an_upsampler_are_those_that_refining_shows(tmp_path):
    autoencoder = small_scene_autoencoder()
    autoencoder.grow_decoder(upsampling_channels=8)
    grid, cameras = room_grid(), surround_cameras(2, (64, 64), 32.0)
    write_generated_scene(tmp_path / "scenes" / "scene_000000", grid, autoencoder, cameras)
    small, large = (render_images([tmp_path / "scenes"], size) for size in (32, 64))
    assert small.shape == (10, 3, 32, 32) and large.shape == (10, 3, 64, 64)
    shown = small_scene_autoencoder().render(half_precision(grid), surround_cameras(2, (32, 32), 16.0).reshape((1, 2)))
    assert (small[:2] - shown.rgb[0].clamp(0, 1) * 255).abs().max() <= 0.51
    files = read_square_images(sorted((tmp_path / "scenes" / "scene_000000" / "images").iterdir()), 64)
    assert torch.equal(large, files)
    assert torch.equal(example_images(tmp_path / "scenes" / "scene_000000", 32), small / 255)


def test_a_scene_without_free_space_is_seen_by_its_own_cameras():
    scene = room_scene()
    full = replace(scene.grid, density=torch.full_like(scene.grid.density, 5.0))
    positions = ViewSampler(ViewSamplingConfig(), full, scene.cameras).positions(3, torch.Generator())
    assert (positions == 0).all()


def test_a_region_larger_than_the_box_is_refused():
    with pytest.raises(UserInputError, match="outside of the scene's box"):
        ViewSampler(ViewSamplingConfig(area=40.0), room_grid(), room_scene().cameras)


# Losses


def refiner_for(prior: GaussianPrior, tmp_path: Path, **changes) -> Refiner:
    """Refines to the images of a scene folder with the same room in other colours."""
    brighter = replace(room_grid(), features=room_grid().features + 0.5)
    write_generated_scene(tmp_path / "wanted", brighter, small_scene_autoencoder(), surround_cameras(6, (32, 32), 16.0))
    config = RefinementConfig(prior="gaussian", clean_images=tmp_path / "wanted", **changes)
    return Refiner(room_scene(), prior, config)


def test_refining_pulls_renders_to_what_is_wanted_and_regularisers_begin_at_zero(tmp_path):
    prior = GaussianPrior(16)
    plain = DistillationConfig(guidance="none", max_time=0.6, time_annealing="uniform")
    close = RegulariserConfig(image_mult=1.0, close_density_mult=1.0, close_features_mult=1.0)
    refiner = refiner_for(prior, tmp_path, distillation=plain, regularisers=close)
    (term,) = refiner.terms
    term.wanted = {"mean": term.wanted["mean"].mean((0, 2, 3), keepdim=True).expand(1, 3, 16, 16)}
    field, renderer = RefinedField(room_grid()), room_scene().renderer
    start = field.grid()
    assert torch.allclose(start.density, room_grid().density, atol=1.1e-4)
    assert torch.equal(start.features, room_grid().features)
    losses, metrics = refiner.losses(start, renderer, 0.0, torch.Generator())
    assert set(losses) == {
        *("distillation_loss", "floaters_loss", "depth_loss", "image_loss"),
        *("close_density_loss", "close_features_loss"),
    }
    assert all(float(loss.detach()) < 1e-4 for name, loss in losses.items() if name != "distillation_loss")
    assert metrics["skipped_views"] == 0 and metrics["distillation_gradient"] > 0

    refiner.config = replace(refiner.config, regularisers=RegulariserConfig(0, 0))
    parameters = [field.density_change, field.feature_change, field.background_change]
    optimiser, target = torch.optim.Adam(parameters, lr=0.05), term.wanted["mean"].mean()
    cameras = refiner.views(4, torch.Generator().manual_seed(1))

    def distance() -> float:
        with torch.no_grad():
            return float((renderer.render(field.grid(), cameras).rgb - target).abs().mean())

    before = distance()
    for step in range(40):
        optimiser.zero_grad()
        losses, _ = refiner.losses(field.grid(), renderer, 0.0, torch.Generator().manual_seed(step))
        torch.stack(list(losses.values())).sum().backward()
        optimiser.step()
    assert distance() < 0.6 * before


def test_density_in_empty_space_counts_as_floaters(tmp_path):
    refiner = refiner_for(GaussianPrior(16), tmp_path)
    scene, cameras = room_scene(), refiner.views(1, torch.Generator())
    floating, thicker = room_grid(), room_grid()
    floating.density[:, :, 2, 4, 4] = 5.0
    thicker.density[room_grid().density > 0] = 40.0
    losses = [
        refiner.regularisers(grid, scene.renderer.render(grid, cameras), cameras)["floaters_loss"]
        for grid in (room_grid(), floating, thicker)
    ]
    voxel = 1 - math.exp(-5.0 * 6 / 16)
    assert [float(loss) for loss in losses] == pytest.approx([0, voxel / (4 * 16 * 16), 0], abs=1e-7)


def test_negative_guidance_knows_renders_of_the_scene_as_it_began(tmp_path):
    other = tmp_path / "other"
    write_generated_scene(other, room_grid(), small_scene_autoencoder(), surround_cameras(2, (32, 32), 16.0))
    negative = refiner_for(GaussianPrior(16), tmp_path, negative_scenes=(other,))
    cameras = negative.views(16, torch.Generator().manual_seed(0))
    with torch.no_grad():
        renders = room_scene().renderer.render(room_grid(), cameras).rgb[0].clamp(0, 1)
    (term,) = negative.terms
    expected = term.prior.condition(renders)["mean"]
    assert torch.allclose(term.unwanted["mean"][:16], expected, atol=1e-5)
    assert len(term.unwanted["mean"]) == 16 + 10, "and the images of another scene"
    free = refiner_for(GaussianPrior(16), tmp_path, distillation=DistillationConfig(guidance="classifier_free"))
    assert torch.equal(free.terms[0].unwanted["mean"], term.prior.unconditional()["mean"])


class Asked(GaussianPrior):
    """Keeps what it was told."""

    def denoise(self, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        self.told = condition
        return super().denoise(noisy, timestep, condition)


@pytest.mark.parametrize("guidance", ["none", "negative", "classifier_free"])
def test_a_prior_is_told_what_each_view_sees_of_the_scenes_map(tmp_path, guidance):
    refiner = refiner_for(Asked(16), tmp_path, distillation=DistillationConfig(guidance=guidance))
    refiner.scene_map = north_wall()
    prior = refiner.terms[0].prior
    prior.maps = refiner.scene_map.description
    refiner.losses(room_grid(), room_scene().renderer, 0.0, torch.Generator().manual_seed(3))
    cameras = refiner.views(4, torch.Generator().manual_seed(3))
    expected = north_wall().seen_by(cameras)
    assert torch.equal(prior.told["seen"][:4], expected) and expected.unique().numel() > 1
    if guidance != "none":
        assert torch.equal(prior.told["seen"][4:], expected), "y and y' differ in nothing but y"


def test_strength_is_the_share_of_the_noise_that_is_used():
    config = RefinementConfig(prior="x", strength=0.5, distillation=DistillationConfig(min_time=0.1, max_time=0.9))
    assert config.effective_distillation().max_time == pytest.approx(0.5)


class Silent(GaussianPrior):
    """Never says anything finite."""

    def denoise(self, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        return torch.full_like(noisy, torch.nan)


# In nerfstudio


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("refine")
    save_image_variation_prior(root / "variation")
    save_text_prior(root / "text")
    cameras = surround_cameras(4, (32, 32), 16.0)
    latents = {"global": torch.arange(3.0)}
    write_generated_scene(root / "scene", room_grid(), small_scene_autoencoder(), cameras, latents, {"seed": 7})
    return {name: root / name for name in ("variation", "text", "scene")}


def config_for(folders: dict[str, Path], output_dir: Path, steps: int, **refinement) -> RefineTrainerConfig:
    config = copy.deepcopy(nfldm_refine.config)
    config.data = config.pipeline.datamanager.data = folders["scene"]
    config.output_dir, config.experiment_name, config.timestamp = output_dir, "scene", "run"
    config.max_num_iterations, config.vis, config.machine.device_type = steps, "tensorboard", "cpu"
    config.steps_per_save, config.steps_per_eval_image, config.save_only_latest_checkpoint = 2, 2, False
    defaults = {"prior": str(folders["variation"]), "clean_images": folders["scene"]}
    config.refinement = RefinementConfig(**{**defaults, **refinement})
    return config


def train(config: RefineTrainerConfig) -> RefineTrainer:
    """What `ns-train` does."""
    config.save_config()
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def trainer(folders, tmp_path_factory: pytest.TempPathFactory) -> RefineTrainer:
    return train(config_for(folders, tmp_path_factory.mktemp("outputs"), 4))


def changes(trainer: RefineTrainer) -> dict[str, Tensor]:
    return {name: value for name, value in trainer.pipeline.model.state_dict().items() if name.endswith("_change")}


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_result_is_a_generated_scene_and_the_original_stays(folders, trainer, tmp_path):
    copied = tmp_path / "scene"
    shutil.copytree(folders["scene"], copied)
    (copied / "bev.png").write_bytes(b"a map")
    before = digest(copied)
    refined = train(config_for({**folders, "scene": copied}, tmp_path / "outputs", 1))
    assert digest(copied) == before
    assert (refined.base_dir / "scene" / "bev.png").read_bytes() == b"a map", "it is still a map of the scene"
    result = load_generated_scene(trainer.base_dir / "scene")
    shown = trainer.pipeline.model.shown_grid()
    assert torch.allclose(result.grid.features, shown.features, atol=2e-3)
    assert torch.allclose(result.grid.density, shown.density, rtol=1e-3)
    assert not torch.allclose(result.grid.features, room_grid().features, atol=2e-3)
    assert result.provenance["seed"] == 7 and torch.equal(result.latents["global"], torch.arange(3.0))
    entry = result.provenance["refinements"][0]
    assert entry["steps"] == 4 and entry["distillation"]["guidance"] == "negative" and entry["decoder"] == "frozen"
    decoder = small_scene_autoencoder().decoder.state_dict()
    assert all(torch.equal(value, decoder[name]) for name, value in result.renderer.decoder.state_dict().items())


def test_run_and_result_show_the_refined_scene(trainer):
    expected = None
    for config in (trainer.base_dir / "config.yml", trainer.base_dir / "scene" / "config.yml"):
        _, pipeline, _, _ = eval_setup(config)
        camera = pipeline.datamanager.train_dataset.cameras[1:2]
        with pipeline.model.as_trained():
            image = pipeline.model.get_outputs_for_camera(camera)["rgb"]
        expected = image if expected is None else expected
        assert torch.allclose(image, expected, atol=5e-3)
    original = load_generated_scene(trainer.config.data)
    assert not torch.allclose(expected.movedim(-1, 0), render_views(original, camera).images[0], atol=5e-3)


def test_a_resumed_run_gives_the_same_scene(folders, trainer, tmp_path):
    config = config_for(folders, tmp_path, 1)
    config.load_dir, config.load_step = trainer.checkpoint_dir, 2
    resumed = changes(train(config))
    assert resumed.keys() == changes(trainer).keys() and len(resumed) == 3
    assert all(torch.equal(value, changes(trainer)[name]) for name, value in resumed.items())


def test_a_refined_scene_can_be_refined_to_words_with_its_decoder(folders, trainer, tmp_path):
    again = {**folders, "scene": trainer.base_dir / "scene"}
    config = config_for(
        again,
        tmp_path,
        1,
        prior=str(folders["text"]),
        clean_images=None,
        style="winter",
        distillation=DistillationConfig(guidance="classifier_free", objective="reconstruction"),
    )
    config.pipeline.model.tune_decoder, config.result = True, tmp_path / "winter"
    train(config)
    result = load_generated_scene(tmp_path / "winter")
    assert [entry["style"] for entry in result.provenance["refinements"]] == [None, "winter"]
    decoder = small_scene_autoencoder().decoder.state_dict()
    assert not all(torch.equal(value, decoder[name]) for name, value in result.renderer.decoder.state_dict().items())
    config.timestamp = "other"
    with pytest.raises(SystemExit):
        train(config)  # the result exists


def test_steps_without_a_finite_gradient_are_left_out_until_there_are_too_many(folders, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("nfldm_ns.refine.loading.load_prior", lambda *_: Silent(16))
    some = train(config_for(folders, tmp_path / "some", 3))
    assert all((value == 0).all() for value in changes(some).values())
    with pytest.raises(SystemExit) as ending:
        train(config_for(folders, tmp_path / "many", 12))
    assert ending.value.code == 2 and "no finite gradient (what the prior says)" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("refinement", "sentence"),
    [
        ({"prior": None}, "No prior was given"),
        ({"prior": "tests"}, "tests holds no prior"),
        ({"clean_images": None}, "Nothing tells this prior"),
        ({"style": "winter"}, "images only"),
        ({"style": "winter.png"}, "There is no image winter.png"),
        ({"strength": 0.0}, "strength must lie"),
        ({"clean_images": Path("nowhere")}, "There is no nowhere"),
        ({"distillation": DistillationConfig(min_time=0.9, max_time=0.1)}, "no range"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(folders, tmp_path, capfd, refinement, sentence):
    with pytest.raises(SystemExit) as ending:
        train(config_for(folders, tmp_path / "outputs", 1, **refinement))
    assert ending.value.code == 2 and sentence in capfd.readouterr().err
    assert not (tmp_path / "outputs").exists()


def test_scenes_of_the_shipped_generator_have_a_prior(folders, tmp_path, capsys):
    scene = shutil.copytree(folders["scene"], tmp_path / "scene")
    path = scene / "scene.json"
    description = json.loads(path.read_text())
    for generator, prior in (("vizdoom-rooms", "vizdoom-prior"), ("/else/vizdoom-rooms", None), (3, None)):
        description["provenance"] = {"pipeline": generator}
        path.write_text(json.dumps(description))
        config = config_for({**folders, "scene": scene}, tmp_path / "outputs", 1, prior=None)
        if prior is None:
            with pytest.raises(SystemExit):
                config.save_config()
        else:
            config.save_config()
            assert "Refining with vizdoom-prior" in capsys.readouterr().out.replace("\n", " ")
        assert config.refinement.prior == prior
    assert load_prior("vizdoom-prior") is not None


def test_the_original_is_never_the_result(folders, tmp_path, capfd):
    config = config_for(folders, tmp_path, 1)
    config.result = folders["scene"]
    with pytest.raises(SystemExit):
        train(config)
    assert "stays as it is" in capfd.readouterr().err
    assert json.loads((folders["scene"] / "scene.json").read_text())["provenance"] == {"seed": 7}


def test_options_of_the_command_line():
    arguments = ["--prior", "folder", "--style", "winter wonderland", "--strength", "0.5", "--data", "scene"]
    arguments += ["--guidance", "classifier_free", "--area", "4", "--objective", "multistep", "--sample-every", "2"]
    arguments += ["--shaded-share", "0.2", "--view-prompt-share", "0.5", "--second-prior", "other", "--lora", "weights"]
    config = tyro.cli(RefineTrainerConfig, default=copy.deepcopy(nfldm_refine.config), args=arguments)
    assert config.refinement.style == "winter wonderland" and config.refinement.strength == 0.5
    assert config.refinement.distillation.guidance == "classifier_free" and config.refinement.views.area == 4
    assert config.refinement.distillation.objective == "multistep" and config.refinement.shading.shaded_share == 0.2
    assert config.refinement.second_prior == "other" and config.refinement.lora == "weights"


def test_refining_without_a_trainer_gives_the_same_scene(folders, trainer):
    config, scene = trainer.config, load_generated_scene(folders["scene"])
    refiner = Refiner(scene, load_prior(str(folders["variation"])), config.refinement, config.machine.seed)
    grid = refine_grid(scene, refiner, config.optimizers, 4, config.machine.seed)
    shown = trainer.pipeline.model.shown_grid()
    assert torch.equal(grid.density, shown.density) and torch.equal(grid.features, shown.features)
