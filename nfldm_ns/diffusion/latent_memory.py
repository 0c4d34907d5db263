"""Latents of all training scenes, encoded once and kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from nerfstudio.cameras.cameras import Cameras
from rich.progress import track
from torch import Tensor

from nfldm_ns.diffusion.bev import to_grid_order, turn_map
from nfldm_ns.diffusion.trajectory import Intrinsics, cameras_to_trajectory, turn_trajectory
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder
from nfldm_ns.latents.voxel_store import VoxelStore
from nfldm_ns.scenes.collection import BevClass, SceneCollection, read_transforms
from nfldm_ns.scenes.views import index_cameras

ENCODE_BATCH = 4


@dataclass
class LatentMemory:
    """Latents of S scenes in T quarter turns.

    Attributes:
        scene_code: `[S, T, G + 5 N]`, g and the trajectory of the source cameras.
        coarse: `[S, T, Cc, Zc, Yc, Xc]`, before quantisation, in half precision.
        coarse_codes: the same, quantised.
        fine: `[S, T, Cf, Y, X]`, before quantisation, in half precision.
        num_cameras: N.
        intrinsics: fx, fy, cx, cy of the first scene's cameras, in pixels.
        image_size: (height, width).
        maps: `[S, T, H, W]`, class ids of the semantic maps in the order of V; None if they were not asked for.
        bev_classes: of the maps.
    """

    scene_code: Float[Tensor, "scenes turns code"]
    coarse: Float[Tensor, "scenes turns cc zc yc xc"]
    coarse_codes: Float[Tensor, "scenes turns cc zc yc xc"]
    fine: Float[Tensor, "scenes turns cf y x"]
    num_cameras: int
    intrinsics: Intrinsics
    image_size: tuple[int, int]
    maps: UInt8[Tensor, "scenes turns h w"] | None = None
    bev_classes: tuple[BevClass, ...] = ()

    def __len__(self) -> int:
        return self.scene_code.shape[0]

    @property
    def num_turns(self) -> int:
        return self.scene_code.shape[1]

    def pick(self, name: str, indices: list[int], turns: Tensor, device: torch.device | str) -> Tensor:
        """One attribute of some scenes, each in its turn, in single precision."""
        return getattr(self, name)[torch.tensor(indices), turns].to(device).float()

    def pick_maps(
        self, indices: list[int], turns: Tensor, device: torch.device | str
    ) -> Int[Tensor, "batch height width"]:
        """Maps of some scenes, each in its turn.

        Raises:
            UserInputError: if there are none.
        """
        if self.maps is None:
            raise UserInputError("The latents were encoded without BEV maps: encode them again, with maps.")
        return self.maps[torch.tensor(indices), turns].to(device).long()


@torch.no_grad()
def encode_latents(
    store: VoxelStore,
    latent_autoencoder: LatentAutoencoder,
    scene_ids: Sequence[str],
    quarter_turns: bool = True,
    num_cameras: int | None = None,
    on_progress: Callable[[float], None] | None = None,
    with_maps: bool = False,
) -> LatentMemory:
    """Encodes scenes of a store, each in four turns or as it is.

    Args:
        num_cameras: length of the trajectory; by default the least number of source views of these scenes. Scenes with
            more contribute evenly spaced ones.
        on_progress: called with the share that is done, instead of a progress bar.
        with_maps: also reads the semantic maps of the collection.

    Raises:
        UserInputError: if the voxels are not those the auto-encoder was made for, a scene has fewer cameras than
            `num_cameras`, or maps are wanted and missing.
    """
    _require_fit(store, latent_autoencoder)
    device = next(latent_autoencoder.parameters()).device
    collection = store.load_collection()
    maps = _maps(collection, scene_ids, quarter_turns) if with_maps else None
    cameras = [_source_cameras(collection, scene_id) for scene_id in scene_ids]
    fewest = min(c.shape[0] for c in cameras)
    num_cameras = fewest if num_cameras is None else num_cameras
    if fewest < num_cameras:
        raise UserInputError(
            f"A scene of {store.description['collection']} has {fewest} source views, but the model was trained with "
            f"{num_cameras}: collect scenes with as many."
        )
    trajectories = torch.stack([cameras_to_trajectory(_spread(c, num_cameras)) for c in cameras])
    turns = range(4) if quarter_turns else range(1)
    parts: dict[str, list[Tensor]] = {"g": [], "coarse": [], "coarse_codes": [], "fine": []}
    batches = [list(scene_ids[i : i + ENCODE_BATCH]) for i in range(0, len(scene_ids), ENCODE_BATCH)]
    bar = track(batches, "Encoding latents", transient=True, disable=on_progress is not None)
    for i, batch in enumerate(bar):
        grid = store.grid(batch).to(device)
        turned = [latent_autoencoder.encode(grid.rotate90(turn) if turn else grid) for turn in turns]
        codes = [latent_autoencoder.quantise_coarse(latents.coarse) for latents in turned]
        parts["g"].append(torch.stack([latents.global_latent for latents in turned], 1).cpu())
        parts["coarse"].append(torch.stack([latents.coarse for latents in turned], 1).half().cpu())
        parts["coarse_codes"].append(torch.stack(codes, 1).half().cpu())
        parts["fine"].append(torch.stack([latents.fine for latents in turned], 1).half().cpu())
        if on_progress is not None:
            on_progress((i + 1) / len(batches))
    turned_trajectories = torch.stack([turn_trajectory(trajectories, turn) for turn in turns], dim=1)
    first = cameras[0]
    return LatentMemory(
        torch.cat([torch.cat(parts["g"]), turned_trajectories], dim=-1),
        torch.cat(parts["coarse"]),
        torch.cat(parts["coarse_codes"]),
        torch.cat(parts["fine"]),
        num_cameras,
        tuple(float(getattr(first, name)[0]) for name in ("fx", "fy", "cx", "cy")),  # type: ignore[arg-type]
        (int(first.height[0]), int(first.width[0])),
        maps,
        tuple(collection.bev_classes) if with_maps else (),
    )


def _require_fit(store: VoxelStore, latent_autoencoder: LatentAutoencoder) -> None:
    found, expected = (
        (model.feature_channels, *model.grid_shape, model.background_channels) for model in (store, latent_autoencoder)
    )
    if found != expected or not torch.allclose(store.aabb, latent_autoencoder.aabb.cpu(), atol=1e-4):
        raise UserInputError(
            f"The voxels in {store.root} are of shape {found[:4]} with {found[4]} background channels in the box "
            f"{store.aabb.tolist()}, but the latent auto-encoder was made for {expected[:4]} with {expected[4]} in "
            f"{latent_autoencoder.aabb.tolist()}: give the voxels it was trained on."
        )


def _maps(
    collection: SceneCollection, scene_ids: Sequence[str], quarter_turns: bool
) -> UInt8[Tensor, "scenes turns h w"]:
    """Maps of scenes in the order of V, each in its turns."""
    first = collection.load_bev(scene_ids[0])
    found = [first, *(collection.load_bev(scene_id, first.shape) for scene_id in scene_ids[1:])]
    maps = to_grid_order(torch.from_numpy(np.stack(found)))
    if quarter_turns and maps.shape[1] != maps.shape[2]:
        raise UserInputError(
            f"The BEV maps of {collection.root} are {maps.shape[2]} x {maps.shape[1]} and so cannot be turned: "
            "use --no-quarter-turns or square maps."
        )
    return torch.stack([turn_map(maps, turn) for turn in (range(4) if quarter_turns else range(1))], dim=1)


def _source_cameras(collection: SceneCollection, scene_id: str) -> Cameras:
    """Source cameras of a scene, without reading its images."""
    transforms = read_transforms(collection.scene_dir(scene_id))
    return transforms.cameras(transforms.source_names, collection.image_size)


def _spread(cameras: Cameras, count: int) -> Cameras:
    """`count` evenly spaced cameras of a sequence."""
    total = cameras.shape[0]
    return index_cameras(cameras, torch.arange(count) * total // max(count, 1))
