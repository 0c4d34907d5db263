"""Rendering on the CPU: rays that skip empty and hidden space against the plain way, and against a small NeRF field.

    python -m benchmarks.bench.render_cpu

The scene is 32 x 128 x 128 voxels of 32 features (as in the preset `paper`, with its 128 samples per ray), made of a
maze that `vizdoom-stage1` encoded (`data/mazes`, or where that is not, a room that `vizdoom-rooms` samples): upsampled,
channels twice. Its rays are those that stage 1 asks for a picture of 256 x 256 pixels at a stride of 2, 128 x 128;
beside them are 256 x 256, and what `vizdoom-stage1` itself asks for this camera. All ways have the same decoder, run in
the same way, and take turns in one process. Times are of the processor, so one thread is best where other work runs:
threads that wait for each other count as busy.
"""

from __future__ import annotations

import json
import resource
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor, nn

from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder
from nfldm_ns.autoencoder.decoder import ImageDecoder
from nfldm_ns.autoencoder.lifting import box_exit_depth, occupancy_along_rays
from nfldm_ns.autoencoder.renderer import render_feature_maps
from nfldm_ns.diffusion.pipeline import load_pipeline, scene_generators
from nfldm_ns.generated.cameras import look_along
from nfldm_ns.models import GENERATOR, SCENE_AUTOENCODER, resolve_model
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import camera_rays, make_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid, sample_voxels

KEY = "render_cpu"
SHAPE = (32, 128, 128)
SAMPLES, NEAR, SIZE, FIELD_OF_VIEW = 128, 0.1, 256, 1.25
MAZES = Path("data/mazes")
RAYS_AT_ONCE = 2048  # of the plain way, so that its samples take less than 1 GiB
REPEATS = 3


@torch.no_grad()
def scene() -> tuple[VoxelGrid, str]:
    """The scene, and what it is made of."""
    if not MAZES.is_dir():
        return enlarged(sampled_room(), SHAPE), "sampled room"
    collection = SceneCollection.open(MAZES)
    batch = collection.batch([collection.load_scene(collection.split("test")[0])])
    grid = load_scene_autoencoder(resolve_model(SCENE_AUTOENCODER)).eval().encode(batch.source)
    return enlarged(grid, SHAPE), "maze"


def sampled_room(name: str = GENERATOR, device: str = "cpu") -> VoxelGrid:
    """A room of a generator."""
    pipeline = load_pipeline(resolve_model(name)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    grids = pipeline(1, scene_generators(0, 1), num_inference_steps=10).grids
    assert grids is not None
    return grids


def enlarged(grid: VoxelGrid, shape: tuple[int, int, int], channels: int | None = None) -> VoxelGrid:
    """A grid with finer voxels, and its features twice, or as often as `channels` of them need."""
    voxels = torch.cat([grid.density, grid.features], dim=1)
    voxels = F.interpolate(voxels, size=shape, mode="trilinear", align_corners=False)
    features = torch.cat([voxels[:, 1:], voxels[:, 1:].flip(1)], dim=1)
    while channels is not None and features.shape[1] < channels:
        features = torch.cat([features, features], dim=1)
    return VoxelGrid(voxels[:, :1].contiguous(), features[:, :channels].contiguous(), grid.aabb)


def camera(size: int = SIZE, yaw: float = 0.3) -> Cameras:
    pose = look_along(torch.zeros(1, 3), torch.tensor([yaw]), torch.zeros(1))
    focal = size / FIELD_OF_VIEW
    return make_cameras(pose, focal, focal, size / 2, size / 2, size, size)[None, ...]


def density_and_features(grid: VoxelGrid) -> Tensor:
    """`[1, 1 + C, Z, Y, X]`, as the plain way looks them up together."""
    return torch.cat([grid.density, grid.features], dim=1)


def plain(
    voxels: Tensor, grid: VoxelGrid, cameras: Cameras, rays: int, samples: int = SAMPLES, at_once: int = RAYS_AT_ONCE
) -> tuple[Tensor, Tensor]:
    """Uniform samples, and all channels of all of them at once by `grid_sample`.

    Args:
        voxels: `density_and_features` of the grid.
        at_once: rays.
    """

    def look_up(points: Tensor) -> Tensor:
        return sample_voxels(voxels, grid.normalise(points[None]))[0]

    return _in_chunks(cameras, rays, grid.aabb, look_up, samples, at_once)


def _in_chunks(
    cameras: Cameras,
    size: int,
    aabb: Tensor,
    look_up: Callable[[Tensor], Tensor],
    samples: int = SAMPLES,
    at_once: int = RAYS_AT_ONCE,
) -> tuple[Float[Tensor, "1 channels h w"], Float[Tensor, "1 1 h w"]]:
    origins, directions = camera_rays(cameras, size, size)
    parts = []
    for chunk in directions.reshape(-1, 3).split(at_once):
        origin = origins.reshape(1, 3).expand_as(chunk)
        enter, leave = box_exit_depth(origin, chunk, aabb)
        start = torch.minimum(enter.clamp(min=NEAR), leave)
        step = (leave - start) / samples
        depth = start[:, None] + step[:, None] * (torch.arange(samples, device=chunk.device) + 0.5)
        values = look_up(origin[:, None] + chunk[:, None] * depth[..., None])
        weights, _ = occupancy_along_rays(values[..., 0], (step * chunk.norm(dim=-1))[:, None])
        features = (weights[..., None] * values[..., 1:]).sum(-2)
        parts.append(torch.cat([features, weights.sum(-1, keepdim=True)], dim=-1))
    image = torch.cat(parts).T.reshape(1, -1, size, size)
    return image[:, :-1], image[:, -1:]


def ours(
    grid: VoxelGrid, cameras: Cameras, rays: int, skipping: bool = True, samples: int = SAMPLES
) -> tuple[Tensor, Tensor]:
    maps = render_feature_maps(grid, cameras, rays, rays, NEAR, samples, None, skipping)
    return maps.features[0], maps.accumulation[0]


def small_field() -> nn.Module:
    """What a user of nerfstudio would take for a bounded scene: a tri-plane encoding and a small network, untrained."""
    from nerfstudio.field_components.encodings import TriplaneEncoding

    plane = TriplaneEncoding(resolution=SHAPE[2], num_components=32, reduce="sum")
    return nn.Sequential(plane, nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))


