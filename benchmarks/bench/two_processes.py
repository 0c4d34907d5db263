"""How much faster two processes of one thread each encode 32 places than one, and what the machine allows."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KEY = "two_processes"
NUM_PLACES = 32
REPEATS = 3
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


def measure(num_places: int = NUM_PLACES, repeats: int = REPEATS) -> dict[str, float]:
    """`speedup`, the ratio of the seconds that encoding alone takes, without starts, and those seconds; medians.

    `machine` is the speedup of two processes that know nothing of each other and encode all places each: what cores
    that share their caches, or a host, with others leave possible. `of_limit` is the share of it that is reached.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make_places(folder / "places", num_places)
        alone, together, apart = [], [], []
        for i in range(repeats):  # in turns: other work of the machine slows down all
            alone.append(_encode(folder, [f"one_{i}"])[0])
            together.append(_encode(folder, [f"two_{i}"], LAUNCHER)[0])
            apart.append(statistics.mean(_encode(folder, [f"first_{i}", f"second_{i}"])))
    one, two, both = statistics.median(alone), statistics.median(together), statistics.median(apart)
    return {
        "speedup": one / two,
        "machine": 2 * one / both,
        "of_limit": both / (2 * two),
        "one_seconds": one,
        "two_seconds": two,
        "cores": float(os.cpu_count() or 1),
    }


def _encode(folder: Path, names: list[str], launcher: Sequence[str] = ("-m",)) -> list[float]:
    """Seconds of commands that start at once, from the first process's first place to when all of its are done."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [sys.executable, *launcher, "bench.two_processes", str(folder / "places")]
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    [*arguments, str(folder / name)],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for name in names
        ]
        for process in started:
            _, errors = process.communicate()
            if process.returncode:
                raise RuntimeError(f"Encoding failed: {errors.strip().splitlines()[-1:]}")
    return [float((folder / f"{name}.txt").read_text()) for name in names]


def _work(data: str, output: str) -> None:
    from nfldm_ns.latents.voxel_store import encode_collection
    from nfldm_ns.processes import join_processes
    from nfldm_ns.scenes.collection import SceneCollection

    processes, device = join_processes("cpu")
    collection, model = SceneCollection.open(data), _stage1()
    processes.wait()
    begun = time.perf_counter()
    encode_collection(collection, model, output, device, processes=processes)
    if processes.is_first:
        Path(f"{output}.txt").write_text(str(time.perf_counter() - begun))
    processes.leave()


def _stage1() -> Any:
    from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder

    return load_scene_autoencoder("vizdoom-rooms")


def _make_places(root: Path, count: int) -> None:
    """A collection of the stage 1's box and image size, of noise: encoding takes the same time for any picture."""
    import torch

    from nfldm_ns.generated.cameras import surround_cameras
    from nfldm_ns.scenes.views import Views
    from nfldm_ns.scenes.writing import write_collection, write_scene

    model = _stage1()
    height, width = model.image_size
    cameras = surround_cameras(8, (height, width), float(model.config.focal_length))
    names = [f"place_{i:02d}" for i in range(count)]
    generator = torch.Generator().manual_seed(0)
    for name in names:
        views = Views(
            cameras, torch.rand(8, 3, height, width, generator=generator), torch.full((8, 1, height, width), 3.0)
        )
        write_scene(root / "scenes" / name, views, views[:2])
    write_collection(
        root,
        name="noise",
        licence="made up",
        aabb=model.aabb.tolist(),
        near=float(model.config.near),
        far=float(model.config.far),
        image_size=(width, height),
        splits={"train": names[:-1], "val": [], "test": names[-1:]},
        places={name: {"map": name, "origin": [0.0, 0.0, 0.0]} for name in names},
        bev_classes=[],
        made_by={},
    )


if __name__ == "__main__":
    _work(*sys.argv[1:])
