"""One piece of work at a time, beside the viewer: how far it is, how it ended, and how to stop it."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from nfldm_ns.errors import UserInputError, describe_os_error


class Cancelled(Exception):
    """Raised within work that is to stop."""


@dataclass(frozen=True)
class Status:
    """What goes on.

    Attributes:
        running: whether a job does.
        what: it does, or the last one did.
        share: of it that is done, from 0 to 1.
        message: one sentence on how the last one ended.
        failed: whether that was in vain.
    """

    running: bool = False
    what: str = ""
    share: float = 0.0
    message: str = ""
    failed: bool = False


class Job:
    """What work sees of itself."""

    def __init__(self, report: Callable[[str, float], None], what: str) -> None:
        self._report = report
        self._what = what
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    def check(self) -> None:
        """Raises `Cancelled` if the work is to stop."""
        if self._cancelled.is_set():
            raise Cancelled

    def progress(self, share: float, what: str | None = None) -> None:
        """Tells how far it is (0 to 1) and, if that changed, at what; also checks whether to stop."""
        self.check()
        self._what = what or self._what
        self._report(self._what, min(max(share, 0.0), 1.0))


class Worker:
    """Does one job at a time in a thread of its own.

    Args:
        changed: called whenever `status` is another, from the thread that changed it.
    """

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self.status = Status()
        self._changed = changed
        self._lock = threading.Lock()
        self._job: Job | None = None
        self._thread: threading.Thread | None = None

    def start(self, what: str, work: Callable[[Job], str]) -> None:
        """Begins a job and returns at once.

        Args:
            what: it does, such as "Sampling seed 3".
            work: returns a sentence on what came of it; it is to change nothing before it is sure to succeed.

        Raises:
            UserInputError: while another one runs.
        """
        with self._lock:
            if self._job is not None:
                raise UserInputError(f"{self.status.what} is not finished: wait for it, or cancel it.")
            job = self._job = Job(self._report, what)
            self.status = Status(running=True, what=what)
            self._thread = threading.Thread(target=self._run, args=(job, what, work), daemon=True)
            self._thread.start()
        self._changed()

    def cancel(self) -> None:
        """Lets the job stop at its next step; nothing happens where none runs."""
        job = self._job
        if job is not None:
            job.cancel()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until no job runs; whether that is so."""
        with self._lock:  # so that one that begins has begun
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return self._job is None

    def _report(self, what: str, share: float) -> None:
        self.status = Status(running=True, what=what, share=share)
        self._changed()

    def _run(self, job: Job, what: str, work: Callable[[Job], str]) -> None:
        message, failed = f"{what}: cancelled, nothing changed.", True
        try:
            message, failed = work(job), False
        except Cancelled:
            pass
        except UserInputError as error:
            message = str(error)
        except OSError as error:
            message = describe_os_error(error)
        except ValueError as error:  # what a generator cannot be asked for
            message = f"{what} is not possible: {error}."
        except Exception as error:
            traceback.print_exc()
            message = f"{what} ended in an error of the program ({type(error).__name__}): the terminal shows where."
        with self._lock:
            self.status = Status(what=what, message=message, failed=failed)
            self._job = None
        self._changed()
