"""What a part of the check finds: numbers, failures by name, and bars."""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.writing import write_json

MEMORY = (
    "needs more memory than the GPU has free: see with nvidia-smi whether another program has some of it, else train "
    "with a smaller --batch-size and as many more --gradient-accumulation-steps"
)


@dataclass(frozen=True)
class Bar:
    """A number that the project aims at. Missing it is told and is no failure: cards differ.

    Attributes:
        name: of what was measured, with its unit.
        value: measured.
        bar: the least value, or the largest where `at_most`.
    """

    name: str
    value: float
    bar: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": self.value,
            "at_most" if self.at_most else "at_least": self.bar,
            "met": self.met,
        }


@dataclass
class Findings:
    """Of one part; kept on disk after every attempt, so that a part that is ended from outside leaves what it found.

    Attributes:
        path: of the JSON; None for none.
        numbers: measured, by name.
        failures: a sentence for each attempt that failed.
        bars: see `Bar`.
        attempting: what is being done at this moment.
        done: whether the part came to its end.
    """

    path: Path | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)
    attempting: str | None = None
    done: bool = False

    @property
    def folder(self) -> Path:
        """Where a part may leave files."""
        if self.path is None:
            raise ValueError("findings without a path have no folder")
        return self.path.parent

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Turns whatever goes wrong inside into a failure of this name; other attempts go on after it."""
        self.attempting = name
        self.write()
        try:
            yield
        except Exception as error:  # whatever CUDA, compilers and libraries raise
            self.failures[name] = sentence(error)
            traceback.print_exc()
            del error
        finally:
            self.attempting = None
            _let_go_of_memory()
            self.write()

    def require(self, name: str, holds: bool, said: str) -> None:
        """Notes a failure unless something holds."""
        if not holds:
            self.failures[name] = said
            self.write()

    def finish(self) -> None:
        self.done = True
        self.write()

    def write(self) -> None:
        if self.path is not None:
            write_json(self.path, self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        return {
            "numbers": self.numbers,
            "failures": self.failures,
            "bars": [bar.as_dict() for bar in self.bars],
            "attempting": self.attempting,
            "done": self.done,
        }


def sentence(error: BaseException) -> str:
    """What went wrong in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else ""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"{MEMORY} ({first})." if first else f"{MEMORY}."
    if isinstance(error, UserInputError):
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _let_go_of_memory() -> None:
    """So that an attempt that ran out of memory leaves it to the next one."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # after a fault of CUDA nothing works any more
            torch.cuda.empty_cache()
