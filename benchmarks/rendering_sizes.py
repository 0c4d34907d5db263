"""The same camera at five sizes, other cameras, a fly-through, and how much it flickers.

    python benchmarks/rendering_sizes.py --load-config <run of stage 1 or generated scene>/config.yml [--output ...]

Writes `sizes.png` (one camera at 64 to 1024 pixels, all shown at one size; below it a zoomed and a wide view and a
panorama of 360 degrees) and `flight.mp4`. Prints the time per picture by size, how far larger pictures, made smaller,
are from the one at 64 pixels, and for several ways of rendering, in units of 1/255, over paths of small steps:

- swimming: mean difference of a frame from the next one, warped onto it by the rendered depth;
- jitter: mean second difference of three frames in a row, that is what does not change evenly with the camera;
- contrast: mean difference of neighbouring pixels at 64 pixels, because blur flickers less, too.

"trained" is `SceneAutoencoder.render`, as in training; "steady" is what the viewer and `ns-render` show.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mediapy
import torch
import torch.nn.functional as F
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image
from torch import Tensor

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.generated.cameras import fly_through, look_along
from nfldm_ns.plugin.panorama import Panorama, panoramic_pictures, render_panorama
from nfldm_ns.plugin.pictures import render_perspective
from nfldm_ns.plugin.voxel_model import VoxelModel
from nfldm_ns.scenes.views import camera_rays, make_cameras, resize_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from shared.running import run

SIZES = (64, 128, 256, 512, 1024)
SHOWN = 160  # pixels of each picture in the sheet
Pictures = dict[str, Tensor]


@dataclass
class Options:
    """What to render."""

    load_config: Path
    """config.yml of a run of stage 1 or of a generated scene"""
    output: Path = Path("rendering")
    """folder to write"""
    camera: int = 0
    """which of the scene's own cameras to look through"""
    frames: int = 9
    """of each path on which flicker is measured"""
    flight_frames: int = 120
    """of the fly-through"""
    flight_size: int = 256
    """width and height of the fly-through"""
    threads: int = 1
    """CPU threads"""


def camera_of(pose: Float[Tensor, "3 4"], size: int, zoom: float, renderer: SceneAutoencoder) -> Cameras:
    """A square camera `[1]` with the trained field of view over `zoom`."""
    focal = zoom * size * renderer.config.focal_length / renderer.image_size[1]
    return make_cameras(pose[None], focal, focal, size / 2, size / 2, size, size)


