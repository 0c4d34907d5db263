"""Runs, scenes and checkpoints from before the nerfstudio plugin had a room of its own (commit bd88fad) still open."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.utils.eval_utils import eval_setup

from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder
from nfldm_ns.generated.scene_files import load_generated_scene
from nfldm_ns.moved_modules import MOVED
from nfldm_ns.plugin.refine import RefineTrainerConfig

FIXTURES = Path(__file__).parent / "fixtures" / "before_plugin"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Copies of a run of stage 1, of a scene, and of a run that refined it, made on another machine."""
    shutil.copytree(FIXTURES, tmp_path / "old")
    return tmp_path / "old"


def opened(config: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[TrainerConfig], None] = lambda _: None):
    """The pipeline of a run, as nerfstudio's commands open it."""

    def moved_here(found: TrainerConfig) -> TrainerConfig:
        change(found)
        return found

    monkeypatch.setattr(sys, "argv", ["ns-viewer", "--load-config", str(config)])
    return eval_setup(config, update_config_callback=moved_here)[1]


@pytest.mark.parametrize("name", MOVED)
def test_a_former_name_gives_the_module_that_is_now_elsewhere(name):
    module = importlib.import_module(name)
    assert module is importlib.import_module(MOVED[name])
    assert module.__name__ == module.__spec__.name == MOVED[name]


def test_what_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("nfldm_ns.autoencoder.nerfstudio_something")


def test_a_run_of_stage_1_opens_with_its_weights(old, box_room_collection, monkeypatch):
    def data_is_here(config: TrainerConfig) -> None:
        config.data = config.pipeline.datamanager.data = box_room_collection.root

    pipeline = opened(old / "scene_ae" / "config.yml", monkeypatch, data_is_here)
    expected = load_scene_autoencoder(old / "scene_ae").state_dict()
    loaded = pipeline.model.autoencoder.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in expected.items())


def test_a_scene_opens_and_looks_as_it_did(old, monkeypatch):
    pipeline = opened(old / "scene" / "config.yml", monkeypatch)
    scene = load_generated_scene(old / "scene")
    assert torch.equal(pipeline.model.field.density.data, scene.grid.density)
    camera, image = pipeline.datamanager.train_dataset.cameras[1:2], pipeline.datamanager.train_dataset[1]["image"]
    with pipeline.model.as_trained():
        rendered = pipeline.model.get_outputs_for_camera(camera)["rgb"]
    assert torch.allclose(rendered.clamp(0, 1), image, atol=1.01 / 255)


def test_a_run_that_refined_a_scene_opens_with_its_changes(old, monkeypatch):
    def data_is_here(config: TrainerConfig) -> None:
        assert isinstance(config, RefineTrainerConfig)
        config.data = config.pipeline.datamanager.data = old / "scene"

    pipeline = opened(old / "refined" / "config.yml", monkeypatch, data_is_here)
    changes = {name: value for name, value in pipeline.model.state_dict().items() if name.endswith("_change")}
    assert changes and any(bool(value.any()) for value in changes.values())


def test_new_runs_name_the_modules_of_today(old):
    config = yaml.load((old / "scene" / "config.yml").read_text(), Loader=yaml.Loader)
    assert not any(name in yaml.dump(config) for name in MOVED)
