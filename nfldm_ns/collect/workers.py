"""Processes that share work which may be interrupted and continued."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import read_json
from nfldm_ns.scenes.writing import write_json

State = TypeVar("State")


def claim_folder(root: Path, file: Path, options: dict[str, Any]) -> None:
    """Makes a folder for a run, or makes sure that it is the same run's: what two runs make never mixes in one.

    Args:
        file: in the folder, where the options are kept.
        options: all that decides what the run makes, for JSON.

    Raises:
        UserInputError: if the folder holds something else, or was begun with other options.
    """
    wanted = json.loads(json.dumps(options))
    if file.exists():
        begun = read_json(file)
        begun = begun if isinstance(begun, dict) else {}
        changed = [key for key in wanted if begun.get(key) != wanted[key]]
        if changed:
            raise UserInputError(
                f"{root} was begun with other options ({', '.join(changed)}): repeat those in {file} "
                "or choose another folder."
            )
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserInputError(f"{root} is not empty and was not begun by this command: choose another folder.")
    else:
        write_json(file, wanted)


def run_tasks(
    start: Callable[[State], None],
    state: State,
    task: Callable[..., None],
    arguments: Sequence[tuple[Any, ...]],
    workers: int,
    on_done: Callable[[], None] = lambda: None,
) -> None:
    """Does tasks in so many processes, or in this one if one will do.

    Args:
        start: called once in each process with the state, before its tasks.
        task: a module's function, called with each of the arguments.

    Raises:
        Whatever a task raises, once those that run have ended.
    """
    if workers <= 1 or len(arguments) <= 1:
        start(state)
        for values in arguments:
            task(*values)
            on_done()
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(arguments)), context, _start_worker, (start, state)) as pool:
        try:
            for job in as_completed([pool.submit(task, *values) for values in arguments]):
                job.result()
                on_done()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker(start: Callable[[State], None], state: State) -> None:
    torch.set_num_threads(1)
    leave_interrupts_to_parent()
    start(state)


def leave_interrupts_to_parent() -> None:
    """Keeps Ctrl-C from this process, whose parent then lets it finish; ends it when the parent was killed."""
    os.setpgrp()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)  # this worker and what it started
