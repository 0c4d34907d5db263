"""What a denoiser samples for a few scenes, to look at while it trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from PIL import Image, ImageDraw
from torch import Tensor

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.choice import evenly
from nfldm_ns.diffusion.bev import to_grid_order
from nfldm_ns.diffusion.latent_memory import LatentMemory
from nfldm_ns.diffusion.solver import sample_latents
from nfldm_ns.diffusion.trajectory import CAMERA_DIM, trajectory_to_cameras
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder
from nfldm_ns.latents.scene_latents import SceneLatents
from nfldm_ns.reports.galleries import bev_colors, density_from_above, image_grid, to_uint8
from nfldm_ns.scenes.views import index_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.training.draws import ItemDraws
from nfldm_ns.training.trackers import Pictures

NUM_SCENES = 4
STEPS = 20
MAP_SCALE = 4  # pixels per column of voxels
ARROW_M = 0.8


class DenoiserPictures:
    """Fixed training scenes whose g, c or f is sampled anew while their other latents are the true ones.

    Each is decoded by the frozen stages 2 and 1 and seen by a camera of its trajectory, beside the same with true
    latents only. psi_g also samples the trajectory, which is drawn on the scene seen from above. The noise is always
    the same.

    Args:
        stage: whose latent is sampled: "global", "coarse" or "fine".
        denoiser: the one that is being trained.
        scheduler: samples, without randomness of its own.
        memory: latents of the training scenes.
        steps: of the scheduler.
    """

    def __init__(
        self,
        stage: str,
        denoiser: Any,
        scheduler: SchedulerMixin,
        memory: LatentMemory,
        latent_autoencoder: LatentAutoencoder,
        scene_autoencoder: SceneAutoencoder,
        seed: int = 0,
        steps: int = STEPS,
    ) -> None:
        self.stage, self.denoiser, self.scheduler = stage, denoiser, scheduler
        self.memory, self.seed, self.steps = memory, seed, steps
        self.device = next(denoiser.parameters()).device
        self.latent_autoencoder = latent_autoencoder.to(self.device)
        self.scene_autoencoder = scene_autoencoder.to(self.device)
        self.indices = evenly(range(len(memory)), NUM_SCENES)

    @torch.no_grad()
    def __call__(self) -> Pictures:
        """One picture with a row per scene."""
        code, coarse, codes, fine = (self._pick(name) for name in ("scene_code", "coarse", "coarse_codes", "fine"))
        maps = self._maps_of_scenes()
        sampled_code, sampled_coarse, sampled_fine = code, coarse, fine
        if self.stage == "global":
            sampled_code = self.denoiser.code.inverse(self._sample(**maps))
        elif self.stage == "coarse":
            sample = self.denoiser.latent.inverse(self._sample(scene_code=code, **maps))
            sampled_coarse = sample.unflatten(1, coarse.shape[1:3])
        else:
            sampled_fine = self.denoiser.latent.inverse(self._sample(scene_code=code, coarse=codes, **maps))
        true, sampled = self._decode(code, coarse, fine), self._decode(sampled_code, sampled_coarse, sampled_fine)
        cameras = self._cameras(code)
        columns: dict[str, Iterable[Tensor]] = {
            "true": self._render(true, cameras),
            f"sampled {self.stage}": self._render(sampled, cameras),
        }
        if maps:
            pictures = to_grid_order(maps["bev"]).byte().cpu().numpy()
            columns["map"] = [bev_colors(bev, self.memory.bev_classes) for bev in pictures]
        if self.stage == "global":
            columns["true way"] = self._maps(true, cameras)
            columns["sampled way"] = self._maps(true, self._cameras(sampled_code))
        return {f"{self.stage}_samples": image_grid(columns, [f"scene {i}" for i in self.indices])}

    def _pick(self, name: str) -> Tensor:
        return self.memory.pick(name, self.indices, torch.zeros(len(self.indices), dtype=torch.long), self.device)

    def _maps_of_scenes(self) -> dict[str, Tensor]:
        """The condition of a denoiser that knows maps; nothing for others."""
        if not self.denoiser.config.bev_classes:
            return {}
        turns = torch.zeros(len(self.indices), dtype=torch.long)
        return {"bev": self.memory.pick_maps(self.indices, turns, self.device)}

    def _sample(self, **conditions: Tensor) -> Tensor:
        like = torch.empty(len(self.indices), *self.denoiser.sample_shape, device=self.device)
        noise = ItemDraws(self.seed, range(len(self.indices)), self.device).normal(like)
        return sample_latents(self.denoiser, self.scheduler, noise, self.steps, **conditions)

    def _decode(self, code: Tensor, coarse: Tensor, fine: Tensor) -> VoxelGrid:
        global_latent = code[:, : code.shape[1] - CAMERA_DIM * self.memory.num_cameras]
        return self.latent_autoencoder.decode(SceneLatents(global_latent, coarse, fine))

    def _cameras(self, code: Tensor) -> Cameras:
        trajectory = code[:, code.shape[1] - CAMERA_DIM * self.memory.num_cameras :]
        memory = self.memory
        return trajectory_to_cameras(trajectory, self.latent_autoencoder.aabb, memory.intrinsics, memory.image_size)

    def _render(self, grid: VoxelGrid, cameras: Cameras) -> Float[Tensor, "scenes 3 height width"]:
        first = index_cameras(cameras, (slice(None), slice(0, 1)))
        return self.scene_autoencoder.render(grid, first).rgb[:, 0]

    def _maps(self, grid: VoxelGrid, cameras: Cameras) -> list[Tensor]:
        maps = density_from_above(grid)
        return [draw_cameras(image, index_cameras(cameras, i), grid.aabb) for i, image in enumerate(maps)]


def draw_cameras(
    image: Float[Tensor, "3 y x"], cameras: Cameras, aabb: Float[Tensor, "2 3"]
) -> Float[Tensor, "3 height width"]:
    """A map of the box, north up, with the cameras `[N]` as dots on their way, and where they look."""
    pixels = to_uint8(image).repeat(MAP_SCALE, axis=0).repeat(MAP_SCALE, axis=1)
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    low, high = aabb.cpu()
    poses = cameras.camera_to_worlds.cpu()
    ends = torch.stack([poses[:, :, 3], poses[:, :, 3] - ARROW_M * poses[:, :, 2]])
    share = (ends[..., :2] - low[:2]) / (high - low)[:2]
    x, y = share[..., 0] * picture.width, (1 - share[..., 1]) * picture.height
    start, tip = (torch.stack([x[i], y[i]], dim=-1).tolist() for i in range(2))
    draw.line([tuple(point) for point in start], fill=(120, 120, 120))
    for point, end in zip(start, tip, strict=True):
        draw.line([tuple(point), tuple(end)], fill=(220, 30, 30), width=1)
        draw.ellipse([point[0] - 2, point[1] - 2, point[0] + 2, point[1] + 2], fill=(220, 30, 30))
    return torch.from_numpy(np.array(picture)).movedim(-1, 0).float() / 255
