"""Errors a user can cause, and how they reach the user."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from pathlib import Path

BAD_INPUT_EXIT_CODE = 2


class UserInputError(Exception):
    """Something the user gave us cannot be used.

    The message is one sentence that says what is wrong, where, and what to do; in one line, whatever names of files and
    messages of libraries it quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


def describe_os_error(error: OSError, path: Path | str | None = None) -> str:
    """One sentence for a failed write or read, with the remedy for the common causes.

    Args:
        error: what the operating system said.
        path: where it happened, if the error itself does not know.
    """
    where = error.filename or path or "the output folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full while writing {where}: free some space or choose another output folder."
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"{where} is not writable: choose another output folder or change its permissions."
    if error.errno == errno.ENOTDIR or error.errno == errno.EEXIST:
        return f"{where} is in the way ({error.strerror}): choose another output folder."
    return f"{where} cannot be read or written ({error.strerror}): check the path."


@contextlib.contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Turns `UserInputError` and file-system errors into one sentence on stderr and exit code 2."""
    try:
        yield
    except UserInputError as error:
        message = str(error)
    except OSError as error:
        if error.errno is None:
            raise
        message = describe_os_error(error)
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(BAD_INPUT_EXIT_CODE)
