"""The loop of stages 2 and 3: however a step is split up, killed or watched, it is the same step."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.multiprocessing import start_processes

from nfldm_ns.commands import train_diffusion
from nfldm_ns.diffusion.latent_memory import LatentMemory, encode_latents
from nfldm_ns.diffusion.training import DiffusionTrainingConfig, train_denoiser
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.training import LatentTrainingConfig, train_latent_autoencoder
from nfldm_ns.latents.voxel_store import VoxelStore, encode_collection
from nfldm_ns.method_configs.latent_presets import DIFFUSION_PRESETS
from nfldm_ns.training import loop, run, trackers
from nfldm_ns.training.draws import ItemDraws
from nfldm_ns.training.options import ScheduleOptions, precision_here
from nfldm_ns.training.run import read_metrics
from nfldm_ns.training.schedule import Schedule
from tests.small_models import DENOISER_SIZES, LATENT_SIZES, small_latent_autoencoder, small_scene_autoencoder
from tests.synthetic import make_box_room_collection

SCHEDULE = Schedule(max_steps=4, batch_size=4, warmup_steps=1, log_every=2, checkpoint_every=2, report_to="none")
RANKS = 2
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> VoxelStore:
    root = tmp_path_factory.mktemp("scenes")
    collection = make_box_room_collection(root / "rooms", num_train=5, num_test=1)
    return encode_collection(collection, small_scene_autoencoder(), root / "voxels")


def test_presets_for_gpus_train_in_single_precision_on_a_cpu(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    for with_gpu, expected in ((False, "no"), (True, None)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=with_gpu: there)
        assert ScheduleOptions().given().get("mixed_precision") == expected
        assert ScheduleOptions(mixed_precision="bf16").given()["mixed_precision"] == "bf16"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert precision_here(None) == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert precision_here(None) is None, "what accelerate launch says"


@dataclass
class Trainings:
    """Short trainings of both stages on the scenes of a store."""

    root: Path

    def stage2(self, folder: Path, schedule: Schedule, quantize: bool = False) -> Weights:
        config = LatentTrainingConfig(schedule=schedule, num_views=1, fine_dropout=0.5)
        sizes = {**LATENT_SIZES, "quantize": quantize}
        store = VoxelStore.open(self.root)
        return train_latent_autoencoder(store, folder, sizes, config, on_progress=_silent).state_dict()

    def stage3(self, folder: Path, schedule: Schedule, stage: str = "fine", **options: Any) -> Weights:
        config = DiffusionTrainingConfig(schedule=schedule, condition_dropout=0.3)
        sizes, model = DENOISER_SIZES[stage], small_latent_autoencoder()
        return train_denoiser(
            stage, self.memory(), model, folder, sizes, config, on_progress=_silent, **options
        ).state_dict()

    def memory(self) -> LatentMemory:
        store = VoxelStore.open(self.root)
        return encode_latents(store, small_latent_autoencoder(), store.splits["train"], on_progress=lambda share: None)


@pytest.fixture
def trainings(store: VoxelStore) -> Trainings:
    return Trainings(store.root)


def _silent(share: float, losses: dict[str, float]) -> None:
    pass


def checkpoint(folder: Path) -> Weights:
    """Weights before they are averaged."""
    return load_file(next(folder.glob("checkpoint-*")) / "model.safetensors")


def assert_close(ours: Weights, theirs: Weights, learning_rate: float, steps: int) -> None:
    """The same weights up to a small share of what they can have moved."""
    assert ours.keys() == theirs.keys()
    difference = torch.cat([(ours[name] - value).flatten().float() for name, value in theirs.items()])
    assert float(difference.abs().mean()) < 0.01 * learning_rate * steps


# Splitting a step


def test_draws_belong_to_items_not_to_batches():
    whole, part = ItemDraws(3, range(10, 14)), ItemDraws(3, range(12, 14))
    assert torch.equal(whole.normal(torch.empty(4, 2, 3))[2:], part.normal(torch.empty(2, 2, 3)))
    assert torch.equal(whole.integers(1000)[2:], part.integers(1000))
    assert torch.equal(whole.uniform()[2:], part.uniform())
    assert torch.equal(whole.permutation(3, 7), part.permutation(1, 7))
    assert not torch.equal(whole.normal(torch.empty(4, 1)), ItemDraws(4, range(10, 14)).normal(torch.empty(4, 1)))


def test_accumulated_gradients_make_the_step_of_a_larger_batch(trainings, tmp_path):
    parts = replace(SCHEDULE, batch_size=1, gradient_accumulation_steps=4)
    for name, train in (("stage2", trainings.stage2), ("stage3", trainings.stage3)):
        train(tmp_path / name / "joint", SCHEDULE)
        train(tmp_path / name / "parts", parts)
        weights = [checkpoint(tmp_path / name / which) for which in ("joint", "parts")]
        assert_close(*weights, SCHEDULE.learning_rate, SCHEDULE.max_steps)
        losses = [read_metrics(tmp_path / name / which)[0] for which in ("joint", "parts")]
        for key in {*losses[0]} - {"seconds"}:
            assert losses[1][key] == pytest.approx(losses[0][key], rel=1e-3), key


def test_a_run_goes_on_with_the_same_step_split_otherwise_but_not_with_another_step(trainings, tmp_path):
    trainings.stage3(tmp_path, replace(SCHEDULE, max_steps=2))
    trainings.stage3(tmp_path, replace(SCHEDULE, batch_size=2, gradient_accumulation_steps=2))
    with pytest.raises(UserInputError, match="batch_size: 4 there, 8 here"):
        trainings.stage3(tmp_path, replace(SCHEDULE, gradient_accumulation_steps=2))
    with pytest.raises(UserInputError, match="at least 1"):
        trainings.stage3(tmp_path, replace(SCHEDULE, gradient_accumulation_steps=0))


def _work(rank: int, folder: Path, root: Path) -> None:
    """One of two processes, as `accelerate launch --cpu` starts them."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    os.environ["ACCELERATE_USE_CPU"] = "true"
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", world_size=RANKS, rank=rank)
    written: list[str] = []
    save = run.save_file
    run.save_file = lambda tensors, path: (written.append(str(path)), save(tensors, path))  # type: ignore
    schedule = replace(SCHEDULE, batch_size=1, gradient_accumulation_steps=2)
    trainings = Trainings(root)
    results = {
        "stage2": trainings.stage2(folder / "stage2", schedule),
        "quantised": trainings.stage2(folder / "quantised", schedule, quantize=True),
        "stage3": trainings.stage3(folder / "stage3", replace(schedule, report_to="tensorboard")),
    }
    torch.save({"weights": results, "written": len(written)}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_do_what_one_does_with_all_scenes(trainings, tmp_path):
    start_processes(_work, (tmp_path, trainings.root), nprocs=RANKS, start_method="forkserver")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS))
    assert first["written"] > 0 and second["written"] == 0, "the first alone writes"
    for name, weights in first["weights"].items():
        assert all(torch.equal(value, second["weights"][name][key]) for key, value in weights.items()), name
    trainings.stage2(tmp_path / "one2", SCHEDULE)
    trainings.stage3(tmp_path / "one3", SCHEDULE)
    for ours, theirs in (("one2", "stage2"), ("one3", "stage3")):
        assert_close(checkpoint(tmp_path / ours), checkpoint(tmp_path / theirs), 1e-3, SCHEDULE.max_steps)
    losses = [read_metrics(tmp_path / name)[0]["loss"] for name in ("one3", "stage3")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3), "the log has the mean of all processes"
    assert len(list((tmp_path / "stage3").rglob("events.out.*"))) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_accelerate_launch_does_with_two_processes_what_the_command_does_alone(store, tmp_path):
    small_latent_autoencoder().save_pretrained(tmp_path / "stage2")
    options = ["global", "--voxels", store.root, "--latent-autoencoder", tmp_path / "stage2", "--report-to", "none"]
    options = [*map(str, options), "--max-steps", "3", "--quarter-turns", "False"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(RANKS)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["-m", "nfldm_ns.commands.train_diffusion"]
    joint = ["--batch-size", "2", "--output-dir", str(tmp_path / "joint")]
    done = subprocess.run([*launch, *options, *joint], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    train_diffusion.main([*options, "--batch-size", "4", "--output-dir", str(tmp_path / "alone")])
    weights = [checkpoint(tmp_path / name / "global") for name in ("joint", "alone")]
    rate = DIFFUSION_PRESETS["tiny"].training["global"].schedule.learning_rate
    assert_close(*weights, 2 * rate, 3)  # of gradients near 0 Adam makes the rounding as large as any other
    assert done.stdout.count("Still to train") == 1, "the first process alone talks"


# Being compiled


@pytest.mark.parametrize(
    ("stage", "backend"), [("global", "aot_eager"), pytest.param("stage2", "eager", marks=pytest.mark.slow)]
)
def test_a_compiled_training_has_the_same_losses_and_names(trainings, tmp_path, stage, backend):
    """These backends, which need no compiler, take a model apart; "aot_eager" traces it forward and backward, too."""
    schedule = replace(SCHEDULE, max_steps=2)
    for name, compile_with in (("plain", None), ("compiled", backend)):
        given = tmp_path / name, replace(schedule, compile_with=compile_with)
        trainings.stage2(*given) if stage == "stage2" else trainings.stage3(*given, stage)
    plain, found = (checkpoint(tmp_path / name) for name in ("plain", "compiled"))
    assert not any("_orig_mod" in key for key in found)
    assert_close(found, plain, schedule.learning_rate, schedule.max_steps)
    plain_losses, losses = (read_metrics(tmp_path / name)[-1] for name in ("plain", "compiled"))
    for key in {*plain_losses} - {"seconds"}:
        assert losses[key] == pytest.approx(plain_losses[key], rel=1e-3), key


def test_a_run_goes_on_compiled_or_not(trainings, tmp_path):
    trainings.stage3(tmp_path, replace(SCHEDULE, max_steps=2, compile_with="eager"), "global")
    trainings.stage3(tmp_path, SCHEDULE, "global")
    assert read_metrics(tmp_path)[-1]["step"] == SCHEDULE.max_steps


def test_a_compiler_that_fails_is_one_sentence(trainings, tmp_path):
    def broken(graph: Any, inputs: Any) -> Any:
        raise OSError("no compiler is here\nat all")

    torch._dynamo.register_backend(broken, name="broken")
    reasons = {"broken": r"\(no compiler is here\): train without --compile", "nothing": "Invalid backend"}
    for backend, said in reasons.items():
        with pytest.raises(UserInputError, match=f"torch.compile failed with the backend {backend} .*{said}") as told:
            trainings.stage3(tmp_path / backend, replace(SCHEDULE, compile_with=backend), "global")
        assert "\n" not in str(told.value) and not list((tmp_path / backend).glob("checkpoint-*"))


# Being killed


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in_a_step() -> None:
    step, calls = loop.take_step, iter(range(100))
    loop.take_step = lambda *args: _die() if next(calls) == 3 else step(*args)  # type: ignore[assignment]


def _die_within_a_checkpoint() -> None:
    save = run.save_file
    run.save_file = lambda tensors, path: _die() if "ema" in str(path) else save(tensors, path)  # type: ignore


def _die_before_the_old_checkpoint_goes() -> None:
    rmtree = run.shutil.rmtree

    def remove(path: Path, **options: Any) -> None:
        _die() if Path(path).name.startswith("checkpoint-") else rmtree(path, **options)

    run.shutil.rmtree = remove  # type: ignore[assignment]


def _die_in_the_log() -> None:
    loop._means = _die  # type: ignore[assignment]


def _killed(prepare: Callable[[], None], root: Path, folder: Path) -> None:
    prepare()
    Trainings(root).stage3(folder, replace(SCHEDULE, max_steps=8), "coarse")
    sys.exit("was not killed")


@pytest.mark.timeout(900)
def test_killed_at_any_moment_and_resumed_is_equal_to_the_bit(trainings, tmp_path):
    context = multiprocessing.get_context("forkserver")
    moments = (_die_in_a_step, _die_within_a_checkpoint, _die_before_the_old_checkpoint_goes, _die_in_the_log)
    for moment in moments:
        process = context.Process(target=_killed, args=(moment, trainings.root, tmp_path / "killed"))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, moment.__name__
    assert len(list((tmp_path / "killed").glob("checkpoint-*"))) == 2, "killed between two checkpoints"
    resumed = trainings.stage3(tmp_path / "killed", replace(SCHEDULE, max_steps=8), "coarse")
    whole = trainings.stage3(tmp_path / "whole", replace(SCHEDULE, max_steps=8), "coarse")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert [line["step"] for line in read_metrics(tmp_path / "killed")] == [2, 4, 6, 8]
    assert [p.name for p in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-00000008"]
    assert not list((tmp_path / "killed").glob(".*")), "nothing half-written is left"


# Being watched


def read_events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = list(folder.rglob("events.out.*"))
    events = EventAccumulator(str(files[0].parent), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


@pytest.mark.parametrize("stage", ["global", "coarse", "fine"])
def test_sample_renders_of_stage_3_are_logged_and_disturb_nothing(stage, trainings, tmp_path):
    schedule = replace(SCHEDULE, validation_steps=1, report_to="tensorboard")
    options = {"scene_autoencoder": small_scene_autoencoder()}
    watched = trainings.stage3(tmp_path / "watched", schedule, stage, **options)
    alone = trainings.stage3(tmp_path / "alone", SCHEDULE, stage)
    assert all(torch.equal(value, watched[name]) for name, value in alone.items())
    images = read_events(tmp_path / "watched").Images(f"{stage}_samples")
    assert [image.step for image in images] == [1, 2, 3, 4]
    assert len({image.encoded_image_string for image in images}) > 1, "the samples change with the weights"


def test_sample_renders_of_stage_2_are_logged_once_also_after_a_stop(trainings, tmp_path):
    schedule = replace(SCHEDULE, validation_steps=1, report_to="tensorboard")
    trainings.stage2(tmp_path / "alone", SCHEDULE, quantize=True)

    class Interrupted(Exception):
        pass

    def stop(*args: Any) -> None:
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        step, calls = loop.take_step, iter(range(100))
        patch.setattr(loop, "take_step", lambda *args: stop() if next(calls) == 3 else step(*args))
        with pytest.raises(Interrupted):
            trainings.stage2(tmp_path / "watched", replace(schedule, checkpoint_every=2), quantize=True)
    time.sleep(1)  # TensorBoard orders files by the second in which they were begun
    trainings.stage2(tmp_path / "watched", schedule, quantize=True)
    weights = [checkpoint(tmp_path / name) for name in ("alone", "watched")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    events = read_events(tmp_path / "watched")
    assert [image.step for image in events.Images("round_trip")] == [1, 2, 3, 4]
    assert [scalar.step for scalar in events.Scalars("voxel_loss")] == [2, 4]
    assert [line["step"] for line in read_metrics(tmp_path / "watched")] == [2, 4]


class FakeTracker:
    """Takes down what Weights & Biases would get."""

    runs: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    entries: ClassVar[list[tuple[int, set[str]]]] = []

    name, requires_logging_directory, main_process_only = "wandb", False, True

    def __init__(self, run_name: str, **options: Any) -> None:
        self.runs.append((run_name, options))

    def start(self) -> None:
        pass

    def log(self, values: dict[str, Any], step: int) -> None:
        self.entries.append((step, set(values)))

    def log_images(self, values: dict[str, Any], step: int) -> None:
        self.entries.append((step, set(values)))

    def finish(self) -> None:
        pass


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb_behind_its_last_entry(trainings, tmp_path, monkeypatch):
    from accelerate import accelerator

    monkeypatch.setitem(accelerator.LOGGER_TYPE_TO_CLASS, "wandb", FakeTracker)
    schedule = replace(SCHEDULE, log_every=1, checkpoint_every=10, report_to="wandb")
    step, calls = loop.take_step, iter(range(100))

    def stop(*args: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(loop, "take_step", stop)
    with pytest.raises(KeyboardInterrupt):
        trainings.stage3(tmp_path, schedule, "global")
    trainings.stage3(tmp_path, schedule, "global")
    assert [step for step, _ in FakeTracker.entries] == [1, 2, 3, 4]
    (project, first), (_, second) = FakeTracker.runs
    assert project == "nfldm-ns" and first["id"] == second["id"] and second["resume"] == "allow"
    assert first["config"]["learning_rate"] == 1e-3 and first["config"]["model"]["width"] == 16
    assert not (tmp_path / "tensorboard").exists()


def test_trackers_by_name_and_a_missing_package(monkeypatch, trainings, tmp_path):
    assert trackers.tracker_names("none") == [] and trackers.tracker_names("tensorboard") == ["tensorboard"]
    monkeypatch.setattr(trackers, "is_wandb_available", lambda: False)
    assert trackers.tracker_names("all") == ["tensorboard"]
    with pytest.raises(UserInputError, match="pip install wandb"):
        trainings.stage3(tmp_path / "run", replace(SCHEDULE, report_to="wandb"))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(trackers, "is_wandb_available", lambda: True)
    assert trackers.tracker_names("all") == ["tensorboard", "wandb"]


# Precision


@pytest.mark.parametrize("train", ["stage2", "stage3"])
def test_bf16_trains_and_leaves_a_model_in_single_precision(train, trainings, tmp_path):
    weights = getattr(trainings, train)(tmp_path, replace(SCHEDULE, max_steps=2, mixed_precision="bf16"))
    assert all(value.isfinite().all() and value.dtype != torch.bfloat16 for value in weights.values())
