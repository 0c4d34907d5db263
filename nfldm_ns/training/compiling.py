"""`torch.compile` in trainings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from nfldm_ns.errors import UserInputError

INDUCTOR = "inductor"
"""torch's own compiler, by Triton on GPUs and by a C++ compiler on CPUs."""


def compiled_model(model: nn.Module, backend: str | None) -> nn.Module:
    """A model whose passes are compiled when it is called, with the very weights of the given one.

    The given model stays as it is, so that checkpoints, averages and pictures, which know that one alone, have the
    names of weights that they have without a compiler.

    Args:
        model: as it is trained, also wrapped for several processes.
        backend: of `torch.compile`; None gives back the model.

    Raises:
        UserInputError: if there is no such backend.
    """
    if backend is None:
        return model
    with compiler_told(backend):
        return torch.compile(model, backend=backend)  # type: ignore[return-value]


@contextlib.contextmanager
def compiler_told(backend: str | None) -> Iterator[None]:
    """Makes one sentence, a `UserInputError`, of what a compiler fails with; without a backend nothing is done."""
    if backend is None:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        raise UserInputError(
            f"torch.compile failed with the backend {backend} ({_reason(error)}): train without --compile, or see "
            "what its compiler lacks (a C++ compiler on CPUs, Triton on GPUs)."
        ) from error


def _reason(error: Exception) -> str:
    """The first line of what went wrong in the compiler, without the notes that PyTorch adds to it."""
    cause = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(cause).__name__
