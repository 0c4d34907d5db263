"""Processes that share work which may be interrupted and continued."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

import torch

State = TypeVar("State")


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
