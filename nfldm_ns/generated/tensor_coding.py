"""Tensors of scenes and worlds as short byte strings: without loss, or features in steps that nobody sees.

Bytes of equal significance stand together, where they resemble each other, and are compressed by LZMA, whose checksum
also finds damage.
"""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from nfldm_ns.autoencoder.checkpoints import read_safetensors
from nfldm_ns.scenes.schema import Checked
from nfldm_ns.scenes.writing import atomic_path

STEPS = 64
"""Steps of compact files between 0 and the power of two at or above a channel's largest value: 7 bits with the sign."""
_TYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
LARGEST_TENSOR = 2**34  # bytes
DESCRIBED = "description"  # the one entry of metadata: more would be written in an order of chance


class Coded(Checked):
    """What a byte string decodes to."""

    dtype: Literal["float32", "float16", "int64", "int32", "uint8", "bool"]
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**32)]], Field(max_length=8)]


def encode(tensor: Tensor) -> tuple[UInt8[Tensor, " bytes"], dict[str, object]]:
    """Bytes of a tensor, and its type and shape as `Coded` has them.

    Raises:
        ValueError: if it is of a type that scenes do not have.
    """
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _TYPES:
        raise ValueError(f"tensors of {name} cannot be stored in a scene")
    values = tensor.detach().cpu().contiguous()
    planes = np.frombuffer(values.numpy().tobytes(), np.uint8).reshape(-1, values.element_size()).T
    return _bytes(lzma.compress(planes.tobytes())), {"dtype": name, "shape": list(tensor.shape)}


def decode(coded: UInt8[Tensor, " bytes"], kind: Coded) -> Tensor:
    """The inverse of `encode`, to the bit.

    Raises:
        ValueError: if the bytes are damaged or are not of such a tensor.
    """
    dtype = _TYPES[kind.dtype]
    size = torch.empty(0, dtype=dtype).element_size()
    count = math.prod(kind.shape)
    if count * size > LARGEST_TENSOR:
        raise ValueError(f"a tensor of {count * size} bytes")
    try:
        decoder = lzma.LZMADecompressor()
        plain = decoder.decompress(coded.numpy().tobytes(), count * size + 1)
    except lzma.LZMAError as error:
        raise ValueError(f"compressed data are damaged: {error}") from None
    if len(plain) != count * size or (not decoder.eof and count):
        raise ValueError(f"compressed data are not of a tensor of {kind.shape}")
    values = np.frombuffer(plain, np.uint8).reshape(size, -1).T.tobytes()
    if not count:
        return torch.empty(kind.shape, dtype=dtype)
    return torch.frombuffer(bytearray(values), dtype=dtype).reshape(kind.shape)


def _bytes(data: bytes) -> UInt8[Tensor, " bytes"]:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def in_steps(features: Float[Tensor, "n channels"]) -> Float[Tensor, "n channels"]:
    """Features rounded to whole steps, of which a channel has at most `STEPS` either way; again the same to the bit.

    Steps are powers of two, so that rounded values stay what they are in a scene of smaller ones.
    """
    steps = steps_of(features)
    return (features / steps).round() * steps


def steps_of(features: Float[Tensor, "n channels"]) -> Float[Tensor, " channels"]:
    """The step of each channel; 1 where all is 0."""
    if not len(features):
        return torch.ones(features.shape[1])
    largest = features.float().abs().amax(0)
    return torch.where(largest > 0, torch.exp2(largest.clamp(min=2.0**-60).log2().ceil()) / STEPS, 1.0)


def encode_in_steps(features: Float[Tensor, "n channels"]) -> tuple[UInt8[Tensor, " bytes"], dict[str, object]]:
    """Bytes of features that `in_steps` rounded: whole numbers as differences from voxel to voxel, and the steps."""
    steps = steps_of(features)
    codes = (features / steps).round().to(torch.int8).T.contiguous().numpy()
    differences = np.diff(codes, axis=1, prepend=np.int8(0))
    return _bytes(lzma.compress(differences.tobytes())), {"steps": steps.tolist(), "shape": list(features.shape)}


class InSteps(Checked):
    """What a byte string of `encode_in_steps` decodes to."""

    steps: Annotated[list[float], Field(max_length=2**16)]
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**32)]], Field(min_length=2, max_length=2)]


def decode_in_steps(coded: UInt8[Tensor, " bytes"], kind: InSteps) -> Float[Tensor, "n channels"]:
    """The inverse of `encode_in_steps`; `ValueError` if the bytes are damaged or are of something else."""
    count, channels = kind.shape
    if len(kind.steps) != channels or count * channels > LARGEST_TENSOR:
        raise ValueError(f"{len(kind.steps)} steps of features of {kind.shape}")
    try:
        plain = lzma.LZMADecompressor().decompress(coded.numpy().tobytes(), count * channels + 1)
    except lzma.LZMAError as error:
        raise ValueError(f"compressed data are damaged: {error}") from None
    if len(plain) != count * channels:
        raise ValueError(f"compressed data are not of features of {kind.shape}")
    differences = np.frombuffer(plain, np.int8).reshape(channels, count)
    codes = torch.from_numpy(np.cumsum(differences, axis=1, dtype=np.int8))
    return codes.T.float() * torch.tensor(kind.steps)


def exact_half(values: Tensor) -> Tensor:
    """In half precision if that loses nothing."""
    half = values.half() if values.dtype == torch.float32 else values
    return half if torch.equal(half.to(values.dtype), values) else values


def write_coded(path: Path, tensors: Mapping[str, Tensor], more: Mapping[str, Any] | None = None) -> None:
    """Writes tensors as one safetensors file of byte strings, which says itself what they are, in one step.

    Args:
        more: what else the file says, as JSON, see `coded_description`.
    """
    coded, kinds = {}, {}
    for name, tensor in tensors.items():
        coded[name], kinds[name] = encode(tensor)
    described = json.dumps({**(more or {}), "tensors": kinds})
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(coded, {DESCRIBED: described}))


def coded_description(path: Path) -> dict[str, Any] | None:
    """What a file of `write_coded` says, None for others; raises what `safe_open` does, or ValueError."""
    with safe_open(path, framework="pt") as file:
        described = (file.metadata() or {}).get(DESCRIBED)
    if described is None:
        return None
    found = json.loads(described)
    if not isinstance(found, dict):
        raise ValueError(f"its {DESCRIBED} is no object")
    return found


def read_coded(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `write_coded`, or of a plain safetensors file.

    Raises:
        UserInputError: if the file is missing, or no safetensors file.
        ValueError: if it does not hold what it says.
    """
    tensors = read_safetensors(path)
    described = coded_description(path)
    if described is None:
        return tensors
    try:
        kinds = TypeAdapter(dict[str, Coded]).validate_python(described.get("tensors"))
    except ValidationError as error:
        raise ValueError(f"it does not say what its tensors are: {error.errors()[0]['msg']}") from None
    if set(kinds) != set(tensors):
        raise ValueError(f"tensors {sorted(set(kinds) ^ set(tensors))} are not described, or missing")
    return {name: decode(tensors[name], kind) for name, kind in kinds.items()}
