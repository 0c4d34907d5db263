"""Pretrained weights for tests: fetched once, skipped with a reason where nothing can be reached."""

from __future__ import annotations

import functools

import pytest

from nfldm_ns.errors import UserInputError
from nfldm_ns.pretrained.weights import fetch_weights


def require_weights(*names: str) -> None:
    """Makes sure that the cache holds the weights, or skips the test."""
    for name in names:
        if reason := _fetch_failure(name):
            pytest.skip(reason)


@functools.cache
def _fetch_failure(name: str) -> str:
    """Why they cannot be had; empty if they are there. Tried once per session."""
    try:
        fetch_weights(name)
    except UserInputError as error:
        return str(error)
    return ""
