"""Features of videos for the Frechet video distance (FVD, Unterthiner et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.errors import UserInputError
from nfldm_ns.pretrained.i3d import INPUT_SIZE, MIN_FRAMES

STANDARD_FRAMES = 16


@torch.inference_mode()
def extract_video_features(
    network: nn.Module, clips: Iterable[Float[Tensor, "*batch frames 3 height width"]], batch_size: int = 1
) -> Float[Tensor, "clips 400"]:
    """I3D logits of all clips, on the CPU in float64; FVD is `metrics.frechet_distance` of two such sets.

    Frames are rounded to 8 bits, so that renders and stored videos are treated alike, and brought to 224 x 224 by
    antialiased bilinear interpolation without keeping their proportions, as is usual for FVD. All clips that are
    compared should have the same number of frames. One clip of 16 frames takes about 1.2 s of one CPU core.

    Args:
        network: from `weights.load_i3d`; clips are moved to its device.
        clips: sRGB in [0, 1], of any batch shape; an iterator keeps memory small. 16 frames are the standard.
        batch_size: clips that pass through the network at once; changes nothing but speed and memory.

    Raises:
        UserInputError: if a clip has fewer than 10 frames.
        ValueError: if there are no clips.
    """
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    features = []
    for batch in clips:
        if batch.shape[-4] < MIN_FRAMES:
            raise UserInputError(
                f"A video of {batch.shape[-4]} frames is too short for FVD: give clips of at least {MIN_FRAMES} "
                f"frames, best of {STANDARD_FRAMES}."
            )
        for part in batch.reshape(-1, *batch.shape[-4:]).split(batch_size):
            features.append(network(network_input(part.to(device))).cpu().double())
    if not features:
        raise ValueError("there are no clips to extract features from")
    return torch.cat(features)


def network_input(clips: Float[Tensor, "batch frames 3 height width"]) -> Float[Tensor, "batch 3 frames 224 224"]:
    """Clips in [0, 1] of any size as I3D takes them: 224 x 224 pixels, in [-1, 1]."""
    frames = clips.float().clamp(0, 1).mul(255).round().flatten(0, 1)
    size = (INPUT_SIZE, INPUT_SIZE)
    if frames.shape[-2:] != size:
        frames = F.interpolate(frames, size, mode="bilinear", align_corners=False, antialias=True)
    return (frames / 127.5 - 1).unflatten(0, clips.shape[:2]).transpose(1, 2).contiguous()
