"""Pretrained weights for tests: fetched once, skipped with a reason where nothing can be reached."""

from __future__ import annotations

import pytest

from nfldm_ns.errors import UserInputError
from nfldm_ns.evaluation.weights import fetch_weights


def require_weights(*names: str) -> None:
    """Makes sure that the cache holds the weights, or skips the test."""
    for name in names:
        try:
            fetch_weights(name)
        except UserInputError as error:
            pytest.skip(str(error))
