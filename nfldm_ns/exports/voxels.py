"""A scene's voxels as arrays, for programs of one's own."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.scenes.writing import atomic_path

FORMATS = ("npz", "safetensors")


def write_voxels(path: Path, grid: VoxelGrid) -> None:
    """Writes npz or safetensors, by the file's extension, whole or not at all.

    Single precision, without batch axis: `density [1, Z, Y, X]` in 1/m, `features [C, Z, Y, X]`, `aabb [2, 3]` in
    metres, and `background [K, 4]` if it is known.
    """
    tensors = {"density": grid.density[0], "features": grid.features[0], "aabb": grid.aabb}
    if grid.background is not None:
        tensors["background"] = grid.background[0]
    tensors = {name: values.detach().cpu().float().contiguous() for name, values in tensors.items()}
    with atomic_path(path) as temporary:
        if path.suffix.lower() == ".npz":
            with temporary.open("wb") as file:
                np.savez(file, **{name: values.numpy() for name, values in tensors.items()})
        else:
            temporary.write_bytes(save(tensors))


def read_voxels(path: Path) -> VoxelGrid:
    """The grid that `write_voxels` wrote, batch size 1.

    Raises:
        UserInputError: if it is another file, or damaged.
    """
    try:
        tensors = _read(path)
        background = tensors["background"][None] if "background" in tensors else None
        return VoxelGrid(tensors["density"][None], tensors["features"][None], tensors["aabb"], background)
    except (KeyError, ValueError, EOFError, BadZipFile, SafetensorError) as error:
        raise UserInputError(f"{path} has no voxels of nfldm-export ({error}): export them again.") from None


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix.lower() != ".npz":
        return load_file(path)
    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
