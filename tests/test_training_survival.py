"""Stage 1's training outlives being killed, and ends with a sentence where its numbers are no longer finite."""

from __future__ import annotations

import copy
import io
import math
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder, read_training_record
from nfldm_ns.plugin.scene_ae_trainer import SceneAutoencoderTrainer, SceneAutoencoderTrainerConfig
from nfldm_ns.scenes import writing
from nfldm_ns.scenes.writing import atomic_path, clear_unfinished
from tests.test_nerfstudio_plugin import COMMANDS, ended_with, small_config

STEPS = 7
KILLED = -signal.SIGKILL


# Killed


def prepared(config: SceneAutoencoderTrainerConfig) -> SceneAutoencoderTrainer:
    """What `ns-train` does before it trains."""
    config.save_config()
    torch.manual_seed(config.machine.seed)
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    return trainer


def kill_oneself(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_within_step(trainer: SceneAutoencoderTrainer) -> None:
    """After the gradients of step 2, before the weights change."""
    step = trainer.optimizers.optimizer_scaler_step_some
    trainer.optimizers.optimizer_scaler_step_some = lambda *args: (trainer.step == 2 and kill_oneself()) or step(*args)


def die_within_checkpoint(trainer: SceneAutoencoderTrainer) -> None:
    """When half of the checkpoint of step 4 is written."""
    save = torch.save

    def half(content: Any, path: Path) -> None:
        if content["step"] < 4:
            return save(content, path)
        whole = io.BytesIO()
        save(content, whole)
        Path(path).write_bytes(whole.getvalue()[: whole.tell() // 2])
        return kill_oneself()

    torch.save = half


def die_between_folders(trainer: SceneAutoencoderTrainer) -> None:
    """When the auto-encoder's old folder is out of the way, and the new one not yet in its place."""
    replace_folder = writing._replace_folder

    def half(new: Path, destination: Path) -> None:
        if trainer.step < 5:
            return replace_folder(new, destination)
        destination.replace(new.with_suffix(".old"))
        return kill_oneself()

    writing._replace_folder = half


def live(trainer: SceneAutoencoderTrainer) -> None:
    """To the end."""


def train_undisturbed(config: SceneAutoencoderTrainerConfig) -> Path:
    prepared(config).train()
    return config.get_base_dir()


def run_in_process(config: SceneAutoencoderTrainerConfig, fate: Callable[[SceneAutoencoderTrainer], None]) -> int:
    """Trains in a process of its own.

    Args:
        fate: what happens to it, arranged before the training begins.

    Returns:
        The exit code.
    """
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_train, args=(config, fate))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _train(config: SceneAutoencoderTrainerConfig, fate: Callable[[SceneAutoencoderTrainer], None]) -> None:
    trainer = prepared(config)
    fate(trainer)
    trainer.train()


def resumed(config: SceneAutoencoderTrainerConfig) -> SceneAutoencoderTrainerConfig:
    """What a user gives to go on with a run: its checkpoints and the steps that are left."""
    config = copy.deepcopy(config)
    config.load_dir = config.get_base_dir() / "nerfstudio_models"
    config.max_num_iterations -= newest_step(config.get_base_dir()) + 1
    return config


def newest_step(run: Path) -> int:
    return int(sorted((run / "nerfstudio_models").iterdir())[-1].stem.removeprefix("step-"))


def content(run: Path) -> dict[str, Any]:
    return torch.load(sorted((run / "nerfstudio_models").iterdir())[-1])


def assert_equal(one: Any, other: Any) -> None:
    """Equal to the bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def hidden_files(run: Path) -> list[str]:
    return [str(path.relative_to(run)) for path in run.rglob(".*")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_and_resumed_run_ends_like_one_that_was_left_alone(box_room_collection, tmp_path):
    def config(name: str) -> SceneAutoencoderTrainerConfig:
        config = small_config(box_room_collection.root, tmp_path / name, STEPS)
        config.steps_per_save, config.save_only_latest_checkpoint = 1, True
        return config

    killed = config("killed")
    run = killed.get_base_dir()
    assert run_in_process(killed, die_within_step) == KILLED
    assert newest_step(run) == 1
    assert run_in_process(resumed(killed), die_within_checkpoint) == KILLED
    assert newest_step(run) == 3
    assert any(name.endswith(".folder/step-000000004.ckpt") for name in hidden_files_below(run))
    assert run_in_process(resumed(killed), die_between_folders) == KILLED
    assert newest_step(run) == 4
    assert not (run / "scene_autoencoder").exists()
    assert run_in_process(resumed(killed), live) == 0
    assert newest_step(run) == STEPS - 1
    assert hidden_files(run) == []

    straight = train_undisturbed(config("straight"))
    assert_equal(content(run), content(straight))
    weights = (load_scene_autoencoder(folder).state_dict() for folder in (run, straight))
    assert_equal(*(dict(state) for state in weights))
    assert read_training_record(run)["step"] == STEPS - 1


def hidden_files_below(run: Path) -> list[str]:
    return [str(path.relative_to(run)) for hidden in run.glob(".*") for path in hidden.rglob("*")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_ns_train_is_resumed_by_load_dir(box_room_collection, tmp_path):
    steps, run = 20, tmp_path / "outputs/rooms/nfldm-scene-ae-tiny/run"
    command = [COMMANDS / "ns-train", "nfldm-scene-ae-tiny", "--data", box_room_collection.root, "--vis", "tensorboard"]
    command += ["--timestamp", "run", "--experiment-name", "rooms", "--machine.device-type", "cpu"]
    command += ["--pipeline.model.network.grid-shape", "4", "16", "16", "--steps-per-save", "1"]
    command += ["--pipeline.model.loss.lpips-mult", "0", "--pipeline.model.loss.adversarial-mult", "0"]
    process = subprocess.Popen([*command, "--max-num-iterations", str(steps)], cwd=tmp_path)
    while not list(run.glob("nerfstudio_models/*")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == KILLED
    config = yaml.load((run / "config.yml").read_text(), Loader=yaml.Loader)
    left = steps - 1 - newest_step(run)
    assert left > 0
    command += ["--load-dir", run / "nerfstudio_models", "--max-num-iterations", str(left)]
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert newest_step(run) == steps - 1
    config.output_dir = tmp_path / "straight"
    assert_equal(content(run), content(train_undisturbed(config)))


def test_leftovers_of_a_killed_process_are_cleared(tmp_path):
    (tmp_path / ".notes").write_text("mine")
    (tmp_path / "config.yml").write_text("whole")
    for name in (".config.yml.0123abcd.tmp", ".step-000000004.ckpt.0123abcd.tmp"):
        (tmp_path / name).write_text("half")
    for name in (".step-000000004.ckpt.0123abcd.folder", ".model.0123abcd.old", ".gone.0123abcd.old", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    clear_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".notes", "config.yml", "gone", "model"]
    assert (tmp_path / "model" / "file").read_text() == "model"
    clear_unfinished(tmp_path / "nothing")


def test_temporary_path_in_another_folder(tmp_path):
    with atomic_path(tmp_path / "models" / "weights", tmp_path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("whole")
        assert not (tmp_path / "models" / "weights").exists()
    assert (tmp_path / "models" / "weights").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]


# Numbers that are not finite


def diverging(data: Path, outputs: Path, precision: str = "fp32") -> SceneAutoencoderTrainer:
    """A run of six steps that saves after each of them."""
    config = small_config(data, outputs, 6)
    config.steps_per_save = 1
    config.pipeline.model.precision = precision
    return prepared(config)


def at_step(trainer: SceneAutoencoderTrainer, step: int, damage: Callable[[], None]) -> None:
    """Lets something happen before a step."""
    iteration = trainer.train_iteration

    def train_iteration(now: int) -> Any:
        if now == step:
            damage()
        return iteration(now)

    trainer.train_iteration = train_iteration  # type: ignore[method-assign]


def sentence_of_the_end(trainer: SceneAutoencoderTrainer, capfd: pytest.CaptureFixture[str]) -> str:
    """What the user reads; the last checkpoint is the one before step 3, with finite weights."""
    with pytest.raises(SystemExit) as ending:
        trainer.train()
    assert newest_step(trainer.base_dir) == 2
    for state in (content(trainer.base_dir)["pipeline"], load_scene_autoencoder(trainer.base_dir).state_dict()):
        assert all(value.isfinite().all() for value in state.values())
    return ended_with(capfd, ending)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_that_is_not_finite_is_named(box_room_collection, tmp_path, capfd, precision):
    trainer = diverging(box_room_collection.root, tmp_path, precision)
    manager = trainer.pipeline.datamanager
    next_train = manager.next_train

    def without_truth(step: int) -> Any:
        batch, truth = next_train(step)
        if step == 3:
            batch.target.images[1, 0, 0, 0, 0] = math.nan
        return batch, truth

    manager.next_train = without_truth
    sentence = sentence_of_the_end(trainer, capfd)
    assert "at step 3: rgb_loss is not finite" in sentence
    assert f"scenes {', '.join(manager.train_batches.batch_ids(3))};" in sentence


def test_weights_that_are_not_finite_spoil_all_losses(box_room_collection, tmp_path, capfd):
    trainer = diverging(box_room_collection.root, tmp_path)
    bias = trainer.pipeline.model.autoencoder.density_bias
    at_step(trainer, 3, lambda: bias.data.fill_(math.nan))
    sentence = sentence_of_the_end(trainer, capfd)
    assert "at step 3: rgb_loss, depth_loss and opacity_loss are not finite" in sentence


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(box_room_collection, tmp_path, capfd):
    trainer = diverging(box_room_collection.root, tmp_path)
    bias = trainer.pipeline.model.autoencoder.density_bias
    at_step(trainer, 3, lambda: bias.register_hook(lambda gradient: gradient * math.nan))
    assert "at step 3: the gradient of the autoencoder is not finite" in sentence_of_the_end(trainer, capfd)


def test_weights_that_are_not_finite_are_not_saved(box_room_collection, tmp_path, capfd):
    trainer = diverging(box_room_collection.root, tmp_path)
    step = trainer.optimizers.optimizer_scaler_step_some

    def too_far(*args: Any) -> None:
        step(*args)
        if trainer.step == 3:
            trainer.pipeline.model.autoencoder.prior_empty.data.fill_(math.inf)

    trainer.optimizers.optimizer_scaler_step_some = too_far
    assert "at step 3: a weight is not finite" in sentence_of_the_end(trainer, capfd)
