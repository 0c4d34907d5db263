"""Stage 1 in nerfstudio: data, training, resuming, evaluating, showing, and what happens to bad input."""

from __future__ import annotations

import copy
import inspect
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.utils.eval_utils import eval_setup

from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder, read_training_record
from nfldm_ns.autoencoder.losses import StageOneLossConfig
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.autoencoder.scene_sampler import SceneCache, SceneSampler, SceneSamplerConfig
from nfldm_ns.dataparsers.scene_collection import SceneCollectionDataParserConfig
from nfldm_ns.errors import UserInputError
from nfldm_ns.method_configs.scene_ae import discriminator_optimizer, nfldm_scene_ae_tiny
from nfldm_ns.plugin.command_line import config_folder
from nfldm_ns.plugin.scene_ae_model import SceneNetworkConfig
from nfldm_ns.plugin.scene_ae_trainer import CosineScheduleConfig, SceneAutoencoderTrainerConfig
from nfldm_ns.plugin.voxel_model import (
    VoxelGridField,
    density_from_above,
    ray_features,
    ray_lengths,
    single_camera,
)
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import camera_rays
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from tests.pretrained import require_weights
from tests.synthetic import make_box_room_collection

SMALL_NETWORK = SceneNetworkConfig(
    grid_shape=(4, 16, 16),
    feature_channels=4,
    num_depth_bins=12,
    num_samples=16,
    encoder_channels=(8, 8),
    encoder_blocks=1,
    decoder_channels=(8, 8),
    decoder_blocks=1,
)
COMMANDS = Path(sys.executable).parent


def small_config(data: Path, output_dir: Path, steps: int) -> SceneAutoencoderTrainerConfig:
    config = copy.deepcopy(nfldm_scene_ae_tiny.config)
    config.data = config.pipeline.datamanager.data = data
    config.output_dir, config.experiment_name, config.timestamp = output_dir, "rooms", "run"
    config.max_num_iterations, config.vis = steps, "tensorboard"
    config.steps_per_eval_batch, config.steps_per_eval_image, config.steps_per_save = 4, 4, 3
    config.save_only_latest_checkpoint = False
    config.machine.device_type = "cpu"
    config.pipeline.datamanager.sampling = SceneSamplerConfig(scenes_per_batch=2, num_target_views=2)
    config.pipeline.model.network = SMALL_NETWORK
    config.pipeline.model.loss.lpips_mult = config.pipeline.model.loss.adversarial_mult = 0.0
    config.pipeline.model.precision = "fp32"
    return config


def train(config: SceneAutoencoderTrainerConfig) -> Path:
    """What `ns-train` does, without its 15 seconds of imports."""
    config.save_config()
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    trainer.train()
    return config.get_base_dir()


