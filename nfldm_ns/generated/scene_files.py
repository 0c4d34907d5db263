"""A generated scene on disk: voxels and background, latents, the renderer they need, and what made them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from nerfstudio.cameras.cameras import Cameras
from pydantic import Field
from safetensors.torch import save
from torch import Tensor

from nfldm_ns.autoencoder.checkpoints import read_safetensors
from nfldm_ns.autoencoder.model_configs import build_model
from nfldm_ns.autoencoder.renderers import renderer_class
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.tensor_coding import (
    Coded,
    InSteps,
    decode,
    decode_in_steps,
    encode,
    encode_in_steps,
    exact_half,
    in_steps,
)
from nfldm_ns.scenes.collection import read_depth, read_json, read_transforms
from nfldm_ns.scenes.image_files import open_image
from nfldm_ns.scenes.schema import Box, Checked, FileName, validated, validated_json
from nfldm_ns.scenes.sparse_grid import SparseGrid, readable
from nfldm_ns.scenes.voxel_grid import VoxelGrid

FORMAT = "nfldm-generated-scene"
VERSION = 2
UNCODED = 1  # whose tensors are in scene.safetensors as they are
Names = Annotated[list[str], Field(min_length=1)]
TENSORS = "scene.safetensors"
DESCRIPTION = "scene.json"
LARGEST_HALF = 60_000.0


@dataclass
class GeneratedScene:
    """One scene and what is needed to render it.

    Attributes:
        grid: batch size 1.
        renderer: a `SceneAutoencoder` without its image encoder: `render` works, `encode` does not.
        cameras: where its images were rendered from, batch shape `[N]`; None if it has none (yet).
        latents: by name, without batch axis.
        provenance: seed, pipeline, versions: whatever its maker wrote down.
    """

    grid: VoxelGrid
    renderer: SceneAutoencoder
    cameras: Cameras | None = None
    latents: dict[str, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


def renderer_of(autoencoder: SceneAutoencoder) -> SceneAutoencoder:
    """A frozen copy on the CPU without the image encoder and what refines its voxels."""
    return without_encoder(copy.deepcopy(autoencoder).cpu().float().eval())


def without_encoder(autoencoder: SceneAutoencoder) -> SceneAutoencoder:
    """Takes from an auto-encoder what rendering does not need, and freezes it."""
    autoencoder.encoder = None  # type: ignore[assignment]
    autoencoder.refiner = None
    return autoencoder.requires_grad_(False)


def half_precision(grid: VoxelGrid) -> VoxelGrid:
    """The grid as it survives storage in half precision, in float32 on the CPU."""

    def rounded(values: Tensor, smallest: float = -LARGEST_HALF) -> Tensor:
        return values.detach().cpu().float().clamp(smallest, LARGEST_HALF).half().float()

    background = None if grid.background is None else rounded(grid.background)
    return VoxelGrid(rounded(grid.density, 0), rounded(grid.features), grid.aabb.detach().cpu().float(), background)


def voxel_tensors(grid: VoxelGrid) -> dict[str, Tensor]:
    """A grid of one scene as files keep it, by name; `read_voxel_tensors` is the inverse."""
    tensors = {"density": grid.density[0].half(), "features": grid.features[0].half()}
    if grid.background is not None:
        tensors["background"] = grid.background[0].half()
    return tensors


def in_compact_precision(grid: VoxelGrid) -> VoxelGrid:
    """The grid as it survives storage in a compact file: features in steps (`tensor_coding.in_steps`), and none where
    no ray reads them; density and background as in `half_precision`."""
    sparse = SparseGrid.from_dense(half_precision(grid))
    return replace(sparse, features=in_steps(sparse.features)).to_dense()


def write_scene_files(folder: Path, scene: GeneratedScene, compact: bool = False) -> None:
    """Writes `scene.safetensors` and `scene.json` into an existing folder.

    Tensors are compressed without loss (`tensor_coding`): V in half precision, and the renderer, where that loses
    nothing.

    Args:
        compact: features are those of `in_compact_precision`; the file is about half as large.
    """
    grid = half_precision(scene.grid)
    tensors = voxel_tensors(grid)
    coded: dict[str, Tensor] = {}
    kinds: dict[str, Any] = {}
    if compact:
        features = SparseGrid.from_dense(grid).features
        coded["features"], kinds["features"] = encode_in_steps(in_steps(features))
        del tensors["features"]
    tensors |= {f"latents.{name}": value for name, value in scene.latents.items()}
    tensors |= {f"renderer.{name}": exact_half(value) for name, value in scene.renderer.state_dict().items()}
    for name, tensor in tensors.items():
        coded[name], kinds[name] = encode(tensor)
    (folder / TENSORS).write_bytes(save(coded))
    description = {
        "format": FORMAT,
        "version": VERSION,
        "provenance": scene.provenance,
        "aabb": scene.grid.aabb.tolist(),
        "tensors": kinds,
        "autoencoder": json.loads(scene.renderer.to_json_string()),
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def _decoded(coded: Mapping[str, Tensor], kinds: Mapping[str, Coded | InSteps]) -> dict[str, Tensor]:
    """The tensors of a file, V dense; raises KeyError or ValueError where file and description do not agree."""
    if set(coded) != set(kinds):
        raise ValueError(f"tensors {sorted(set(coded) ^ set(kinds))} are in one of them alone")
    tensors = {
        name: decode_in_steps(coded[name], kind) if isinstance(kind, InSteps) else decode(coded[name], kind)
        for name, kind in kinds.items()
    }
    if isinstance(kinds["features"], InSteps):
        density = tensors["density"][0].float()
        sparse = SparseGrid(density, readable(density, 0.0), tensors["features"], torch.zeros(2, 3))
        tensors["features"] = sparse.to_dense().features[0]
    return tensors


def load_generated_scene(folder: Path | str) -> GeneratedScene:
    """Reads a generated scene from safetensors and JSON.

    Raises:
        UserInputError: if a file is missing, damaged, or does not fit the others.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserInputError(
            f"{folder} is no generated scene (it has no {DESCRIPTION}): make some with 'nfldm-sample'."
        )
    description = read_json(path)
    known = isinstance(description, dict) and description.get("version") in (UNCODED, VERSION)
    if not known or description.get("format") != FORMAT:
        raise UserInputError(f"{path} is not of format {FORMAT}, version {VERSION}: sample the scene again.")
    scene = validated_json(_SceneDescription, description, path, "sample the scene again")
    tensors = read_safetensors(folder / TENSORS)
    if description["version"] != UNCODED:
        try:
            tensors = _decoded(tensors, scene.tensors)
        except (KeyError, ValueError) as error:
            raise UserInputError(
                f"{folder / TENSORS} does not fit {DESCRIPTION} ({error}): sample the scene again."
            ) from None
    renderer = build_model(
        renderer_class(scene.autoencoder),
        scene.autoencoder,
        path,
        _with_prefix(tensors, "renderer."),
        folder / TENSORS,
        without_encoder,
    )
    try:
        grid = read_voxel_tensors(tensors, torch.tensor(scene.aabb, dtype=torch.float32), renderer)
    except (KeyError, ValueError) as error:
        raise UserInputError(f"{path} and {TENSORS} do not fit together ({error}): sample the scene again.") from None
    cameras = None
    if (folder / "transforms.json").exists():
        cameras = frame_cameras(folder)
    return GeneratedScene(grid, renderer, cameras, _with_prefix(tensors, "latents."), scene.provenance or {})


