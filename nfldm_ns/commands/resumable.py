"""What long commands share that go on where they were interrupted."""

import signal
from collections.abc import Callable

from nfldm_ns.errors import exit_on_bad_input


def run_resumable(run: Callable[[], None]) -> None:
    """Runs a command; terminated it ends like an interrupted one, with its subprocesses, and says how to go on.

    Raises:
        SystemExit: with code 130 if it was interrupted, 2 for bad input.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with exit_on_bad_input():
            run()
    except KeyboardInterrupt:
        print("\nInterrupted: the same command continues where this one stopped.")
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)
