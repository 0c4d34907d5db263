"""What share of a time budget each stage of the demo gets."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

TIME_SHARES: Mapping[str, float] = MappingProxyType(
    {
        "collect": 0.14,
        "stage1": 0.27,
        "encode": 0.08,
        "stage2": 0.12,
        "stage3": 0.24,
        "sample": 0.03,
        "shipped": 0.01,
        "evaluate": 0.04,
        "report": 0.04,
        "reserve": 0.03,
    }
)
"""Shares of the whole time by stage, and what is kept for surprises."""
DENOISER_SHARES: Mapping[Literal["global", "coarse", "fine"], float] = MappingProxyType(
    {"global": 0.05, "coarse": 0.55, "fine": 0.40}
)
"""Shares of the training time of stage 3."""
TRAINING_SHARE = 0.85
"""Of a training's stage: processes start, data is read and models are written in the rest."""