def panorama_camera(pose: Float[Tensor, "3 4"], width: int) -> Cameras:
    kind = CameraType.EQUIRECTANGULAR
    return Cameras(pose[None], width / 2, float(width // 2), width / 2, width / 4, camera_type=kind)


def paths(pose: Float[Tensor, "3 4"], frames: int) -> dict[str, Float[Tensor, "frames 3 4"]]:
    """Level paths of small steps through a camera: straight on, a turn, and both at once with a step sideways."""
    forward = -pose[:2, 2] / pose[:2, 2].norm()
    sideways = torch.stack([forward[1], -forward[0]])
    yaw = torch.atan2(forward[1], forward[0])
    along = torch.arange(frames) - (frames - 1) / 2

    def path(ahead: float, aside: float, degrees: float) -> Tensor:
        offsets = along[:, None] * (ahead * forward + aside * sideways)
        positions = pose[:, 3] + F.pad(offsets, (0, 1))
        return look_along(positions, yaw + along * math.radians(degrees), torch.zeros(frames))

    return {"3 cm ahead": path(0.03, 0, 0), "0.4 degrees": path(0, 0, 0.4), "both": path(0.02, 0.015, 0.25)}


def ways(grid: VoxelGrid, renderer: SceneAutoencoder) -> dict[str, Callable[[Cameras], Pictures]]:
    """Ways to render a camera `[1]`."""

    def trained(camera: Cameras, mode: str = "bilinear") -> Pictures:
        rows, columns = int(camera.height), int(camera.width)
        size = renderer.image_size
        rendered = renderer.render(grid, resize_cameras(camera, *size)[None, ...])
        rgb = F.interpolate(rendered.rgb[0], size=(rows, columns), mode=mode).clamp(0, 1)
        depth = F.interpolate(rendered.depth[0], size=(rows, columns), mode="bilinear")
        _, directions = camera_rays(camera, rows, columns)
        depth = depth[0].movedim(0, -1) * directions[0].norm(dim=-1, keepdim=True)
        return {"rgb": rgb[0].movedim(0, -1), "depth": depth}

    def steady(camera: Cameras, **options: int | None) -> Pictures:
        return render_perspective(renderer, grid, camera[None, ...], **options)

    panoramas: dict[tuple[float, ...], Panorama] = {}

    def fixed_directions(camera: Cameras) -> Pictures:
        place = camera.camera_to_worlds[0, :, 3]
        key = tuple(place.tolist())
        if key not in panoramas:
            panoramas[key] = render_panorama(renderer, grid, place)
        return panoramic_pictures(panoramas[key], camera)

    few = renderer.config.num_feature_samples
    return {
        "trained": trained,
        "trained, resized to the nearest pixel": partial(trained, mode="nearest"),
        "trained, resized by cubics": partial(trained, mode="bicubic"),
        "few features, decoded once": partial(steady, num_feature_samples=few, phases=1),
        "all features, decoded once": partial(steady, phases=1),
        "few features, mean of phases": partial(steady, num_feature_samples=few),
        "steady": steady,
        "steady, rays at fixed directions": fixed_directions,
    }


def flicker(frames: list[Pictures], cameras: list[Cameras]) -> tuple[float, float, float]:
    """Swimming, jitter and contrast of a path, see above."""
    swimming = [
        warped_difference(*pair) for pair in zip(frames[:-1], cameras[:-1], frames[1:], cameras[1:], strict=True)
    ]
    rgb = torch.stack([frame["rgb"] for frame in frames])
    jitter = rgb.diff(n=2, dim=0).abs().mean()
    contrast = rgb.diff(dim=2).abs().mean() * (rgb.shape[2] / 64)
    return 255 * sum(swimming) / len(swimming), 255 * float(jitter), 255 * float(contrast)


def warped_difference(frame: Pictures, camera: Cameras, other: Pictures, other_camera: Cameras) -> float:
    """Mean absolute difference of a frame from another one where both see the same surface."""
    height, width = frame["rgb"].shape[:2]
    rays = camera.generate_rays(camera_indices=0)
    points = rays.origins + rays.directions * frame["depth"]
    pose = other_camera.camera_to_worlds[0]
    offset = points - pose[:, 3]
    local = offset @ pose[:, :3]
    x, y = (local[..., i] / -local[..., 2] * sign for i, sign in ((0, 1), (1, -1)))
    x = (x * other_camera.fx + other_camera.cx) * 2 / width - 1
    y = (y * other_camera.fy + other_camera.cy) * 2 / height - 1
    where = torch.stack([x, y], dim=-1)[None]
    colours, depth = (
        F.grid_sample(other[name].movedim(-1, 0)[None], where, mode=mode, align_corners=False)[0].movedim(0, -1)
        for name, mode in (("rgb", "bicubic"), ("depth", "bilinear"))
    )
    distance = offset.norm(dim=-1, keepdim=True)
    same = ((depth - distance).abs() < 0.1 * distance)[..., 0] & (where[0].abs().amax(-1) < 0.95)
    return float((colours - frame["rgb"]).abs()[same].mean())


def shown_at(picture: Float[Tensor, "h w 3"], height: int, width: int) -> Float[Tensor, "height width 3"]:
    shrinks = picture.shape[0] > height
    mode = "bilinear" if shrinks else "nearest"
    image = F.interpolate(picture.movedim(-1, 0)[None], size=(height, width), mode=mode, antialias=shrinks)
    return image[0].movedim(0, -1)


def sheet(sizes: list[Tensor], zoomed: Tensor, wide: Tensor, panorama: Tensor) -> Tensor:
    """All pictures in one: sizes above, other cameras below."""
    above = torch.cat([shown_at(picture, SHOWN, SHOWN) for picture in sizes], dim=1)
    below = [shown_at(zoomed, SHOWN, SHOWN), shown_at(wide, SHOWN, 2 * SHOWN), shown_at(panorama, SHOWN, 2 * SHOWN)]
    return torch.cat([above, torch.cat(below, dim=1)], dim=0)


def save(picture: Float[Tensor, "h w 3"], path: Path) -> None:
    Image.fromarray((picture * 255).round().byte().cpu().numpy()).save(path)


def timed(model: VoxelModel, camera: Cameras) -> tuple[Tensor, str]:
    """The colours of a camera, and the shorter of two times to render it."""
    times = []
    for _ in range(2):
        begun, cpu_begun = time.perf_counter(), time.process_time()
        rgb = model.get_outputs_for_camera(camera)["rgb"].cpu()
        times.append((time.perf_counter() - begun, time.process_time() - cpu_begun))
    wall, cpu = (1000 * value for value in min(times))
    return rgb, f"{wall:6.0f} ms ({cpu:.0f} ms of CPU time)"


def show_sizes(model: VoxelModel, pose: Float[Tensor, "3 4"], output: Path) -> None:
    """Prints times and differences between sizes, and writes the sheet."""
    pictures: dict[int, Tensor] = {}
    for size in SIZES:
        pictures[size], cost = timed(model, camera_of(pose, size, 1, model.renderer()))
        shrunk = F.avg_pool2d(pictures[size].movedim(-1, 0), size // SIZES[0]).movedim(0, -1)
        difference = 255 * float((shrunk - pictures[SIZES[0]]).abs().mean())
        print(f"{size:5d} pixels: {cost}, {difference:.2f} / 255 from {SIZES[0]} pixels")
    others = {
        "zoomed 3 times, 256 x 256": camera_of(pose, 256, 3, model.renderer()),
        "130 degrees, 512 x 256": make_cameras(pose[None], 120.0, 120.0, 256.0, 128.0, 256, 512),
        "panorama, 768 x 384": panorama_camera(pose, 768),
    }
    views = []
    for name, camera in others.items():
        rgb, cost = timed(model, camera)
        views.append(rgb)
        print(f"{name}: {cost}")
    save(sheet([pictures[size] for size in SIZES], *views), output / "sizes.png")


def measure_flicker(model: VoxelModel, pose: Float[Tensor, "3 4"], frames: int) -> None:
    print(f"{'':40s} {'path':12s} {'size':>4s} swimming jitter contrast")
    for name, way in ways(model.shown_grid(), model.renderer()).items():
        for path, poses in paths(pose.cpu(), frames).items():
            for size in (64, 512):
                cameras = [camera_of(p, size, 1, model.renderer()).to(pose.device) for p in poses]
                numbers = flicker([way(camera) for camera in cameras], cameras)
                columns = "{:8.2f} {:6.2f} {:8.2f}".format(*numbers)
                print(f"{name:40s} {path:12s} {size:4d} {columns}", flush=True)


def write_flight(model: VoxelModel, cameras: Cameras, options: Options) -> None:
    path = fly_through(cameras, options.flight_frames)
    frames = [
        model.get_outputs_for_camera(camera_of(p, options.flight_size, 1, model.renderer()))["rgb"].cpu().numpy()
        for p in path.camera_to_worlds
    ]
    mediapy.write_video(options.output / "flight.mp4", frames, fps=24)


@torch.no_grad()
def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where ffmpeg is
    _, pipeline, _, _ = eval_setup(options.load_config)
    model, cameras = pipeline.model, pipeline.datamanager.train_dataset.cameras.to(pipeline.device)
    pose = cameras.camera_to_worlds[options.camera]
    options.output.mkdir(parents=True, exist_ok=True)
    show_sizes(model, pose, options.output)
    write_flight(model, cameras, options)
    measure_flicker(model, pose, options.frames)


if __name__ == "__main__":
    run(main, Options, __doc__)
