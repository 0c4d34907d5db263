"""Sizes and trainings of in-domain priors.

| preset | for | denoiser |
|---|---|---|
| tiny | tests and first tries, minutes on a CPU | 0.3 M parameters |
| small | hours on a CPU, or a GPU; in half precision it takes less than 10 MB | 4.0 M parameters, on features |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nfldm_ns.refine.prior_losses import PriorTrainingConfig
from nfldm_ns.training.schedule import Schedule

PriorPresetName = Literal["tiny", "small"]


@dataclass(frozen=True)
class PriorPreset:
    """Arguments of `PriorDenoiser`, and its training."""

    model: dict[str, Any]
    training: PriorTrainingConfig


PERSONALISED = PriorTrainingConfig(
    schedule=Schedule(
        max_steps=400, batch_size=8, learning_rate=1e-4, warmup_steps=10, checkpoint_every=100, validation_steps=100
    ),
    ema_decay=0.99,
)
"""Of a trained prior that learns a few further images; sizes are the prior's own."""

PRIOR_PRESETS: dict[PriorPresetName, PriorPreset] = {
    "tiny": PriorPreset(
        model={"channels": (16, 16, 32), "attention": (False, False, True), "head_dim": 16},
        training=PriorTrainingConfig(
            schedule=Schedule(max_steps=1000, batch_size=8, warmup_steps=50, checkpoint_every=200),
            embedding="alex",
        ),
    ),
    "small": PriorPreset(
        model={"channels": (88, 112), "attention": (False, True), "head_dim": 28, "space": "features"},
        training=PriorTrainingConfig(
            embedding="alex",
            condition_dropout=0.2,
            schedule=Schedule(
                max_steps=60_000,
                batch_size=32,
                learning_rate=4e-4,
                warmup_steps=500,
                log_every=50,
                checkpoint_every=250,
                validation_steps=1000,
            ),
            ema_decay=0.9995,
        ),
    ),
}
