"""Stage 1 on several processes: what two of them do with their scenes is what one does with the scenes of both."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nerfstudio.utils import comms
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

from nfldm_ns.autoencoder.losses import StageOneLossConfig, depth_loss
from nfldm_ns.autoencoder.renderer import FeatureMaps
from nfldm_ns.autoencoder.scene_sampler import SceneCache, SceneSampler, SceneSamplerConfig
from nfldm_ns.errors import UserInputError
from nfldm_ns.plugin.scene_ae_trainer import SceneAutoencoderTrainer, SceneAutoencoderTrainerConfig
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import Views
from tests.pretrained import require_weights
from tests.synthetic import make_box_room_collection
from tests.test_nerfstudio_plugin import ended_with, small_config

STEPS = 3
RANKS = 2
JUDGED = StageOneLossConfig(lpips_views=1, adversarial_mult=0.1)


# What is shared out


def test_batches_of_all_ranks_are_the_batch_of_one_process(box_room_collection):
    ids = box_room_collection.splits["train"]
    options: dict[str, Any] = {"num_source_views": 5, "num_target_views": 2, "num_extra_targets": 1}

    def sampler(size: int, world_size: int = 1, rank: int = 0) -> SceneSampler:
        cache = SceneCache(box_room_collection, 1.0)
        return SceneSampler(cache, ids, SceneSamplerConfig(scenes_per_batch=size, **options), world_size, rank)

    one, ranks = sampler(4), [sampler(2, RANKS, rank) for rank in range(RANKS)]
    for step in (0, 1, 5):
        joint, parts = one.batch(step), [rank.batch(step) for rank in ranks]
        assert joint.scene_ids == [scene_id for part in parts for scene_id in part.scene_ids]
        assert all(rank.joint_batch_ids(step) == joint.scene_ids for rank in ranks)
        for role in ("source", "target"):
            views = [getattr(part, role) for part in parts]
            assert torch.equal(getattr(joint, role).images, torch.cat([part.images for part in views]))
            poses = torch.cat([part.cameras.camera_to_worlds for part in views])
            assert torch.equal(getattr(joint, role).cameras.camera_to_worlds, poses)


def test_depth_loss_is_the_mean_over_scenes_whatever_they_know(box_room_collection):
    target = box_room_collection.batch([box_room_collection.load_scene(f"room_00{i}") for i in range(3)]).target
    assert target.depths is not None
    target.depths[0, ..., :20, :] = 0
    target.depths[1] = 0
    depth = torch.rand(3, 4, 1, 16, 16) * 5
    maps = FeatureMaps(depth, depth, depth, torch.full_like(depth, 9.0), depth, depth)

    def part(index: slice) -> tuple[FeatureMaps, Views]:
        return FeatureMaps(*(getattr(maps, name)[index] for name in vars(maps))), target[index]

    single = torch.stack([depth_loss(*part(slice(i, i + 1))) for i in range(3)])
    assert single[1] == 0 and single[0] > 0 and single[2] > 0
    torch.testing.assert_close(depth_loss(maps, target), single.mean())


def test_a_time_budget_is_for_one_process(box_room_collection, tmp_path, capfd):
    config = small_config(box_room_collection.root, tmp_path, 1)
    config.time_budget_s, config.machine.num_devices = 60.0, 2
    with pytest.raises(SystemExit) as ending:
        config.save_config()
    assert "--time-budget-s is for one process" in ended_with(capfd, ending)


# Two processes


@dataclass
class Record:
    """What a training did.

    Attributes:
        scene_ids: of this process, by step.
        gradients: by step and parameter, before they are clipped.
        start, weights: before and afterwards.
        ending: exit code and words, if it did not end well.
    """

    scene_ids: list[list[str]] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    start: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    ending: tuple[int, str] = (0, "")


def config_of(
    data: Path, folder: Path, scenes_per_batch: int, loss: StageOneLossConfig | None = None
) -> SceneAutoencoderTrainerConfig:
    config = small_config(data, folder, STEPS)
    config.steps_per_save = 1
    config.pipeline.datamanager.sampling = SceneSamplerConfig(
        scenes_per_batch=scenes_per_batch, num_source_views=4, num_target_views=2
    )
    if loss is not None:
        config.pipeline.model.loss = loss
    return config


def resumed(config: SceneAutoencoderTrainerConfig, checkpoints: Path) -> SceneAutoencoderTrainerConfig:
    """Goes on after the first step of another run, which ends the schedule at the same step."""
    config.load_dir, config.load_step, config.max_num_iterations = checkpoints, 1, STEPS - 2
    return config


def trained(config: SceneAutoencoderTrainerConfig, rank: int = 0, world_size: int = 1, damage: str = "") -> Record:
    """Like nerfstudio's `train_loop`, and looks over its shoulder."""
    torch.manual_seed(config.machine.seed + rank)
    trainer = config.setup(local_rank=rank, world_size=world_size)
    trainer.setup()
    record = Record(start=weights_of(trainer))
    observe(trainer, record)
    if damage:
        spoil(trainer, damage)
    with contextlib.redirect_stderr(io.StringIO()) as words:
        try:
            trainer.train()
        except SystemExit as ending:
            assert isinstance(ending.code, int)
            record.ending = (ending.code, words.getvalue())
    record.weights = weights_of(trainer)
    return record


