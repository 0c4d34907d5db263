"""Several processes share the scenes of a command: what they make is what one makes, also after one has died."""

from __future__ import annotations

import os
import socket
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.multiprocessing import ProcessExitedException, start_processes

from nfldm_ns.errors import UserInputError
from nfldm_ns.evaluation.evaluation import evaluate_pipeline
from nfldm_ns.evaluation.settings import EvaluationSettings
from nfldm_ns.latents import voxel_store
from nfldm_ns.latents.voxel_store import VoxelStore, encode_collection
from nfldm_ns.metrics import image_sets
from nfldm_ns.processes import ALONE, Processes, as_torchrun, join_processes
from nfldm_ns.sampling import scenes as sampling
from nfldm_ns.sampling.scenes import sample_scenes
from nfldm_ns.scenes.collection import SceneCollection
from tests.small_models import small_pipeline, small_scene_autoencoder
from tests.synthetic import make_box_room_collection
from tests.test_eval import MeanColor

RANKS = 2
NUM_SCENES = 5
EVALUATION = EvaluationSettings(num_images=6, views_per_scene=2, num_inference_steps=2)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory) -> SceneCollection:
    return make_box_room_collection(tmp_path_factory.mktemp("rooms"), num_train=4, num_test=3)


def run_all(root: Path, data: Path, processes: Processes = ALONE) -> None:
    """Encodes, samples and evaluates, as the commands do."""
    torch.set_num_threads(1)
    collection = SceneCollection.open(data)
    encode_collection(collection, small_scene_autoencoder(), root / "voxels", processes=processes)
    list(sample_scenes(small_pipeline(), root / "scenes", NUM_SCENES, 3, num_inference_steps=2, processes=processes))
    processes.wait()
    with mock.patch.object(image_sets, "PIECE", 2):  # so that there are features for all
        evaluate_pipeline(
            small_pipeline(), collection, root / "eval", EVALUATION, MeanColor(), "small", None, processes
        )


def work(rank: int, root: Path, data: Path, port: int, dies: bool) -> None:
    """What each of two processes does; the second may die in the middle of its second place, while it writes it."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    processes, device = join_processes("cpu")
    assert (processes.rank, processes.count, device) == (rank, RANKS, "cpu")
    if dies and rank == 1:
        _die_in_the_second(root)
    try:
        run_all(root, data, processes)
    except UserInputError as error:
        (root / f"words_{rank}.txt").write_text(str(error))
        raise SystemExit(2) from None
    processes.leave()


def _die_in_the_second(root: Path) -> None:
    save, calls = voxel_store.save_file, []

    def save_or_die(voxels: dict, path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            os._exit(9)
        save(voxels, path)

    voxel_store.save_file = save_or_die  # type: ignore[assignment]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(root: Path, data: Path, dies: bool = False) -> None:
    root.mkdir(exist_ok=True)
    get_context("forkserver").set_forkserver_preload([__name__])  # imports once, for all processes
    start_processes(work, (root, data, free_port(), dies), nprocs=RANKS, start_method="forkserver")


def contents(root: Path) -> dict[str, bytes]:
    """All files whose bytes do not depend on where they lie or how long they took."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in ("config.yml", "eval.json", "index.html") and path.parent != root
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_make_what_one_makes_also_after_one_died(rooms, tmp_path):
    run_all(tmp_path / "one", rooms.root)
    with pytest.raises(ProcessExitedException) as ending:
        start(tmp_path / "two", rooms.root, dies=True)
    assert ending.value.exit_code in (2, 9)
    with pytest.raises(UserInputError):
        VoxelStore.open(tmp_path / "two" / "voxels")
    start(tmp_path / "two", rooms.root)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys()
    assert not [name for name in one if one[name] != two[name]]
    assert not list((tmp_path / "two").rglob(".*.tmp"))
    assert len(list((tmp_path / "two" / "scenes").glob("scene_*"))) == NUM_SCENES
    assert (tmp_path / "two" / "eval" / "eval.json").is_file()


def test_shares_are_disjoint_and_all_of_it():
    items = list(range(11))
    for count in (1, 2, 3, 20):
        shares = [Processes(rank, count).share(items) for rank in range(count)]
        assert sorted(item for share in shares for item in share) == items
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_does_not_wait(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    processes, device = join_processes("cpu")
    assert (processes, device) == (ALONE, "cpu")
    processes.wait()
    processes.leave()


def test_variables_of_slurm_become_those_of_torchrun():
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    found = {**step, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7", "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "1"}
    as_torchrun(found)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("3", "4", "1")
    assert found["MASTER_ADDR"] == "10.0.0.7" and 20_000 <= int(found["MASTER_PORT"]) < 60_000
    batch_script = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    as_torchrun(batch_script)
    assert "RANK" not in batch_script, "outside of srun there is one process"
    by_torchrun = {**step, "RANK": "0", "WORLD_SIZE": "2"}
    as_torchrun(by_torchrun)
    assert by_torchrun["WORLD_SIZE"] == "2", "torchrun inside of a step knows better"
    with pytest.raises(UserInputError, match="MASTER_ADDR"):
        as_torchrun(dict(step))


def test_nonsense_of_the_environment_is_said(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UserInputError, match="WORLD_SIZE or LOCAL_RANK is no number"):
        join_processes("cpu")


def test_a_failed_write_ends_the_sampling(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(sampling, "write_generated_scene", full)
    with pytest.raises(OSError, match="No space"):
        list(sample_scenes(small_pipeline(), tmp_path, 2, num_inference_steps=1))
