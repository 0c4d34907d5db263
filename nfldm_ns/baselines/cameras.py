"""Where the cameras of generated scenes are: functions of a part of their latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor, nn

from nfldm_ns.diffusion.trajectory import CAMERA_DIM, Intrinsics, trajectory_to_cameras
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.cameras import look_along
from nfldm_ns.scenes.collection import SceneCollection, read_transforms
from nfldm_ns.scenes.rotations import turn_about
from nfldm_ns.scenes.views import make_cameras

LEVEL_SPREAD = 0.05  # standard deviation of the positions of a prior without data, in lengths of the box
FURTHEST = 0.25  # residuals of positions are below this share of the box's sides,
WIDEST = math.pi / 4  # and those of angles below this

Corner = tuple[float, float, float]


class CameraBank(ModelMixin, ConfigMixin):
    """A prior distribution of cameras as examples of it, and, if they learn, what moves them.

    The residuals are CAMPARI's (Niemeyer and Geiger, 3DV 2021): a network adds to a camera of the prior what depends on
    that camera alone, and begins with nothing. A latent of one standard normal number says which example.

    Args:
        num_poses: examples, each of the cameras of a scene.
        num_cameras: of a scene.
        intrinsics: fx, fy, cx, cy in pixels.
        image_size: (height, width).
        aabb: corners of the box in metres.
        learned: whether there are residuals.
    """

    config_name = "config.json"
    poses: Tensor
    latent_dim = 1

    @register_to_config
    def __init__(
        self,
        num_poses: int = 1,
        num_cameras: int = 8,
        intrinsics: Intrinsics = (51.2, 51.2, 32.0, 32.0),
        image_size: tuple[int, int] = (64, 64),
        aabb: tuple[Corner, Corner] = ((-10, -10, -2.5), (10, 10, 4)),
        learned: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("poses", torch.eye(4)[:3].repeat(num_poses, num_cameras, 1, 1))
        self.register_buffer("sides", torch.tensor(aabb[1]) - torch.tensor(aabb[0]), persistent=False)
        if learned:
            self.residual = nn.Sequential(nn.Linear(6, 64), nn.LeakyReLU(0.2), nn.Linear(64, 5))
            for parameter in self.residual[-1].parameters():
                nn.init.zeros_(parameter)

    def forward(self, latents: Float[Tensor, "batch 1"], views: Tensor | None = None) -> Cameras:
        """Cameras of scenes, batch shape `[B, N]`; with gradients where they learn.

        Args:
            views: `[B, M]`, which of the N cameras; by default all.
        """
        share = torch.special.ndtr(latents[:, 0].double())
        poses = self.poses[(share * self.config.num_poses).long().clamp(0, self.config.num_poses - 1)]
        if views is not None:
            poses = poses[torch.arange(len(poses), device=poses.device)[:, None], views]
        if self.config.learned:
            poses = self.moved(poses)
        return make_cameras(poses, *self.config.intrinsics, *self.config.image_size)

    def moved(self, poses: Float[Tensor, "*batch 3 4"]) -> Float[Tensor, "*batch 3 4"]:
        """Poses after their residuals: of the position, of the yaw about the world's z, of the pitch about their x."""
        position, forward = poses[..., 3] / self.sides, -poses[..., 2]
        bound = torch.cat([FURTHEST * self.sides, self.sides.new_full((2,), WIDEST)])
        change = bound * torch.tanh(self.residual(torch.cat([position, forward], dim=-1)))
        rotation = turn_about(change[..., 3], 2) @ poses[..., :3] @ turn_about(change[..., 4], 0)
        return torch.cat([rotation, (poses[..., 3] + change[..., :3])[..., None]], dim=-1)