def weights_of(trainer: SceneAutoencoderTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.pipeline.model.state_dict().items()}


def observe(trainer: SceneAutoencoderTrainer, record: Record) -> None:
    manager, optimizers = trainer.pipeline.datamanager, trainer.optimizers
    next_train, step_some = manager.next_train, optimizers.optimizer_scaler_step_some

    def seen_next_train(step: int) -> Any:
        batch, truth = next_train(step)
        record.scene_ids.append(batch.scene_ids)
        return batch, truth

    def seen_step_some(*args: Any) -> None:
        parameters = trainer.pipeline.model.named_parameters()
        record.gradients.append({name: p.grad.clone() for name, p in parameters if p.grad is not None})
        step_some(*args)

    manager.next_train, optimizers.optimizer_scaler_step_some = seen_next_train, seen_step_some  # type: ignore


def spoil(trainer: SceneAutoencoderTrainer, damage: str) -> None:
    """Breaks the second step of this process."""
    manager = trainer.pipeline.datamanager
    next_train = manager.next_train

    def broken_next_train(step: int) -> Any:
        batch, truth = next_train(step)
        if step == 1 and damage == "loss":
            batch.target.images[0, 0, 0, 0, 0] = torch.nan
        if step == 1 and damage == "gradient":
            trainer.pipeline.model.autoencoder.density_bias.register_hook(lambda gradient: gradient * torch.nan)
        if step == 1 and damage == "scene":
            raise UserInputError("The scene attic has gone: put it back.")
        return batch, truth

    manager.next_train = broken_next_train  # type: ignore[method-assign]


