"""nfldm-demo --preset gpu: the time it may take, the device it runs on, and the whole of it at the smallest size."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nfldm_ns.collect.doom_collection import _Scheduler, _Stream
from nfldm_ns.commands.demo import main
from nfldm_ns.demo import budget
from nfldm_ns.demo.budget import Clock, TimeBudget, parse_duration
from nfldm_ns.demo.evaluation import affordable_images
from nfldm_ns.demo.runner import Marker, read_marker, write_marker
from nfldm_ns.demo.settings import DemoSettings, batch_scale
from nfldm_ns.demo.shares import DENOISER_SHARES, TIME_SHARES
from nfldm_ns.demo.stages import Demo
from nfldm_ns.diffusion.pipeline import load_pipeline
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.voxel_store import VoxelStore
from nfldm_ns.method_configs.demo_presets import DEMO_PRESETS
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.writing import write_image
from tests.pretrained import require_weights
from tests.small_models import MeanColor

GPU = DEMO_PRESETS["gpu"]


# Time


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("61.5", 61.5), ("8m", 480), ("1h30m", 5400), ("2H", 7200), ("1m30s", 90)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "8 m", "m8", "1h30", "-90", "30m1h"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UserInputError, match="is no time: give seconds, or such as 8m or 1h30m"):
        parse_duration(text)


def test_too_short_a_time() -> None:
    with pytest.raises(UserInputError, match="give at least 1m"):
        parse_duration("59s")


def test_the_shares_are_of_one_whole_and_know_every_stage(tmp_path: Path) -> None:
    assert sum(TIME_SHARES.values()) == pytest.approx(1)
    assert sum(DENOISER_SHARES.values()) == pytest.approx(1)
    stages = Demo(tmp_path, GPU, 0, "cpu").stages()
    assert [*(stage.name for stage in stages), "reserve"] == list(TIME_SHARES)


def test_a_stage_gets_its_share_of_what_earlier_ones_left(tmp_path: Path) -> None:
    times = TimeBudget(tmp_path, 100.0, {"a": 0.2, "b": 0.6, "reserve": 0.2})
    assert times.clock("a").limit_s == pytest.approx(20)
    assert times.expected() == {"a": pytest.approx(20), "b": pytest.approx(60)}
    for seconds, expected in ((20, 60), (60, 30), (0, 75), (150, 0)):
        write_marker(tmp_path, "a", Marker("", finished=True, seconds=seconds))
        assert times.clock("b").limit_s == pytest.approx(expected)


def test_a_clock_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(budget.time, "monotonic", lambda: now)
    clock = Clock(10.0, now)
    assert clock.left() == 10 and clock.left(0.8) == 8 and not clock.over()
    now = 1005.0
    assert clock.left() == 5 and clock.share() == 0.5 and clock.over(0.4) and not clock.over()
    now = 1020.0
    assert clock.left() == 1 and clock.over(), "a second is the least, so that every stage makes something"
    endless = Clock()
    assert endless.left() is None and endless.share() == 0 and not endless.over()


class AtOnce:
    """A pool whose every candidate becomes a scene."""

    def submit(self, function, name: str, candidates: list[int]) -> Future:
        future: Future = Future()
        future.set_result([True] * len(candidates))
        return future


@pytest.mark.parametrize("late", [False, True])
def test_collecting_ends_in_time_with_a_scene_of_each_split(tmp_path: Path, late: bool) -> None:
    streams = [_Stream(f"mazes/{split}", split, np.arange(100)) for split in ("train", "test")]
    deadline = time.monotonic() + (-1 if late else 60)
    _Scheduler(AtOnce(), tmp_path, streams, 1, lambda done: None, deadline).run({"train": 40, "test": 20})
    found = {stream.split: len(stream.scene_ids()) for stream in streams}
    assert min(found.values()) > 0
    assert (sum(found.values()) < 30) if late else (found == {"train": 40, "test": 20})


def test_fewer_images_are_compared_where_time_is_short(tmp_path: Path) -> None:
    write_image(tmp_path / "0.png", np.zeros((8, 8, 3), np.uint8))
    assert affordable_images(MeanColor(), tmp_path, 448, Clock()) == 448
    assert affordable_images(MeanColor(), tmp_path, 448, Clock(3600.0)) == 448

    class Slow(MeanColor):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            time.sleep(0.05)
            return super().forward(images)

    assert 2 <= affordable_images(Slow(), tmp_path, 448, Clock(2.0)) < 10


# Device and settings


def test_precision_and_batches_follow_the_device() -> None:
    assert [batch_scale(gib) for gib in (0, 8, 12, 24, 80, 141)] == [1, 1, 2, 4, 8, 8]
    on_gpu, on_cpu = GPU.on_device("cuda", 80), GPU.on_device("cpu")
    for settings, precision, scale in ((on_gpu, "bf16", 8), (on_cpu, "no", 1)):
        trainings = [(settings.latent_training, GPU.latent_training)]
        trainings += [(settings.denoiser_training[name], GPU.denoiser_training[name]) for name in DENOISER_SHARES]
        for training, before in trainings:
            assert training.schedule.mixed_precision == precision
            assert training.schedule.batch_size == scale * before.schedule.batch_size
        assert option(settings, "--pipeline.model.precision") == {"bf16": "bf16", "no": "fp32"}[precision]
        assert option(settings, "--pipeline.datamanager.sampling.scenes-per-batch") == str(scale)
    assert DEMO_PRESETS["demo"].on_device("cuda", 80) is DEMO_PRESETS["demo"]


def option(settings: DemoSettings, name: str) -> str:
    options = settings.scene_autoencoder_options
    return options[options.index(name) + 1]


def test_the_demo_for_cpus_has_the_settings_it_had(tmp_path: Path) -> None:
    """Else finished stages of earlier versions would be repeated."""
    settings = DEMO_PRESETS["demo"]
    stages = {stage.name: stage for stage in Demo(tmp_path, settings, 0, "cpu").stages()}
    assert stages["collect"].settings is settings.collection
    assert set(stages["stage1"].settings) == {"seed", "steps", "preset", "options"}
    assert stages["encode"].settings is None
    assert set(stages["stage2"].settings) == {"model", "training"}
    assert set(stages["stage3"].settings) == {"models", "training", "quarter_turns", "temperatures"}
    assert stages["stage3"].outputs == ("stage3",)
    assert not settings.with_maps and GPU.with_maps


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--preset", "gpu"], "--preset gpu is meant for a GPU, but there is no CUDA device here"),
        (["--device", "cuda"], "--device is cuda, but there is no CUDA device here: give --device cpu."),
        (["--preset", "gpu", "--time-budget", "soon"], "--time-budget is 'soon', which is no time"),
        (["--time-budget", "8m"], "--time-budget does not go with --preset demo"),
        (["--preset", "gpu", "--length", "0.5"], "--length does not go with --preset gpu"),
    ],
)
def test_bad_options_are_one_sentence(
    options: list[str],
    said: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_info:
        main([*options, "--output-dir", str(tmp_path / "new")])
    assert exit_info.value.code == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith(f"error: {said}") and "\n" not in error
    assert not (tmp_path / "new").exists()


# All of it


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_nothing_to_a_generator_in_half_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_weights("lpips-vgg", "fid-inception")
    command = ["--preset", "gpu-smoke", "--device", "cpu", "--output-dir", str(tmp_path / "demo")]
    main(command)
    root = tmp_path / "demo"
    pipeline = load_pipeline(root / "model")
    assert pipeline.bev_classes and pipeline.scene_autoencoder.refiner is not None
    assert list(pipeline.config.temperatures) == list(GPU.temperatures)
    weights = load_file(root / "model" / "coarse_denoiser" / "diffusion_pytorch_model.safetensors")
    assert weights["unet.conv_in.weight"].dtype == torch.float16
    assert VoxelStore.open(root / "voxels").description["all_views"] is True
    assert (root / "stage1" / "nfldm-scene-ae-rooms" / "run" / "config.yml").is_file()
    made = SceneCollection.open(root / "data")
    assert {name for name, ids in made.splits.items() if ids} == {"train", "test"}
    report = json.loads((root / "report.json").read_text())
    assert report["device"]["used"] == "cpu" and report["samples"]["num_images"] >= 2
    assert str(root / "model") in (root / "index.html").read_text()
    for name in ("global", "coarse", "fine"):
        state = next((root / "stage3" / name).glob("checkpoint-*/state.json"))
        assert json.loads(state.read_text())["seconds"] < 10, "the clock ends it"
    assert all(read_marker(root, name).finished for name in TIME_SHARES if name != "reserve")
    capsys.readouterr()
    main(command)
    assert capsys.readouterr().out.count("done before") == 9