class PoseDecoder(ModelMixin, ConfigMixin):
    """GAUDI's pose decoder (Bautista et al., NeurIPS 2022): a latent of its own to the cameras of a scene.

    It sees no more of a scene than this latent, and what makes voxels sees nothing of it. Cameras are level.

    Args:
        num_cameras, intrinsics, image_size, aabb: as in `CameraBank`.
        latent_dim: of the latent.
        width: of its layers.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        num_cameras: int = 8,
        intrinsics: Intrinsics = (51.2, 51.2, 32.0, 32.0),
        image_size: tuple[int, int] = (64, 64),
        aabb: tuple[Corner, Corner] = ((-10, -10, -2.5), (10, 10, 4)),
        latent_dim: int = 32,
        width: int = 128,
    ) -> None:
        super().__init__()
        self.register_buffer("box", torch.tensor(aabb, dtype=torch.float32), persistent=False)
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, num_cameras * 5),
        )

    @property
    def latent_dim(self) -> int:
        return self.config.latent_dim

    def trajectory(self, latents: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch views_times_5"]:
        """Position in metres and heading of each camera, see `cameras_to_trajectory`."""
        half = (self.box[1] - self.box[0]) / 2
        scale = torch.cat([half, half.new_ones(CAMERA_DIM - 3)])
        return (self.layers(latents).unflatten(1, (-1, CAMERA_DIM)) * scale).flatten(1)

    def forward(self, latents: Float[Tensor, "batch dim"], views: Tensor | None = None) -> Cameras:
        """Cameras of scenes, batch shape `[B, N]`, or of `views [B, M]` those."""
        trajectory = self.trajectory(latents)
        if views is not None:
            cameras = trajectory.unflatten(1, (-1, CAMERA_DIM))
            trajectory = cameras[torch.arange(len(cameras), device=cameras.device)[:, None], views].flatten(1)
        config = self.config
        return trajectory_to_cameras(trajectory, self.box, tuple(config.intrinsics), tuple(config.image_size))


CameraModel = CameraBank | PoseDecoder


def collection_poses(collection: SceneCollection, scene_ids: Sequence[str]) -> Float[Tensor, "scenes views 3 4"]:
    """Camera-to-world matrices of the source views of scenes; no image is read.

    Raises:
        UserInputError: if their numbers differ.
    """
    poses = [_source_cameras(collection, scene_id).camera_to_worlds for scene_id in scene_ids]
    for scene_id, cameras in zip(scene_ids, poses, strict=True):
        if len(cameras) != len(poses[0]):
            raise UserInputError(
                f"Scene {scene_ids[0]} of {collection.root} has {len(poses[0])} source views, but {scene_id} has "
                f"{len(cameras)}: give all scenes the same number."
            )
    return torch.stack(poses)


def collection_intrinsics(collection: SceneCollection) -> Intrinsics:
    """fx, fy, cx, cy in pixels of the first source view of the first training scene."""
    cameras = _source_cameras(collection, collection.split("train")[0])
    fx, fy, cx, cy = (float(getattr(cameras, name)[0]) for name in ("fx", "fy", "cx", "cy"))
    return fx, fy, cx, cy


def _source_cameras(collection: SceneCollection, scene_id: str) -> Cameras:
    transforms = read_transforms(collection.scene_dir(scene_id))
    return transforms.cameras(transforms.source_names, collection.image_size)


def level_poses(
    num_poses: int, num_cameras: int, sides: Sequence[float], generator: torch.Generator
) -> Float[Tensor, "scenes views 3 4"]:
    """A prior that knows no camera of the data: near the origin, level, looking evenly around from a random yaw."""
    spread = LEVEL_SPREAD * torch.tensor(sides)
    positions = torch.randn(num_poses, num_cameras, 3, generator=generator) * spread
    first = torch.rand(num_poses, 1, generator=generator)
    yaw = 2 * math.pi * (first + torch.arange(num_cameras) / num_cameras)
    return look_along(positions.flatten(0, 1), yaw.flatten(), torch.zeros(yaw.numel())).unflatten(0, yaw.shape)
