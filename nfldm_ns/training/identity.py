"""What tells one trained model from another: its configuration and a fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

LATER_OPTIONS = ("bev_", "flow", "known_share", "max_focal_length", "decoder_upsampling_channels")


def own_config(model: torch.nn.Module) -> dict[str, Any]:
    """A model's configuration without diffusers' own entries.

    What says that it has no maps and no upsampler, is not trained for flows, is no outpainter or has one focal
    length is left out: such models are the same as those made before there were any.
    """
    config = dict(model.config)  # type: ignore[arg-type]
    return {k: v for k, v in config.items() if not k.startswith("_") and (v or not k.startswith(LATER_OPTIONS))}


def public_config(model: torch.nn.Module) -> dict[str, Any]:
    """A model's configuration without diffusers' own entries, as it comes back from a file: lists, no tuples."""
    return json.loads(json.dumps(own_config(model)))


def tensor_hash(tensor: torch.Tensor) -> str:
    """A fingerprint of values, in 16 hexadecimal digits."""
    return hashlib.sha256(_bytes_of(tensor)).hexdigest()[:16]


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def model_hash(model: torch.nn.Module, parts: Mapping[str, torch.nn.Module] | None = None) -> str:
    """A fingerprint of a model's configuration and weights, in 16 hexadecimal digits.

    Args:
        parts: those of its modules whose weights count, by name; by default all.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(own_config(model), sort_keys=True).encode())
    state = model.state_dict()
    if parts is not None:
        state = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(_bytes_of(value))
    return digest.hexdigest()[:16]
