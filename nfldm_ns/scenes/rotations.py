"""Rotations about the axes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def quarter_turn(quarter_turns: int) -> Float[Tensor, "3 3"]:
    """The exact rotation by so many quarter turns, counter-clockwise about the z axis."""
    cos, sin = [(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)][quarter_turns % 4]
    return torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])


def turn_about(angle: Float[Tensor, "*batch"], axis: int) -> Float[Tensor, "*batch 3 3"]:
    """Rotations about an axis, in radians."""
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    rows = [[cos, -sin, zero], [sin, cos, zero], [zero, zero, one]]
    order = [(i - axis - 1) % 3 for i in range(3)]
    return torch.stack([torch.stack([rows[i][j] for j in order], dim=-1) for i in order], dim=-2)
