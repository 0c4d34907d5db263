"""V and background of every scene of a collection, on disk and in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from nfldm_ns.autoencoder.background import BACKGROUND_MOMENTS
from nfldm_ns.autoencoder.checkpoints import (
    holds_tensors,
    load_scene_autoencoder,
    read_safetensors,
    stored_half,
)
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.voxel_optimiser import VoxelOptimiser
from nfldm_ns.processes import ALONE, Processes
from nfldm_ns.scenes.collection import SPLITS, Scene, SceneCollection, read_json
from nfldm_ns.scenes.views import Views
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.scenes.writing import atomic_path, clear_unfinished, write_json
from nfldm_ns.training.identity import model_hash

FORMAT = "nfldm-voxel-store"
VERSION = 2
AUTOENCODER_FOLDER = "scene_autoencoder"
TENSORS = ("density", "features", "background")


@dataclass
class VoxelStore:
    """A folder of encoded scenes, `voxels.json` and `<scene_id>.safetensors` (half precision).

    Attributes:
        root: the folder.
        description: content of `voxels.json`.
    """

    root: Path
    description: dict[str, Any]

    @classmethod
    def open(cls, root: Path | str) -> VoxelStore:
        """Reads the description and checks that every scene is there.

        Raises:
            UserInputError: if it is missing, of another version, or incomplete.
        """
        root = Path(root)
        if not (root / "voxels.json").is_file():
            raise UserInputError(f"{root} holds no encoded scenes: make them with 'nfldm-encode'.")
        description = _read_description(root / "voxels.json")
        store = cls(root, description)
        missing = [scene_id for scene_id in store.scene_ids if not store.path(scene_id).is_file()]
        if missing:
            raise UserInputError(
                f"{root} lacks {len(missing)} of {len(store.scene_ids)} scenes: "
                "run 'nfldm-encode' again to complete it."
            )
        return store

    @property
    def splits(self) -> dict[str, list[str]]:
        return self.description["splits"]

    @property
    def scene_ids(self) -> list[str]:
        return [scene_id for split in SPLITS for scene_id in self.splits[split]]

    @property
    def autoencoder_hash(self) -> str:
        """Fingerprint of the stage 1 that encoded the scenes."""
        return self.description["scene_autoencoder"]

    @property
    def aabb(self) -> Tensor:
        """`[2, 3]` in metres."""
        return torch.tensor(self.description["aabb"], dtype=torch.float32)

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        return tuple(self.description["grid_shape"])  # type: ignore[return-value]

    @property
    def feature_channels(self) -> int:
        return self.description["feature_channels"]

    @property
    def background_channels(self) -> int:
        return self.description["background_channels"]

    def path(self, scene_id: str) -> Path:
        return self.root / f"{scene_id}.safetensors"

    def load_collection(self) -> SceneCollection:
        """The collection the scenes are from."""
        return SceneCollection.open(self.description["collection"])

    def load_autoencoder(self) -> SceneAutoencoder:
        """The stage 1 that encoded the scenes, from its copy in the store."""
        model = load_scene_autoencoder(self.root / AUTOENCODER_FOLDER).requires_grad_(False)
        self.require(model)
        return model

    def require(self, scene_autoencoder: SceneAutoencoder) -> None:
        """Raises `UserInputError` unless this very stage 1 made the store."""
        if model_hash(scene_autoencoder) != self.autoencoder_hash:
            raise UserInputError(
                f"The scenes in {self.root} were encoded by another scene auto-encoder: "
                "encode them again into another folder."
            )

    def load(self, scene_id: str) -> dict[str, Tensor]:
        """`density` `[1, Z, Y, X]`, `features` `[C, Z, Y, X]`, `background` `[K, 4]` of one scene, in half precision.

        Raises:
            UserInputError: if the file is truncated or of another shape.
        """
        path = self.path(scene_id)
        voxels = read_safetensors(path)
        shapes = {name: tuple(value.shape) for name, value in voxels.items()}
        expected = {
            "density": (1, *self.grid_shape),
            "features": (self.feature_channels, *self.grid_shape),
            "background": (self.background_channels, BACKGROUND_MOMENTS),
        }
        if shapes != expected:
            raise UserInputError(
                f"{path} has voxels or a background of another shape: delete it and run 'nfldm-encode' again."
            )
        return voxels

    def grid(self, scene_ids: list[str]) -> VoxelGrid:
        """Voxels of some scenes, in single precision."""
        return _stack([self.load(scene_id) for scene_id in scene_ids], self.aabb)

    def load_all(self, split: str) -> VoxelMemory:
        """All scenes of a split in memory."""
        return VoxelMemory([self.load(scene_id) for scene_id in self.splits[split]], self.splits[split], self.aabb)


@dataclass
class VoxelMemory:
    """Scenes in memory, in half precision.

    Attributes:
        voxels: density, features and background of each scene.
        scene_ids: their names.
        aabb: `[2, 3]`.
    """

    voxels: list[dict[str, Tensor]]
    scene_ids: list[str]
    aabb: Tensor

    def __len__(self) -> int:
        return len(self.voxels)

    def grid(self, indices: list[int], device: torch.device | str = "cpu") -> VoxelGrid:
        """Voxels of some scenes, in single precision."""
        return _stack([self.voxels[i] for i in indices], self.aabb, device)

    def batches(self, batch_size: int, device: torch.device | str = "cpu") -> VoxelBatches:
        """All scenes in order, as a sequence of batches that are made when read."""
        return VoxelBatches(self, batch_size, device)


def _stack(scenes: list[dict[str, Tensor]], aabb: Tensor, device: torch.device | str = "cpu") -> VoxelGrid:
    """Stored scenes as one grid, in single precision."""
    density, features, background = (
        torch.stack([scene[name] for scene in scenes]).to(device).float() for name in TENSORS
    )
    return VoxelGrid(density, features, aabb.to(device), background)


@dataclass
class VoxelBatches:
    """A sequence of the batches of a `VoxelMemory`."""

    memory: VoxelMemory
    batch_size: int
    device: torch.device | str = "cpu"

    def __len__(self) -> int:
        return -(-len(self.memory) // self.batch_size)

    def __getitem__(self, index: int | slice) -> VoxelGrid | list[VoxelGrid]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]  # type: ignore[misc]
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = index * self.batch_size
        return self.memory.grid(list(range(first, min(first + self.batch_size, len(self.memory)))), self.device)

    def __iter__(self) -> Iterator[VoxelGrid]:
        return (self[i] for i in range(len(self)))  # type: ignore[misc]


@torch.no_grad()
def encode_collection(
    collection: SceneCollection,
    scene_autoencoder: SceneAutoencoder,
    root: Path | str,
    device: torch.device | str = "cpu",
    on_progress: Callable[[float], None] | None = None,
    optimiser: VoxelOptimiser | None = None,
    batch_size: int = 1,
    all_views: bool = False,
    num_threads: int = 1,
    processes: Processes = ALONE,
) -> VoxelStore:
    """Encodes the source views of every scene of all splits; scenes that are there already are kept.

    Also keeps a copy of stage 1 in the store.

    Args:
        optimiser: optimises what was encoded further: training scenes for all of their views, others, whose target
            views are there to judge by, for those that were encoded.
        batch_size: scenes encoded at once.
        all_views: encode training scenes from their target views, too: nothing is judged by these.
        num_threads: threads that read the scenes of a batch.
        processes: those that share the batches; each returns when all are done.

    Raises:
        UserInputError: if the folder holds scenes of another collection, of another stage 1, or that were encoded or
            optimised otherwise; or another process has ended.
    """
    root = Path(root)
    scene_autoencoder = scene_autoencoder.to(device).eval()
    description = _describe(collection, scene_autoencoder)
    if optimiser is not None:
        description["optimised"] = optimiser.describe()
    if all_views:
        description["all_views"] = True
    if processes.is_first:
        clear_unfinished(root)
        _check_or_start(root, description, scene_autoencoder)
    processes.wait()
    store = VoxelStore(root, description)
    batches = processes.share(list(_batches_of_splits(store.splits, batch_size)))
    silent = on_progress is not None or not processes.is_first
    for i, (split, scene_ids) in enumerate(track(batches, "Encoding scenes", disable=silent)):
        if not all(
            holds_tensors(store.path(scene_id), TENSORS) for scene_id in scene_ids
        ):  # as a whole: scenes may share draws
            batch = collection.batch(_read(collection, scene_ids, num_threads)).to(device)
            views = [batch.source, batch.target] if split == "train" else [batch.source]
            grid = scene_autoencoder.encode(Views.join(views) if all_views else batch.source)
            if optimiser is not None:
                grid = optimiser(scene_autoencoder, grid, views)
            for scene_id, voxels in zip(scene_ids, _stored(grid), strict=True):
                with atomic_path(store.path(scene_id)) as temporary:
                    save_file(voxels, temporary)
        if on_progress is not None:
            on_progress((i + 1) / len(batches))
    processes.wait()
    return VoxelStore.open(root)


def _read(collection: SceneCollection, scene_ids: Sequence[str], num_threads: int) -> list[Scene]:
    if num_threads == 1:
        return [collection.load_scene(scene_id) for scene_id in scene_ids]
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(collection.load_scene, scene_ids))


def _batches_of_splits(splits: Mapping[str, Sequence[str]], size: int) -> Iterator[tuple[str, Sequence[str]]]:
    for split in SPLITS:
        for first in range(0, len(splits[split]), size):
            yield split, splits[split][first : first + size]


def _read_description(path: Path) -> dict[str, Any]:
    description = read_json(path)
    kind = {"format": FORMAT, "version": VERSION}
    if not isinstance(description, dict) or {name: description.get(name) for name in kind} != kind:
        raise UserInputError(
            f"{path} is not of format {FORMAT} {VERSION}: encode the scenes again into another folder."
        )
    return description


def _describe(collection: SceneCollection, scene_autoencoder: SceneAutoencoder) -> dict[str, Any]:
    if not torch.allclose(collection.aabb, scene_autoencoder.aabb.cpu(), atol=1e-4):
        raise UserInputError(
            f"The scene auto-encoder was trained for the box {scene_autoencoder.aabb.tolist()}, but {collection.root} "
            f"has {collection.aabb.tolist()}: use the collection it was trained on."
        )
    return {
        "format": FORMAT,
        "version": VERSION,
        "collection": str(collection.root.resolve()),
        "scene_autoencoder": model_hash(scene_autoencoder),
        "aabb": collection.aabb.tolist(),
        "grid_shape": list(scene_autoencoder.grid_shape),
        "feature_channels": scene_autoencoder.feature_channels,
        "background_channels": scene_autoencoder.background_shape[0],
        "splits": {split: list(collection.splits[split]) for split in SPLITS},
    }


def _check_or_start(root: Path, description: dict[str, Any], scene_autoencoder: SceneAutoencoder) -> None:
    path = root / "voxels.json"
    if path.is_file():
        before = _read_description(path)
        if before.get("scene_autoencoder") != description["scene_autoencoder"]:
            raise UserInputError(
                f"{root} holds scenes encoded by another scene auto-encoder: choose another output folder or delete it."
            )
        if before.get("optimised") != description.get("optimised"):
            raise UserInputError(
                f"{root} holds scenes that were optimised otherwise ({before.get('optimised') or 'not at all'}): "
                "repeat the options of that run, or choose another output folder."
            )
        if before.get("all_views") != description.get("all_views"):
            raise UserInputError(
                f"{root} holds scenes whose training views were {'all' if before.get('all_views') else 'not all'} "
                "encoded: repeat the options of that run, or choose another output folder."
            )
        moved = {**before, "collection": description["collection"]}
        if moved != description:
            raise UserInputError(
                f"{root} holds scenes of another collection: choose another output folder or delete it."
            )
    if not (root / AUTOENCODER_FOLDER / "config.json").is_file():
        shutil.rmtree(root / AUTOENCODER_FOLDER, ignore_errors=True)
        with atomic_path(root / AUTOENCODER_FOLDER) as temporary:
            scene_autoencoder.save_pretrained(temporary)
    write_json(path, description)


def _stored(grid: VoxelGrid) -> Iterator[dict[str, Tensor]]:
    """What is kept of each scene, in half precision."""
    assert grid.background is not None
    for tensors in zip(grid.density, grid.features, grid.background, strict=True):
        yield dict(zip(TENSORS, map(stored_half, tensors), strict=True))