@pytest.fixture(scope="module")
def run(box_room_collection: SceneCollection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps with checkpoints after steps 3 and 5."""
    return train(small_config(box_room_collection.root, tmp_path_factory.mktemp("outputs"), 6))


def checkpoint(run: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(run / "nerfstudio_models" / f"step-{step:09d}.ckpt")["pipeline"]


# Data


def test_dataparser_gives_source_views_to_train_and_target_views_to_evaluate(box_room_collection):
    parser = SceneCollectionDataParserConfig(data=box_room_collection.root, scene="room_001").setup()
    scene = box_room_collection.load_scene("room_001")
    for split, views in (("train", scene.source), ("val", scene.target), ("test", scene.target)):
        outputs = parser.get_dataparser_outputs(split)
        assert torch.equal(outputs.cameras.camera_to_worlds, views.cameras.camera_to_worlds)
        assert all(path.is_file() for path in outputs.image_filenames + outputs.metadata["depth_filenames"])
        assert torch.equal(outputs.scene_box.aabb, box_room_collection.aabb)
    assert (outputs.dataparser_transform == torch.eye(4)[:3]).all()
    assert outputs.dataparser_scale == 1.0


def test_dataparser_shows_a_held_out_scene_unless_told_otherwise(box_room_collection):
    parser = SceneCollectionDataParserConfig(data=box_room_collection.root).setup()
    assert parser.scene_id(box_room_collection) == box_room_collection.splits["test"][0]


def test_cached_scenes_are_those_on_disk(box_room_collection):
    cache = SceneCache(box_room_collection, limit_gib=1.0)
    first, again = cache.load("room_000"), cache.load("room_000")
    assert cache.num_bytes == 12 * 32 * 32 * 5  # 12 views of 3 bytes of colour and 2 of depth
    for a, b in ((first.source, again.source), (first.target, again.target)):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.depths, b.depths)
    nothing = SceneCache(box_room_collection, limit_gib=0.0)
    assert torch.equal(nothing.load("room_000").source.images, first.source.images)
    assert nothing.num_bytes == 0


def test_every_scene_once_per_epoch_on_one_of_the_ranks(box_room_collection):
    cache, ids = SceneCache(box_room_collection, 1.0), [f"scene_{i}" for i in range(8)]
    config = SceneSamplerConfig(scenes_per_batch=2)
    ranks = [SceneSampler(cache, ids, config, world_size=2, rank=rank) for rank in range(2)]
    for epoch in range(2):
        seen = [scene for step in (0, 1) for rank in ranks for scene in rank.batch_ids(2 * epoch + step)]
        assert sorted(seen) == ids
    assert ranks[0].batch_ids(0) != ranks[0].batch_ids(2)


def test_the_batch_of_a_step_is_always_the_same(box_room_collection):
    cache, ids = SceneCache(box_room_collection, 1.0), box_room_collection.splits["train"]
    config = SceneSamplerConfig(num_source_views=5, num_target_views=3, num_extra_targets=1)
    straight, resumed = (SceneSampler(cache, ids, config) for _ in range(2))
    batches = [straight.batch(step) for step in range(3)]
    again = resumed.batch(2)
    assert batches[2].scene_ids == again.scene_ids
    assert batches[2].source.shape == (2, 5)
    assert batches[2].target.shape == (2, 4)
    assert torch.equal(batches[2].target.images, again.target.images)
    assert torch.equal(batches[2].source.cameras.camera_to_worlds, again.source.cameras.camera_to_worlds)


def test_fewer_views_in_some_batches(box_room_collection):
    cache, ids = SceneCache(box_room_collection, 1.0), box_room_collection.splits["train"]
    config = SceneSamplerConfig(scenes_per_batch=1, view_dropout=0.5)
    ranks = [SceneSampler(cache, ids, config, world_size=2, rank=rank) for rank in range(2)]
    counts = [[rank.batch(step).source.shape[1] for step in range(60)] for rank in ranks]
    assert counts[0] == counts[1]  # so that all ranks have the same work
    assert set(counts[0]) == set(range(1, 9)) and 20 < counts[0].count(8) < 50
    assert {rank.batch(0).target.shape[1] for rank in ranks} == {4}


def test_depth_is_dropped_from_source_views_alone(box_room_collection):
    cache, ids = SceneCache(box_room_collection, 1.0), box_room_collection.splits["train"]
    config = SceneSamplerConfig(scenes_per_batch=1, missing_depth=0.3, sparse_depth=0.3, sparse_points=(4, 40))
    sampler = SceneSampler(cache, ids, config)
    known = []
    for step in range(60):
        batch = sampler.batch(step)
        known.append((batch.source.depths > 0).sum(dim=(2, 3, 4))[0])
        assert bool((batch.target.depths > 0).all())
    counts = torch.stack(known)
    assert bool((counts == counts[:, :1]).all())  # one kind for all views of a scene
    kinds = counts[:, 0]
    assert 8 < int((kinds == 0).sum()) < 30 and 8 < int(((kinds >= 4) & (kinds <= 40)).sum()) < 30
    assert int((kinds == 32 * 32).sum()) > 10
    assert torch.equal(SceneSampler(cache, ids, config).batch(7).source.depths, sampler.batch(7).source.depths)


def test_turned_scenes_are_the_same_scenes(box_room_collection):
    """Points seen through depth and pose turn about the z axis by one multiple of 90 degrees for all views."""
    cache, scene_id = SceneCache(box_room_collection, 1.0), "room_000"
    still = SceneSampler(cache, [scene_id], SceneSamplerConfig(scenes_per_batch=1, quarter_turns=False)).batch(0)
    sampler = SceneSampler(cache, [scene_id], SceneSamplerConfig(scenes_per_batch=1))

    def points(batch):
        parts = []
        for views in (batch.source, batch.target):
            origins, directions = camera_rays(views.cameras, *views.image_size)
            surface = origins[..., None, None, :] + directions * views.depths.movedim(-3, -1)
            parts.append(surface.reshape(-1, 3))
        return torch.cat(parts)

    turns = set()
    for step in range(8):
        turned = points(sampler.batch(step))
        candidates = []
        for quarter in range(4):
            cos, sin = round(math.cos(quarter * math.pi / 2)), round(math.sin(quarter * math.pi / 2))
            turn = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
            if torch.allclose(points(still) @ turn.T, turned, atol=1e-4):
                candidates.append(quarter)
        assert len(candidates) == 1
        turns.update(candidates)
    assert len(turns) > 1


def test_a_box_that_cannot_be_turned_is_refused(box_room_collection):
    collection = copy.copy(box_room_collection)
    collection.aabb = torch.tensor([[-3.0, -2.0, -2.0], [3.0, 2.0, 2.0]])
    with pytest.raises(UserInputError, match="not square around the origin"):
        SceneSampler(SceneCache(collection, 1.0), ["room_000"], SceneSamplerConfig())


# Training


def test_network_config_covers_what_the_data_do_not_decide():
    parameters = set(inspect.signature(SceneAutoencoder.__init__).parameters)
    from_data = {"self", "aabb", "near", "far", "image_size", "focal_length", "max_focal_length"}
    assert set(vars(SMALL_NETWORK)) == parameters - from_data


def test_schedule_follows_the_length_of_the_run():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], lr=2.0)
    scheduler = CosineScheduleConfig(warmup_steps=10, final_factor=0.1, max_steps=50)
    schedule = scheduler.setup().get_scheduler(optimizer, 2.0)
    rates = []
    for _ in range(51):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert 0 < rates[0] < rates[4] < rates[5]  # at most a tenth of the run warms up
    assert max(rates) == pytest.approx(2.0, rel=0.05)
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert rates[50] == pytest.approx(0.2)
    timed = CosineScheduleConfig(max_steps=100, time_budget_s=60.0, seconds_before=15.0)
    assert timed.progress(10, seconds=30.0) == pytest.approx(0.75)
    assert timed.progress(90, seconds=30.0) == pytest.approx(0.9)


def test_run_leaves_a_config_checkpoints_and_the_autoencoder(run, box_room_collection):
    config = yaml.load((run / "config.yml").read_text(), Loader=yaml.Loader)
    assert isinstance(config, TrainerConfig)
    assert config.get_base_dir() == run
    assert config.pipeline.datamanager.data == box_room_collection.root
    assert sorted(path.name for path in (run / "nerfstudio_models").iterdir()) == [
        "step-000000003.ckpt",
        "step-000000005.ckpt",
    ]
    record = read_training_record(run / "config.yml")
    assert record["step"] == 5
    assert record["data"] == str(box_room_collection.root)
    loaded = load_scene_autoencoder(run / "config.yml").state_dict()
    trained = checkpoint(run, 5)
    assert all(torch.equal(value, trained[f"_model.autoencoder.{key}"]) for key, value in loaded.items())
    assert not any("perceptual" in key for key in trained)


def test_resumed_run_has_equal_weights(run, box_room_collection, tmp_path):
    config = small_config(box_room_collection.root, tmp_path, 2)
    config.load_dir, config.load_step = run / "nerfstudio_models", 3
    resumed = checkpoint(train(config), 5)
    straight = checkpoint(run, 5)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[key]) for key, value in straight.items())
    assert not all(torch.equal(value, checkpoint(run, 3)[key]) for key, value in straight.items())


def test_training_begins_from_given_weights_with_voxels_of_another_shape(run, box_room_collection, tmp_path):
    config = small_config(box_room_collection.root, tmp_path, 1)
    config.pipeline.model.initial_weights = run / "config.yml"
    config.pipeline.model.network = replace(SMALL_NETWORK, grid_shape=(8, 12, 12))
    config.optimizers["autoencoder"]["optimizer"].lr = 0.0
    begun, given = load_scene_autoencoder(train(config)), load_scene_autoencoder(run)
    assert begun.grid_shape == (8, 12, 12) != given.grid_shape
    assert all(torch.equal(value, begun.state_dict()[key]) for key, value in given.state_dict().items())


def test_training_keeps_the_refinement_of_the_weights_it_begins_from(box_room_collection, tmp_path):
    config = small_config(box_room_collection.root, tmp_path / "first", 1)
    config.pipeline.model.network = replace(SMALL_NETWORK, refinement_channels=4, refinement_steps=1)
    first = train(config)
    config = small_config(box_room_collection.root, tmp_path / "second", 1)
    config.pipeline.model.initial_weights = first
    config.optimizers["autoencoder"]["optimizer"].lr = 0.0
    assert config.pipeline.model.network.refinement_channels == 0
    second = train(config)
    begun, given = load_scene_autoencoder(second), load_scene_autoencoder(first)
    assert (begun.config.refinement_channels, begun.config.refinement_steps) == (4, 1)
    assert all(torch.equal(value, begun.state_dict()[key]) for key, value in given.state_dict().items())
    written = yaml.load((second / "config.yml").read_text(), Loader=yaml.Loader)
    assert written.pipeline.model.network.refinement_channels == 4, "so it can be shown when the first is gone"


def test_initial_weights_do_not_replace_those_of_a_resumed_run(run, box_room_collection, tmp_path):
    config = small_config(box_room_collection.root, tmp_path, 2)
    config.load_dir, config.load_step = run / "nerfstudio_models", 3
    config.pipeline.model.initial_weights = run
    resumed, straight = checkpoint(train(config), 5), checkpoint(run, 5)
    assert all(torch.equal(value, resumed[key]) for key, value in straight.items())


def test_initial_weights_of_other_networks(run, box_room_collection, tmp_path, capfd):
    config = small_config(box_room_collection.root, tmp_path, 1)
    config.pipeline.model.initial_weights = run
    config.pipeline.model.network = replace(SMALL_NETWORK, feature_channels=6)
    with pytest.raises(SystemExit) as ending:
        train(config)
    assert "of another preset" in ended_with(capfd, ending)


PROJECTED = StageOneLossConfig(lpips_views=1, adversarial_mult=0.1, adversarial_start=3)
STYLEGAN2 = StageOneLossConfig(
    lpips_mult=0.0,
    adversarial_mult=0.1,
    adversarial_start=3,
    discriminator="stylegan2",
    discriminator_channel_base=256,
    discriminator_channel_max=16,
    r1_gamma=1.0,
    r1_every=2,
    augment=("color", "translation", "cutout"),
)


@pytest.mark.parametrize("loss", [PROJECTED, STYLEGAN2], ids=lambda loss: loss.discriminator)
def test_adversarial_training_starts_late_and_resumes_equal(box_room_collection, tmp_path, loss):
    if loss.needs_perceptual_network:
        require_weights("lpips-vgg")

    def config(name: str, steps: int) -> SceneAutoencoderTrainerConfig:
        config = small_config(box_room_collection.root, tmp_path / name, steps)
        config.steps_per_save = 1
        config.pipeline.model.loss = copy.deepcopy(loss)
        config.optimizers["discriminator"]["optimizer"] = discriminator_optimizer(loss, 1e-3)
        return config

    run = train(config("straight", 5))
    before, start, after, straight = (checkpoint(run, step) for step in (1, 2, 3, 4))
    judge = [key for key in straight if "discriminator" in key]
    assert judge and not any("discriminator" in key for key in load_scene_autoencoder(run).state_dict())
    assert all(torch.equal(before[key], start[key]) for key in judge)
    assert not all(torch.equal(start[key], after[key]) for key in judge)
    resumed = config("resumed", 1)
    resumed.load_dir, resumed.load_step = run / "nerfstudio_models", 3
    again = checkpoint(train(resumed), 4)
    assert straight.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in straight.items())


def test_auto_encoder_and_discriminator_have_optimisers_of_their_own(box_room_collection, tmp_path):
    config = small_config(box_room_collection.root, tmp_path, 1)
    config.pipeline.model.loss = copy.deepcopy(STYLEGAN2)
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    owned = {
        name: {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, optimizer in trainer.optimizers.optimizers.items()
    }
    model = trainer.pipeline.model
    assert owned["autoencoder"] == {id(parameter) for parameter in model.autoencoder.parameters()}
    assert owned["discriminator"] == {id(parameter) for parameter in model.discriminator.parameters()}
    assert owned["autoencoder"].isdisjoint(owned["discriminator"])


def test_a_discriminator_that_cannot_be_made(box_room_collection, tmp_path, capfd):
    config = small_config(box_room_collection.root, tmp_path, 1)
    config.pipeline.model.loss = StageOneLossConfig(adversarial_mult=0.1, r1_gamma=1.0)
    with pytest.raises(SystemExit) as ending:
        train(config)
    assert "choose the discriminator stylegan2" in ended_with(capfd, ending)
    assert not list(tmp_path.rglob("config.yml"))


def test_time_budget_ends_the_training(box_room_collection, tmp_path):
    config = small_config(box_room_collection.root, tmp_path, 1000)
    config.time_budget_s = 0.5
    record = read_training_record(train(config))
    assert 0 < record["step"] < 1000
    assert record["seconds"] >= 0.5


# Evaluating and showing


@pytest.fixture(scope="module")
def pipeline(run):
    _, pipeline, _, step = eval_setup(run / "config.yml")
    assert step == 5
    return pipeline


def test_novel_views_of_the_test_split_beside_baselines(pipeline, tmp_path):
    require_weights("lpips-vgg")
    results = pipeline.get_average_eval_image_metrics(output_path=tmp_path, get_std=True)
    assert results["num_scenes"] == 2
    assert results["num_images"] == 8
    for method in ("", "nearest_view_", "mean_image_"):
        assert 5 < results[f"{method}psnr"] < 60
        assert results[f"{method}lpips"] > 0
    assert results["depth_mae_m"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["room_004.png", "room_005.png"]
    assert pipeline.get_average_eval_image_metrics() == results
    json.dumps(results)


def test_the_scene_chosen_in_the_list_is_shown(pipeline, box_room_collection):
    options = pipeline.scene_dropdown.options
    assert len(options) == 6
    camera = box_room_collection.load_scene("room_004").source.cameras[0:1]
    pictures = {}
    for label in ("room_004 (test)", "room_000 (train)"):
        pipeline.scene_dropdown.value = label
        pipeline.scene_dropdown.cb_hook(pipeline.scene_dropdown)
        pictures[label] = pipeline.model.get_outputs_for_camera(camera)
        shown = box_room_collection.load_scene(label.split()[0])
        assert torch.equal(
            pipeline.datamanager.train_dataset.cameras.camera_to_worlds, shown.source.cameras.camera_to_worlds
        )
    first, second = (picture["rgb"] for picture in pictures.values())
    assert not torch.equal(first, second)
    for name, channels in (("rgb", 3), ("depth", 1), ("accumulation", 1), ("density_from_above", 1)):
        assert pictures["room_004 (test)"][name].shape == (32, 32, channels)


def test_pictures_have_the_size_that_is_asked_for(pipeline, box_room_collection):
    camera = copy.deepcopy(box_room_collection.load_scene("room_004").source.cameras[0:1])
    camera.rescale_output_resolution(2.5)
    outputs = pipeline.model.get_outputs_for_camera(camera)
    assert outputs["rgb"].shape == (80, 80, 3)
    assert outputs["rgb"].min() >= 0
    assert outputs["rgb"].max() <= 1


def test_depth_along_the_ray_is_planar_depth_times_its_length(box_room_collection):
    cameras = box_room_collection.load_scene("room_000").source.cameras
    _, directions = camera_rays(cameras, 32, 32)
    assert torch.allclose(ray_lengths(cameras)[..., 0], directions.norm(dim=-1), atol=1e-5)
    with pytest.raises(UserInputError, match="perspective"):
        fisheye = copy.deepcopy(cameras[0:1])
        fisheye.camera_type[:] = 2
        single_camera(fisheye)


def wall_grid() -> VoxelGrid:
    """A dense wall at x in [2, 3] of an otherwise empty box."""
    density = torch.zeros(1, 1, 8, 24, 24)
    density[..., 20:] = 50.0
    return VoxelGrid(density, torch.zeros(1, 2, 8, 24, 24), torch.tensor([[-3.0, -3.0, -2.0], [3.0, 3.0, 2.0]]))


def test_single_rays_reach_the_wall():
    directions = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.5, 0.2], [-1.0, 0.0, 0.0]]), dim=-1
    )
    rays = RayBundle(torch.zeros(3, 3), directions, pixel_area=torch.ones(3, 1))
    outputs = ray_features(wall_grid(), rays, num_samples=512)
    expected = torch.tensor([2.0, 2.0 / directions[1, 0], 3.0])
    assert torch.allclose(outputs["depth"][:, 0], expected, atol=0.2)
    assert torch.allclose(outputs["accumulation"][:, 0], torch.tensor([1.0, 1.0, 0.0]), atol=1e-3)


def test_field_answers_like_its_grid():
    grid = wall_grid()
    field = VoxelGridField(grid)
    points = torch.tensor([[2.5, 0.0, 0.0], [0.0, 1.0, 0.5], [9.0, 0.0, 0.0]])
    assert torch.equal(field.density_fn(points), grid.sample(points[None])[0][0])
    assert field.density_fn(points)[:, 0].tolist() == [50.0, 0.0, 0.0]


def test_density_from_above_has_north_up_and_the_chosen_layer():
    density = torch.zeros(1, 1, 4, 8, 8)
    density[0, 0, 1, 7, 0] = 100.0  # north-west, second layer: z in [-1, 0]
    grid = VoxelGrid(density, torch.zeros(1, 1, 4, 8, 8), torch.tensor([[-4.0, -4.0, -2.0], [4.0, 4.0, 2.0]]))
    picture = density_from_above(grid, 16, 24, low=-1.0, high=0.5)[..., 0]
    assert picture.shape == (16, 24)
    assert picture[:2, 4:6].min() > 0.99
    assert picture.sum() == pytest.approx(4.0, abs=0.01)
    assert density_from_above(grid, 16, 24, low=0.0, high=2.0).max() == 0


# Bad input


def ended_with(capfd: pytest.CaptureFixture[str], ending: pytest.ExceptionInfo[SystemExit]) -> str:
    """The sentence on stderr of a command that ended with code 2."""
    assert ending.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_missing_data_leave_no_run(tmp_path, capfd):
    with pytest.raises(SystemExit) as ending:
        train(small_config(tmp_path / "nothing", tmp_path / "outputs", 1))
    assert "There is no data folder" in ended_with(capfd, ending)
    assert not (tmp_path / "outputs").exists()


def test_broken_scene_leaves_no_run(tmp_path, capfd):
    collection = make_box_room_collection(tmp_path / "rooms")
    image = collection.scene_dir("room_001") / "images" / "source_03.png"
    image.write_bytes(image.read_bytes()[:100])
    with pytest.raises(SystemExit) as ending:
        train(small_config(collection.root, tmp_path / "outputs", 1))
    assert "source_03.png is not a readable image" in ended_with(capfd, ending)
    assert not (tmp_path / "outputs").exists()


def test_collection_without_test_split(tmp_path, capfd):
    collection = make_box_room_collection(tmp_path / "rooms", num_test=0)
    with pytest.raises(SystemExit) as ending:
        train(small_config(collection.root, tmp_path / "outputs", 1))
    assert "no test split" in ended_with(capfd, ending)


def test_unknown_scene_to_show(box_room_collection, tmp_path, capfd):
    config = small_config(box_room_collection.root, tmp_path, 1)
    config.pipeline.datamanager.dataparser.scene = "attic"
    with pytest.raises(SystemExit) as ending:
        train(config)
    assert "has no scene 'attic'" in ended_with(capfd, ending)


def test_checkpoint_of_another_preset(run, box_room_collection, tmp_path, capfd):
    config = small_config(box_room_collection.root, tmp_path, 1)
    config.pipeline.model.network = copy.deepcopy(SMALL_NETWORK)
    config.pipeline.model.network.feature_channels = 6
    config.load_dir = run / "nerfstudio_models"
    with pytest.raises(SystemExit) as ending:
        train(config)
    assert "of another preset" in ended_with(capfd, ending)
    assert not list(tmp_path.rglob("config.yml"))


@pytest.mark.parametrize("damage", ["truncated", "empty folder", "no folder"])
def test_checkpoint_that_cannot_be_resumed(run, box_room_collection, tmp_path, capfd, damage):
    config = small_config(box_room_collection.root, tmp_path / "outputs", 1)
    config.load_dir = tmp_path / "nerfstudio_models"
    if damage != "no folder":
        config.load_dir.mkdir()
    if damage == "truncated":
        whole = (run / "nerfstudio_models" / "step-000000005.ckpt").read_bytes()
        (config.load_dir / "step-000000005.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit) as ending:
        train(config)
    sentence = ended_with(capfd, ending)
    assert "cannot be resumed" in sentence if damage == "truncated" else "There is no checkpoint" in sentence


def test_truncated_checkpoint_is_not_shown(run, tmp_path, capfd):
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    path = broken / "nerfstudio_models" / "step-000000005.ckpt"
    path.write_bytes(path.read_bytes()[:5000])
    config = yaml.load((broken / "config.yml").read_text(), Loader=yaml.Loader)
    config.output_dir, config.experiment_name, config.method_name, config.timestamp = tmp_path, ".", ".", "run"
    with pytest.raises(SystemExit) as ending:
        config.get_checkpoint_dir()
    assert "is damaged" in ended_with(capfd, ending)


def test_full_disk_leaves_no_half_checkpoint(box_room_collection, small_disk, tmp_path, capfd):
    trainer = small_config(box_room_collection.root, tmp_path, 1).setup(local_rank=0, world_size=1)
    trainer.setup()
    trainer.checkpoint_dir = small_disk / "nerfstudio_models"
    with pytest.raises(SystemExit) as ending:
        trainer.save_checkpoint(0)
    assert "disk" in ended_with(capfd, ending)
    assert not [path for path in small_disk.rglob("*") if path.is_file()]


def test_autoencoder_folders_that_cannot_be_used(run, tmp_path):
    with pytest.raises(UserInputError, match="There is no trained scene auto-encoder"):
        load_scene_autoencoder(tmp_path / "nothing")
    with pytest.raises(UserInputError, match="no checkpoint was saved"):
        load_scene_autoencoder(tmp_path)
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    weights = broken / "scene_autoencoder" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserInputError, match="is damaged"):
        load_scene_autoencoder(broken)
    weights.write_bytes(whole)
    config = json.loads((weights.parent / "config.json").read_text())
    (weights.parent / "config.json").write_text(json.dumps({**config, "feature_channels": 8}))
    with pytest.raises(UserInputError, match="of another preset"):
        load_scene_autoencoder(broken)


def test_config_folder_of_a_command_line(tmp_path):
    path = tmp_path / "config.yml"
    path.touch()
    assert config_folder(["ns-viewer", "--load-config", str(path)]) == tmp_path.resolve()
    assert config_folder(["ns-viewer", f"--load-config={path}"]) == tmp_path.resolve()
    assert config_folder(["ns-render", "interpolate", "--load_config", str(path)]) == tmp_path.resolve()
    assert config_folder(["ns-viewer", "--load-config"]) is None
    assert config_folder(["ns-train"]) is None


# The real commands


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ns_train(box_room_collection, tmp_path):
    require_weights("lpips-vgg")
    command = [COMMANDS / "ns-train", "nfldm-scene-ae-tiny", "--data", box_room_collection.root]
    command += ["--pipeline.model.network.grid-shape", "4", "16", "16", "--max-num-iterations", "2"]
    command += ["--timestamp", "run", "--experiment-name", "rooms", "--machine.device-type", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "outputs/rooms/nfldm-scene-ae-tiny/run"
    assert load_scene_autoencoder(run / "config.yml").grid_shape == (4, 16, 16)
    assert list(run.glob("events.out.tfevents.*"))