def _work(rank: int, folder: Path, data: Path, judged: bool, checkpoints: Path) -> None:
    """All that one of the processes does: one training after another, and what is left of each in a file.

    Each process has its own output folder, so that it shows who writes.
    """
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", world_size=RANKS, rank=rank)
    comms.LOCAL_PROCESS_GROUP = dist.new_group(list(range(RANKS)))

    def work(name: str, loss: StageOneLossConfig | None = None, start: Path | None = None, damage: str = "") -> int:
        config = config_of(data, folder / f"{name}-{rank}", 2, loss)
        if start is not None:
            config = resumed(config, start)
        record = trained(config, rank, RANKS, damage if rank == 1 else "")
        torch.save(record, folder / f"{name}-{rank}.pt")
        return record.ending[0]

    work("plain")
    work("resumed", start=checkpoints)
    if judged:
        work("judged", JUDGED)
        work("late", replace(JUDGED, adversarial_start=1))
    work("loss", damage="loss")
    work("gradient", damage="gradient")
    raise SystemExit(work("scene", damage="scene"))


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> SceneCollection:
    """Five training scenes, so that an epoch ends within a batch."""
    return make_box_room_collection(tmp_path_factory.mktemp("rooms"), num_train=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def one(rooms: SceneCollection, folder: Path) -> Record:
    """A single process with the scenes of both."""
    return trained(config_of(rooms.root, folder / "one", RANKS * 2))


@pytest.fixture(scope="module")
def two(rooms: SceneCollection, folder: Path, one: Record) -> dict[str, list[Record]]:
    """The trainings of two processes, by name; the last one ends because one process fails alone."""
    try:
        require_weights("lpips-vgg")
        judged = True
    except pytest.skip.Exception:
        judged = False
    arguments = (folder, rooms.root, judged, checkpoints_in(folder / "one"))
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        start_processes(_work, arguments, nprocs=RANKS, start_method="forkserver")
    names = sorted({path.stem.rsplit("-", 1)[0] for path in folder.glob("*-1.pt")})
    records: dict[str, list[Record]] = {name: [] for name in names}
    for name in names:
        for path in sorted(folder.glob(f"{name}-?.pt")):
            records[name].append(torch.load(path, weights_only=False))
    return records


def checkpoints_in(outputs: Path) -> Path:
    return next(outputs.rglob("nerfstudio_models"))


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    """Equal up to a part of each tensor's largest entry, and a tenth of that part of the largest of all."""
    assert ours.keys() == theirs.keys()
    scales = {name: float(value.abs().max()) for name, value in theirs.items() if value.numel()}
    for name, scale in scales.items():
        error = float((ours[name] - theirs[name]).abs().max())
        assert error <= tolerance * (scale + 0.1 * max(scales.values())), name


def assert_moved_alike(ours: Record, theirs: Record, tolerance: float) -> None:
    """The same weights before, and afterwards apart by a small part of how far they moved.

    Not by entry: AdamW's first steps are as long where the gradient is noise.
    """
    assert all(torch.equal(value, theirs.start[name]) for name, value in ours.start.items())
    error = sum(float((value - theirs.weights[name]).abs().sum()) for name, value in ours.weights.items())
    moved = sum(float((value - theirs.start[name]).abs().sum()) for name, value in theirs.weights.items())
    assert error <= tolerance * moved


def assert_same_on_both(records: list[Record]) -> None:
    first, second = records
    assert len(first.gradients) == len(second.gradients)
    for ours, theirs in [*zip(first.gradients, second.gradients, strict=True), (first.weights, second.weights)]:
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestTwoProcesses:
    def test_they_do_what_one_does_with_all_scenes(self, one, two):
        first, second = two["plain"]
        assert [a + b for a, b in zip(first.scene_ids, second.scene_ids, strict=True)] == one.scene_ids
        assert_same_on_both(two["plain"])
        assert_close(first.gradients[0], one.gradients[0], 1e-4)
        assert_moved_alike(first, one, 1e-4)

    def test_with_a_discriminator_too(self, rooms, two, tmp_path):
        require_weights("lpips-vgg")
        assert_same_on_both(two["judged"])
        one = trained(config_of(rooms.root, tmp_path, RANKS * 2, JUDGED))
        assert any("discriminator" in name for name in one.gradients[0])
        # Rounding flips some maxima in the perceptual network; a process alone is off by more than a half.
        assert_close(two["judged"][0].gradients[0], one.gradients[0], 2e-3)
        assert_moved_alike(two["judged"][0], one, 1e-2)

    def test_with_a_discriminator_that_starts_later(self, two):
        require_weights("lpips-vgg")
        assert_same_on_both(two["late"])
        judged = [any("discriminator" in name for name in gradients) for gradients in two["late"][0].gradients]
        assert judged == [False, True, True]

    def test_either_goes_on_with_a_checkpoint_of_the_other(self, rooms, one, two, folder, tmp_path):
        assert_same_on_both(two["resumed"])
        assert two["resumed"][0].scene_ids[0] == one.scene_ids[2][:2]
        assert_close(two["resumed"][0].gradients[0], one.gradients[2], 1e-4)
        config = resumed(config_of(rooms.root, tmp_path, RANKS * 2), checkpoints_in(folder / "plain-0"))
        again = trained(config)
        assert_close(again.gradients[0], two["plain"][0].gradients[2], 1e-4)
        assert_moved_alike(again, replace(two["plain"][0], start=again.start), 1e-4)

    def test_only_the_first_writes(self, two, folder):
        assert checkpoints_in(folder / "plain-0").is_dir()
        assert not list(folder.glob("*-1"))

    def test_a_loss_that_is_not_finite_ends_both_and_is_told_once(self, two):
        (silent, nothing), (code, words) = (record.ending for record in two["loss"])
        assert silent == code == 2
        assert nothing == ""
        assert "at step 1: rgb_loss is not finite" in words
        assert f"scenes {', '.join(two['loss'][1].scene_ids[1])};" in words

    def test_a_gradient_that_is_not_finite_ends_both_and_is_told_once(self, one, two):
        (code, words), (silent, nothing) = (record.ending for record in two["gradient"])
        assert silent == code == 2
        assert nothing == ""
        assert "at step 1: the gradient of the autoencoder is not finite" in words
        assert f"scenes {', '.join(one.scene_ids[1])};" in words

    def test_one_that_fails_alone_leaves_no_other_waiting(self, two):
        """That `two` came to its end says the rest."""
        code, words = two["scene"][-1].ending
        assert code == 2
        assert "The scene attic has gone" in words
