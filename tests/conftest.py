"""Fixtures that all tests share."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

# Before torch starts its threads: spinning workers slow every neighbour down on small machines.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from nfldm_ns.diffusion.latent_memory import LatentMemory, encode_latents
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder
from nfldm_ns.latents.voxel_store import VoxelStore, encode_collection
from nfldm_ns.scenes.collection import SceneCollection
from tests.small_models import small_latent_autoencoder, small_scene_autoencoder
from tests.synthetic import make_box_room_collection

# What tests with processes of their own need, imported once for all of these.
multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.test_nerfstudio_plugin"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _same_random_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def box_room_collection(tmp_path_factory: pytest.TempPathFactory) -> SceneCollection:
    """Three training, one validation and two test rooms at 32 x 32 pixels; shared, so read only."""
    return make_box_room_collection(tmp_path_factory.mktemp("box_rooms"))


# The smallest networks and what trainings of later stages learn from; files that want other scenes have their own.


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> VoxelStore:
    """Voxels of three training rooms and a test room by an untrained stage 1; shared, so read only."""
    root = tmp_path_factory.mktemp("scenes")
    collection = make_box_room_collection(root / "rooms", num_train=3, num_test=1)
    return encode_collection(collection, small_scene_autoencoder(), root / "voxels")


@pytest.fixture(scope="module")
def latent_autoencoder() -> LatentAutoencoder:
    """An untrained stage 2 for them."""
    return small_latent_autoencoder()


@pytest.fixture(scope="module")
def memory(store: VoxelStore, latent_autoencoder: LatentAutoencoder) -> LatentMemory:
    """The latents of its training rooms."""
    return encode_latents(store, latent_autoencoder, store.splits["train"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # torch keeps files open that it failed to write
