"""What stage 2 makes of a few scenes, to look at while it trains."""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.choice import evenly
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder
from nfldm_ns.latents.voxel_store import VoxelStore
from nfldm_ns.reports.galleries import image_grid
from nfldm_ns.scenes.views import Views
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.training.loop import held_out_split
from nfldm_ns.training.trackers import Pictures

NUM_SCENES = 4


class RoundTripPictures:
    """Target views of fixed scenes: real, rendered from V (stage 1), and from what comes back of its latents (stage 2).

    Args:
        store: encoded scenes; those shown are held out if there are any such.
        model: the latent auto-encoder that is being trained.
        renderer: the frozen stage 1.
    """

    def __init__(self, store: VoxelStore, model: LatentAutoencoder, renderer: SceneAutoencoder) -> None:
        self.store, self.model, self.renderer = store, model, renderer
        self.scene_ids = evenly(store.splits[held_out_split(store.splits)], NUM_SCENES)

    def __call__(self) -> Pictures:
        """One picture with a row per scene."""
        grid = self._grid
        decoded = self.model.decode(self.model.encode(grid))
        columns = {"real": self._views.images[:, 0], "stage 1": self._stage1, "stage 2": self._render(decoded)}
        return {"round_trip": image_grid(columns, self.scene_ids)}

    @cached_property
    def _grid(self) -> VoxelGrid:
        return self.store.grid(self.scene_ids).to(self.model.device)

    @cached_property
    def _views(self) -> Views:
        collection = self.store.load_collection()
        views = [collection.load_scene(scene_id).target[:1] for scene_id in self.scene_ids]
        return Views.stack(views).to(self.model.device)

    @cached_property
    def _stage1(self) -> Float[Tensor, "scenes 3 height width"]:
        return self._render(self._grid)

    @torch.no_grad()
    def _render(self, grid: VoxelGrid) -> Float[Tensor, "scenes 3 height width"]:
        return self.renderer.render(grid, self._views.cameras).rgb[:, 0]
