"""How large the parts of the check are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Sizes of all parts; the defaults are those of the check, tests have smaller ones.

    Attributes:
        preset: whose voxels, networks and trainings count as paper-size.
        room: generator whose room, upsampled to the preset's voxels, is rendered; None for voxels of random numbers.
        pictures: sides of rendered pictures in pixels.
        repeats: of what is timed, at most.
        budget_s: for what is timed, each.
        batch_size: scenes per pass of trainings; None for the presets'.
        num_inference_steps: of a room.
        matrix: side of the matrices by which the device's rate is measured.
        warm_steps: training steps before losses are compared: untrained networks predict nothing.
        backend: of `torch.compile`.
        refining_steps: measured together.
    """

    preset: str = "paper"
    room: str | None = "vizdoom-rooms"
    pictures: tuple[int, ...] = (256, 512)
    repeats: int = 20
    budget_s: float = 3.0
    batch_size: int | None = None
    num_inference_steps: int = 30
    matrix: int = 8192
    warm_steps: int = 10
    backend: str = "inductor"
    refining_steps: int = 2
