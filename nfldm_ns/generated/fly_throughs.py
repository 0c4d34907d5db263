"""Short videos of scenes, real and generated ones alike, as the Frechet video distance compares them.

A collection has single views and no videos. The reference of FVD is therefore not made of recorded frames: it is
rendered from voxels that stage 1 encodes from the source views of held-out scenes. Generated scenes are rendered by
the same renderer along their sampled cameras. FVD then tells how far the layout, the content and the motion of
generated scenes are from those of encoded ones; it does not see what stage 1 loses (blur, missing detail), which both
sides share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.cameras import path_through
from nfldm_ns.scenes.views import index_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid

CAMERAS_AT_ONCE = 8

SceneAndCameras = tuple[VoxelGrid, Cameras]


def flythrough_clips(
    scene_autoencoder: SceneAutoencoder,
    scenes: Iterable[SceneAndCameras],
    num_frames: int = 16,
    clips_per_scene: int = 1,
    frames_between: int = 8,
) -> Iterator[Float[Tensor, "clips num_frames 3 height width"]]:
    """Videos along the path through each scene's cameras, scene by scene, for `extract_video_features`.

    The path is `path_through(cameras, frames_between)`: with 8 cameras that look around, it turns by 5 to 6 degrees
    per frame. A scene's clips are parts of `num_frames` frames that start evenly spaced along it, the first with the
    first camera. Clips of one scene resemble each other: many scenes with one clip each say more than the reverse.
    Rendering 16 frames of 64 x 64 pixels with the tiny preset takes about 0.2 s of one CPU core.

    Args:
        scene_autoencoder: stage 1, which renders all scenes, real and generated.
        scenes: voxels (batch size 1) with cameras `[N]`: encoded ones with their source cameras, sampled ones with
            their sampled cameras.

    Yields:
        clips of one scene on the CPU, in [0, 1], at the cameras' image size.

    Raises:
        UserInputError: if the path is shorter than one clip.
    """
    for grid, cameras in scenes:
        path = path_through(cameras, frames_between)
        starts = _starts(path.shape[0], num_frames, clips_per_scene)
        yield torch.stack(
            [_render(scene_autoencoder, grid, index_cameras(path, slice(i, i + num_frames))) for i in starts]
        )


def _starts(path_length: int, num_frames: int, num_clips: int) -> list[int]:
    spare = path_length - num_frames
    if spare < 0:
        raise UserInputError(
            f"The path through a scene's cameras has {path_length} frames, but a clip needs {num_frames}: "
            "ask for more frames between cameras, or for shorter clips."
        )
    return [spare * i // max(1, num_clips - 1) for i in range(num_clips)]


@torch.inference_mode()
def _render(
    scene_autoencoder: SceneAutoencoder, grid: VoxelGrid, path: Cameras
) -> Float[Tensor, "frames 3 height width"]:
    frames = []
    for first in range(0, path.shape[0], CAMERAS_AT_ONCE):
        chunk = index_cameras(path, (None, slice(first, first + CAMERAS_AT_ONCE)))
        frames.append(scene_autoencoder.render(grid, chunk).rgb[0].clamp(0, 1).cpu())
    return torch.cat(frames)