def field_view(field: nn.Module, grid: VoxelGrid, cameras: Cameras, rays: int) -> tuple[Tensor, Tensor]:
    """Colours of a field at the rays of the picture itself: it needs no decoder."""

    def look_up(points: Tensor) -> Tensor:
        values = field(grid.normalise(points).reshape(-1, 3)).reshape(*points.shape[:-1], 4)
        return torch.cat([F.softplus(values[..., :1]), values[..., 1:]], dim=-1)

    return _in_chunks(cameras, rays, grid.aabb, look_up)


class PeakMemory:
    """The most memory of the process in a block, and beyond what there was before, in bytes, looked at every 5 ms."""

    def __enter__(self) -> PeakMemory:
        self._process, self._ended = psutil.Process(), threading.Event()
        self._before = self._process.memory_info().rss
        self.bytes = 0
        self.resident = self._before
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self.resident = max(self.resident, self._process.memory_info().rss)
            self.bytes = self.resident - self._before

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def bandwidth() -> float:
    """Bytes per second that copies of large arrays read and write."""
    source = torch.zeros(2**25)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / min(_seconds(lambda: target.copy_(source)) for _ in range(5))


def matrix_rate() -> float:
    """FLOPs per second of products of large matrices."""
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / min(_seconds(lambda: a @ a) for _ in range(5))


def _seconds(work: Callable[[], Any]) -> float:
    """CPU time over the threads: other work on the machine hardly changes it."""
    begun = time.process_time()
    work()
    return (time.process_time() - begun) / torch.get_num_threads()


def decoder_flops(decoder: nn.Module, features: Tensor, accumulation: Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        decoder(features, accumulation)
    return counter.get_total_flops()


@torch.no_grad()
def measure(repeats: int = REPEATS, all_rays: bool = False) -> dict[str, Any]:
    """`ratio`: plain by ours; `psnr` between both (dB); `peak_gib` of ours, beyond what the process had,
    and `resident_gib` with it; `of_limit`: the least time by ours.

    The least time is what the bytes of V take at the measured bandwidth, and the decoder's FLOPs at the measured rate.

    Args:
        all_rays: also other numbers of rays, and the field.
    """
    torch.manual_seed(0)
    grid, name = scene()
    decoder = ImageDecoder(SHAPE[0], 2, (64, 32), 1).eval().to(memory_format=torch.channels_last)
    nn.init.normal_(decoder.out.weight, std=0.05)  # as an untrained one adds next to no detail
    result: dict[str, Any] = {"scene": name, "threads": torch.get_num_threads()}
    result |= measure_rays(grid, decoder, SIZE // 2, repeats)
    if all_rays:
        shipped = load_scene_autoencoder(resolve_model(SCENE_AUTOENCODER))._ray_grid(camera())[0]
        for rays in (SIZE, shipped):
            result[f"rays_{rays}"] = measure_rays(grid, decoder, rays, repeats)
        field = small_field()
        result["seconds"]["field"] = _seconds(lambda: field_view(field, grid, camera(), SIZE))
        result["ratio_field"] = result["seconds"]["field"] / result["seconds"]["ours"]
    result["process_peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return result


def measure_rays(grid: VoxelGrid, decoder: nn.Module, rays: int, repeats: int) -> dict[str, Any]:
    """What `measure` says of `rays` x `rays` rays."""
    cameras, voxels = camera(), density_and_features(grid)

    def decoded(maps: tuple[Tensor, Tensor]) -> Tensor:
        return (decoder(maps[0].contiguous(memory_format=torch.channels_last), maps[1]) / 2 + 0.5).clamp(0, 1)

    shown = {
        "plain": lambda: decoded(plain(voxels, grid, cameras, rays)),
        "dense": lambda: decoded(ours(grid, cameras, rays, False)),
        "ours": lambda: decoded(ours(grid, cameras, rays)),
    }
    if rays > SIZE // 2:
        del shown["dense"]  # more than 3 GiB
    with PeakMemory() as peak:
        picture = shown["ours"]()  # makes what is then kept for all views of the scene
    error = (picture - shown["plain"]()).square().mean()
    times: dict[str, list[float]] = {way: [] for way in shown}
    for _ in range(repeats):
        for way, show in shown.items():
            times[way].append(_seconds(show))
    seconds = {way: statistics.median(values) for way, values in times.items()}
    maps = ours(grid, cameras, rays)
    seconds["decoder"] = statistics.median(_seconds(lambda: decoded(maps)) for _ in range(repeats))
    least = voxels.numel() * 4 / bandwidth() + decoder_flops(decoder, *maps) / matrix_rate()
    return {
        "ratio": seconds["plain"] / seconds["ours"],
        "ratio_dense": seconds["dense"] / seconds["ours"] if "dense" in seconds else None,
        "psnr": float(-10 * error.log10()),
        "peak_gib": peak.bytes / 2**30,
        "resident_gib": peak.resident / 2**30,
        "of_limit": least / seconds["ours"],
        "seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(measure(all_rays=True), indent=1))
