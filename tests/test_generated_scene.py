"""Generated scenes: what is written is what was sampled, and nerfstudio's commands work on it."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image

from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.cameras import fly_through, look_along, surround_cameras
from nfldm_ns.generated.scene_files import load_generated_scene
from nfldm_ns.plugin.generated_run import render_views, write_generated_scene
from nfldm_ns.plugin.voxel_model import crop_grid
from nfldm_ns.sampling.contact_sheet import contact_sheet
from nfldm_ns.scenes.collection import read_depth, read_image
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from tests.pretrained import require_weights
from tests.small_models import BACKGROUND_CHANNELS, small_scene_autoencoder
from tests.synthetic import AABB, level_cameras

COMMANDS = Path(sys.executable).parent


def room_grid(channels: int = 4) -> VoxelGrid:
    """A room with opaque walls at the border of the box, before a random background."""
    generator = torch.Generator().manual_seed(0)
    density = torch.full((1, 1, 4, 16, 16), 20.0)
    density[:, :, 1:-1, 2:-2, 2:-2] = 0.0
    features = torch.rand(1, channels, 4, 16, 16, generator=generator) * 2 - 1
    background = torch.randn(1, BACKGROUND_CHANNELS, 4, generator=generator)
    return VoxelGrid(density, features, torch.tensor(AABB), background)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated") / "scene_000007"
    write_generated_scene(
        folder,
        room_grid(),
        small_scene_autoencoder(),
        surround_cameras(6, (32, 32), 16.0),
        latents={"global": torch.arange(3.0), "fine": torch.ones(2, 4, 4, dtype=torch.int64)},
        provenance={"seed": 7},
    )
    return folder


# Cameras


def test_look_along_agrees_with_level_cameras():
    yaw = torch.linspace(-3, 3, 7)
    positions = torch.randn(7, 3)
    expected = level_cameras(positions, yaw, 16).camera_to_worlds
    assert torch.allclose(look_along(positions, yaw, torch.zeros(7)), expected, atol=1e-6)


def test_looking_up_looks_up():
    pose = look_along(torch.zeros(1, 3), torch.tensor([0.5]), torch.tensor([0.3]))[0]
    assert -pose[2, 2] == pytest.approx(math.sin(0.3))
    assert torch.allclose(pose[:, :3] @ pose[:, :3].T, torch.eye(3), atol=1e-6)
    assert torch.det(pose[:, :3]) == pytest.approx(1.0)


def test_fly_through_is_a_smooth_closed_path_among_the_cameras():
    yaw = torch.arange(8) / 8 * 2 * math.pi
    positions = torch.stack([yaw.cos(), yaw.sin(), torch.zeros(8)], dim=-1) * 0.6 + torch.tensor([1.0, 2.0, 0.3])
    cameras = level_cameras(positions, yaw, 32)
    path = fly_through(cameras, 48)
    poses = path.camera_to_worlds
    assert path.shape == (48,)
    assert torch.allclose(poses[0, :, :3], cameras.camera_to_worlds[0, :, :3], atol=1e-5)
    steps = (poses - poses.roll(1, 0)).flatten(1).norm(dim=-1)  # the first follows the last
    assert steps.max() < 1.2 * steps.min()
    distances = (poses[:, :, 3] - torch.tensor([1.0, 2.0, 0.3])).norm(dim=-1)
    assert torch.allclose(distances, torch.full((48,), 0.3), atol=1e-5)


# Files


def test_scene_survives_storage_up_to_half_precision(folder):
    scene, grid = load_generated_scene(folder), room_grid()
    assert torch.equal(scene.grid.density, grid.density)
    assert torch.allclose(scene.grid.features, grid.features, atol=1e-3)
    assert torch.allclose(scene.grid.background, grid.background, atol=2e-3)
    assert torch.equal(scene.grid.aabb, grid.aabb)
    assert scene.provenance == {"seed": 7}
    assert torch.equal(scene.latents["global"], torch.arange(3.0))
    assert scene.latents["fine"].dtype == torch.int64
    expected = surround_cameras(6, (32, 32), 16.0)
    assert torch.allclose(scene.cameras.camera_to_worlds, expected.camera_to_worlds)
    assert torch.allclose(scene.cameras.fx, expected.fx)


def test_renderer_without_encoder_renders_the_same(folder):
    scene, autoencoder = load_generated_scene(folder), small_scene_autoencoder()
    assert not any(name.startswith("encoder.") for name in scene.renderer.state_dict())
    views = render_views(scene, scene.cameras)
    with torch.no_grad():
        expected = autoencoder.render(scene.grid, scene.cameras[None, ...])
    assert torch.allclose(views.images, expected.rgb[0].clamp(0, 1), atol=1e-6)


def test_a_scene_without_walls_shows_its_background(tmp_path):
    autoencoder, cameras = small_scene_autoencoder(), surround_cameras(4, (32, 32), 16.0)
    images = {}
    for name, code in {"none": None, "one": room_grid().background, "other": -room_grid().background}.items():
        grid = replace(room_grid(), density=torch.zeros(1, 1, 4, 16, 16), background=code)
        write_generated_scene(tmp_path / name, grid, autoencoder, cameras)
        scene = load_generated_scene(tmp_path / name)
        assert (scene.grid.background is None) == (code is None)
        _, pipeline, _, _ = eval_setup(tmp_path / name / "config.yml")
        steady = pipeline.model.get_outputs_for_camera(cameras[1:2])["rgb"]
        with pipeline.model.as_trained():
            images[name] = pipeline.model.get_outputs_for_camera(cameras[1:2])["rgb"]
        with torch.no_grad():
            expected = autoencoder.render(grid, cameras[1:2][None, ...]).rgb[0, 0].clamp(0, 1)
        assert torch.allclose(images[name], expected.permute(1, 2, 0), atol=1e-3), name
        assert torch.allclose(steady, images[name], atol=0.02), name
    assert (images["one"] - images["other"]).abs().max() > 10 * 1e-3
    assert (images["one"] - images["none"]).abs().max() > 10 * 1e-3


def test_images_and_depths_on_disk_are_the_renderings(folder):
    scene = load_generated_scene(folder)
    views = render_views(scene, scene.cameras)
    for i in range(6):
        image = read_image(folder / "images" / f"source_{i:02d}.png", (32, 32)) / 255.0
        depth = read_depth(folder / "depths" / f"source_{i:02d}.png", (32, 32))
        assert np.abs(image - views.images[i].permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
        assert np.abs(depth - views.depths[i, 0].numpy()).max() <= 0.0006


def test_the_same_scene_gives_the_same_files(folder, tmp_path):
    again = tmp_path / "scene_000007"
    write_generated_scene(
        again,
        room_grid(),
        small_scene_autoencoder(),
        surround_cameras(6, (32, 32), 16.0),
        latents={"global": torch.arange(3.0), "fine": torch.ones(2, 4, 4, dtype=torch.int64)},
        provenance={"seed": 7},
    )
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for name in names:
        if name.name != "config.yml":  # it holds the folder
            assert (folder / name).read_bytes() == (again / name).read_bytes(), name


def test_a_failed_scene_leaves_nothing(tmp_path):
    autoencoder = small_scene_autoencoder()
    with pytest.raises(TypeError):
        write_generated_scene(
            tmp_path / "scene",
            room_grid(),
            autoencoder,
            surround_cameras(2, (32, 32), 16.0),
            provenance={"seed": object()},
        )
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="one scene at a time"):
        write_generated_scene(
            tmp_path / "scene", VoxelGrid.cat([room_grid()] * 2), autoencoder, surround_cameras(2, (32, 32), 16.0)
        )


@pytest.mark.parametrize(
    ("name", "damage", "sentence"),
    [
        ("scene.json", None, "has no scene.json"),
        ("scene.json", b'{"format": "nfldm-', "not valid JSON"),
        ("scene.json", b'{"format": "other", "version": 1}', "not of format"),
        ("scene.safetensors", None, "is missing"),
        ("scene.safetensors", b"\x00" * 64, "is damaged"),
    ],
)
def test_broken_scenes_are_refused(folder, tmp_path, name, damage, sentence):
    broken = tmp_path / "scene"
    shutil.copytree(folder, broken)
    (broken / name).unlink()
    if damage is not None:
        (broken / name).write_bytes(damage)
    with pytest.raises(UserInputError, match=sentence):
        load_generated_scene(broken)


def test_a_scene_of_other_sizes_is_refused(folder, tmp_path):
    broken = tmp_path / "scene"
    shutil.copytree(folder, broken)
    description = json.loads((broken / "scene.json").read_text())
    description["autoencoder"]["decoder_channels"] = [16, 8]
    (broken / "scene.json").write_text(json.dumps(description))
    with pytest.raises(UserInputError, match="of another preset"):
        load_generated_scene(broken)


# In nerfstudio


def test_config_is_a_trainer_config_of_this_folder(folder):
    config = yaml.load((folder / "config.yml").read_text(), Loader=yaml.Loader)
    assert isinstance(config, TrainerConfig)
    assert config.get_base_dir() == folder
    assert config.get_checkpoint_dir() == folder / "nerfstudio_models"


def test_pipeline_shows_the_voxels(folder):
    _, pipeline, _, _ = eval_setup(folder / "config.yml")
    scene = load_generated_scene(folder)
    cameras = pipeline.datamanager.train_dataset.cameras
    assert torch.allclose(cameras.camera_to_worlds, scene.cameras.camera_to_worlds, atol=1e-6)  # not moved, not scaled
    with pipeline.model.as_trained():
        outputs = pipeline.model.get_outputs_for_camera(cameras[2:3])
    views = render_views(scene, scene.cameras)
    assert torch.allclose(outputs["rgb"], views.images[2].permute(1, 2, 0), atol=1e-5)
    assert torch.equal(pipeline.model.field.density.data, scene.grid.density)
    assert torch.equal(pipeline.model.field.background.data, scene.grid.background)


def test_a_cropped_scene_keeps_its_background():
    grid = room_grid()
    box = OrientedBox.from_params((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    cropped = crop_grid(grid, box)
    assert cropped.density.sum() < grid.density.sum() and torch.equal(cropped.background, grid.background)


def test_evaluation_finds_the_images_up_to_rounding(folder):
    require_weights("lpips-vgg")
    _, pipeline, _, _ = eval_setup(folder / "config.yml")
    results = pipeline.get_average_eval_image_metrics()
    assert results["psnr"] > 50
    assert results["lpips"] < 0.01
    assert results["depth_mae_m"] < 0.001


def test_a_moved_scene_is_found_by_the_command_line(folder, tmp_path, monkeypatch, capfd):
    original = tmp_path / "generated" / "scene"
    shutil.copytree(folder, original)
    text = (original / "config.yml").read_text()
    moved = tmp_path / "elsewhere"
    original.rename(moved)
    config = yaml.load(text, Loader=yaml.Loader)
    config.folder = config.data = original
    config.pipeline.datamanager.data = config.pipeline.datamanager.dataparser.data = original
    config.pipeline.model.scene = original
    (moved / "config.yml").write_text(yaml.dump(config))
    monkeypatch.setattr(sys, "argv", ["ns-viewer", "--load-config", str(moved / "config.yml")])
    _, pipeline, path, _ = eval_setup(moved / "config.yml")
    assert path.parent.parent == moved
    assert pipeline.datamanager.get_datapath() == moved
    monkeypatch.setattr(sys, "argv", ["python"])
    with pytest.raises(SystemExit) as ending:
        eval_setup(moved / "config.yml", update_config_callback=lambda _: copy.deepcopy(config))
    assert ending.value.code == 2
    assert "There is no folder" in capfd.readouterr().err


def test_voxels_can_be_tuned(folder, tmp_path):
    from nfldm_ns.method_configs.generated_scene import nfldm_scene

    config = copy.deepcopy(nfldm_scene.config)
    config.data = config.pipeline.datamanager.data = folder
    config.output_dir, config.timestamp, config.experiment_name = tmp_path, "run", "tuned"
    config.max_num_iterations, config.vis, config.machine.device_type = 2, "tensorboard", "cpu"
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    before = {name: value.clone() for name, value in trainer.pipeline.model.state_dict().items()}
    trainer.train()
    after = trainer.pipeline.model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"field.density", "field.features", "field.background"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ns_render_works_on_it(folder, tmp_path):
    frames = ["--output-format", "images", "--image-format", "png", "--interpolation-steps", "2"]
    command = [COMMANDS / "ns-render", "interpolate", "--load-config", folder / "config.yml"]
    command += ["--rendered-output-names", "rgb", "depth", "--output-path", "frames", *frames]
    environment = {**os.environ, "PATH": f"{COMMANDS}{os.pathsep}{os.environ['PATH']}"}  # where ffmpeg is
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    images = sorted((tmp_path / "frames").glob("*.png"))
    assert len(images) == 14  # two per pair of the eight evaluation cameras
    assert read_image(images[0], (64, 32)).max() > 0  # colours and depth side by side


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ns_render_makes_panoramas_of_it(folder, tmp_path):
    level = [1, 0, 0, 0.1, 0, 0, -1, 0, 0, 1, 0, 0, 0, 0, 0, 1]
    path = {"camera_type": "equirectangular", "render_height": 24, "render_width": 48, "fps": 1, "seconds": 1}
    path["camera_path"] = [{"camera_to_world": level, "fov": 75, "aspect": 2}]
    (tmp_path / "path.json").write_text(json.dumps(path))
    command = [COMMANDS / "ns-render", "camera-path", "--load-config", folder / "config.yml"]
    command += ["--camera-path-filename", "path.json", "--output-path", "frames"]
    command += ["--output-format", "images", "--image-format", "png"]
    environment = {**os.environ, "PATH": f"{COMMANDS}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_image(tmp_path / "frames" / "00000.png", (48, 24)).max() > 0


def test_the_contact_sheet_shows_every_scene_once_down_the_columns(tmp_path):
    """Five scenes of one colour each: three in the first column, two in the second, each as a strip of four views."""
    colors = [(0, 0, 250), (0, 250, 0), (250, 0, 0), (250, 250, 0), (0, 250, 250)]
    folders = [tmp_path / f"scene_{i:06d}" for i in range(5)]
    for folder, color in zip(folders, colors, strict=True):
        (folder / "images").mkdir(parents=True)
        for view in range(6):
            Image.new("RGB", (96, 96), color).save(folder / "images" / f"source_{view:02d}.png")
    sheet = np.asarray(contact_sheet(folders)).astype(int)
    centres = {}
    for color in colors:
        rows, columns = np.nonzero((sheet == color).all(-1))
        assert len(rows) == 4 * 96 * 96
        centres[color] = (rows.mean(), columns.mean())
    ordered = sorted(colors, key=lambda color: (centres[color][1] // 100, centres[color][0]))
    assert ordered == colors
    assert centres[colors[3]][0] == centres[colors[0]][0] and centres[colors[3]][1] > centres[colors[0]][1] + 4 * 96
