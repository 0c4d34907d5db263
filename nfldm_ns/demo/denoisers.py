"""Trains the three denoisers side by side: one thread each uses a few cores better than all threads on one."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nfldm_ns.autoencoder.checkpoints import read_safetensors
from nfldm_ns.diffusion.latent_memory import LatentMemory
from nfldm_ns.diffusion.training import DiffusionTrainingConfig, Stage, train_denoiser
from nfldm_ns.latents.latent_autoencoder import load_latent_autoencoder
from nfldm_ns.scenes.collection import bev_class, read_json
from nfldm_ns.scenes.writing import atomic_path, write_json

POLL_S = 0.5
_TENSORS = ("scene_code", "coarse", "coarse_codes", "fine", "maps")


@dataclass(frozen=True)
class DenoiserJob:
    """One training.

    Attributes:
        stage: which denoiser.
        output_dir: its run folder.
        model: its sizes.
        training: steps, batch size and the like.
        share: of the work of all jobs, for the progress.
    """

    stage: Stage
    output_dir: Path
    model: Mapping[str, Any]
    training: DiffusionTrainingConfig
    share: float


def save_latents(folder: Path, memory: LatentMemory) -> None:
    """Writes latents to a folder, whole or not at all."""
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        tensors = {name: getattr(memory, name) for name in _TENSORS if getattr(memory, name) is not None}
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary / "latents.safetensors")
        write_json(
            temporary / "latents.json",
            {
                "num_cameras": memory.num_cameras,
                "intrinsics": list(memory.intrinsics),
                "image_size": list(memory.image_size),
                "bev_classes": [asdict(bev_class) for bev_class in memory.bev_classes],
            },
        )


def load_latents(folder: Path) -> LatentMemory:
    """What `save_latents` wrote."""
    tensors, rest = read_safetensors(folder / "latents.safetensors"), read_json(folder / "latents.json")
    return LatentMemory(
        **{name: tensors.get(name) for name in _TENSORS},  # type: ignore[arg-type]
        num_cameras=rest["num_cameras"],
        intrinsics=tuple(rest["intrinsics"]),
        image_size=tuple(rest["image_size"]),
        bev_classes=tuple(bev_class(entry) for entry in rest.get("bev_classes", [])),
    )


def train_denoisers(
    jobs: list[DenoiserJob], latents: Path, latent_autoencoder: Path, processes: int, on_progress
) -> None:
    """Trains all jobs, `processes` at a time, each in a process of its own.

    The threads are shared out among the processes. An interrupted run continues.

    Args:
        latents: folder of `save_latents`.
        latent_autoencoder: the run of stage 2.
        on_progress: called with the share that is done.
    """
    context = multiprocessing.get_context("spawn")
    progress = context.Array("d", len(jobs))
    threads = max(1, torch.get_num_threads() // processes)
    with ProcessPoolExecutor(processes, context, _start_worker, (progress, threads, os.getpid())) as pool:
        waiting = {pool.submit(_train, index, job, latents, latent_autoencoder) for index, job in enumerate(jobs)}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=POLL_S)
                for future in done:
                    future.result()
                on_progress(sum(job.share * share for job, share in zip(jobs, progress[:], strict=True)))
        except BaseException:
            for process in pool._processes.values():
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


_progress: SynchronizedArray
_parent: int


def _start_worker(progress: SynchronizedArray, threads: int, parent: int) -> None:
    global _progress, _parent
    _progress, _parent = progress, parent
    torch.set_num_threads(threads)


def _train(index: int, job: DenoiserJob, latents: Path, latent_autoencoder: Path) -> None:
    def report(share: float, losses: dict[str, float]) -> None:
        _progress[index] = share
        if os.getppid() != _parent:
            raise SystemExit("the demo was killed")

    train_denoiser(
        job.stage,
        load_latents(latents),
        load_latent_autoencoder(latent_autoencoder),
        job.output_dir,
        dict(job.model),
        job.training,
        on_progress=report,
    )
    _progress[index] = 1.0