class _SceneDescription(Checked):
    aabb: Box
    autoencoder: dict[str, Any]
    provenance: dict[str, Any] | None = None
    tensors: dict[str, Coded | InSteps] = Field(default_factory=dict)


def read_voxel_tensors(tensors: Mapping[str, Tensor], aabb: Tensor, renderer: SceneAutoencoder) -> VoxelGrid:
    """Voxels that the renderer can show; raises KeyError or ValueError for others."""
    background = tensors["background"][None].float() if "background" in tensors else None
    grid = VoxelGrid(tensors["density"][None].float(), tensors["features"][None].float(), aabb, background)
    if grid.features.shape[1] != renderer.feature_channels:
        raise ValueError(f"voxels of {grid.features.shape[1]} channels, a renderer of {renderer.feature_channels}")
    if background is not None and background.shape[1:] != renderer.background_shape:
        raise ValueError(f"a background of {list(background.shape[1:])}, not {list(renderer.background_shape)}")
    for name, values in (("density", grid.density), ("features", grid.features), ("background", background)):
        if values is not None and not bool(values.isfinite().all()):
            raise ValueError(f"{name} has NaN or infinity")
    return grid


class _DatasetFrame(Checked):
    """nerfstudio takes no `null` for an absent value, and depths of all frames or of none."""

    fl_x: float
    fl_y: float
    cx: float
    cy: float
    w: Annotated[int, Field(ge=1, le=10**6)]
    h: Annotated[int, Field(ge=1, le=10**6)]
    depth_file_path: FileName = ""


class _Dataset(Checked):
    camera_model: Literal["OPENCV"]
    frames: list[_DatasetFrame]
    train_filenames: Names
    val_filenames: Names
    test_filenames: Names


def check_dataset(folder: Path) -> None:
    """Reads what nerfstudio reads of a generated scene, its views, for nerfstudio tells nobody what is wrong with them.

    Raises:
        UserInputError: if a file is missing, damaged, or not as `write_generated_scene` writes it.
    """
    transforms = read_transforms(folder)
    dataset = validated(_Dataset, read_json(transforms.path), transforms.path)
    if len({frame.depth_file_path == "" for frame in dataset.frames}) > 1:
        raise UserInputError(f"Some frames of {transforms.path} have depths and others have none: sample it again.")
    for name, frame in transforms.frames.items():
        size = (frame["w"], frame["h"])
        image = open_image(folder / name, "restore it or sample the scene again")
        if (image.mode, image.size) != ("RGB", size):
            raise UserInputError(
                f"{folder / name} is {image.mode} of {image.size[0]} x {image.size[1]}, not RGB of {size[0]} x "
                f"{size[1]}: restore it or sample the scene again."
            )
        if "depth_file_path" in frame:
            read_depth(folder / frame["depth_file_path"], size)


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def frame_cameras(folder: Path, with_targets: bool = False) -> Cameras:
    """Cameras of a generated scene's images, batch shape `[N]`: its own, then if wanted those on the way between them.

    Raises:
        UserInputError: if the file does not tell them.
    """
    transforms = read_transforms(folder)
    first = transforms.frames[transforms.source_names[0]]
    if "w" not in first or "h" not in first:
        raise UserInputError(f"{transforms.path} lacks w or h of {first['file_path']}: sample the scene again.")
    names = [*transforms.source_names, *(transforms.target_names if with_targets else [])]
    return transforms.cameras(names, (int(first["w"]), int(first["h"])))
