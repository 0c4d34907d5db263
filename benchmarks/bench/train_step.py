"""How much longer a training step of stage 1 takes the plain way: a loop over views and depths, and a ray per pixel."""

from __future__ import annotations

from typing import Any

KEY = "train_step"
PRESET = "tiny"
REPEATS = 5


def measure(preset: str = PRESET, repeats: int = REPEATS) -> dict[str, Any]:
    """`ratio`, and the milliseconds of both; medians of steps in turns, as `benchmarks/stage1.py` takes them."""
    from stage1 import Step, alternating_medians

    from nfldm_ns.errors import UserInputError

    try:
        step = Step(preset)
    except UserInputError as error:  # the weights of LPIPS
        return {"absent": str(error)}
    ours, plain = alternating_medians(lambda: step.run(step.loss), lambda: step.run(step.loss, plain=True), repeats)
    return {
        "ratio": plain["whole step"] / ours["whole step"],
        "step_ms": ours["whole step"],
        "plain_step_ms": plain["whole step"],
        "lift_ms": ours["encode, lift and fuse"],
        "plain_lift_ms": plain["encode, lift and fuse"],
    }
