"""Where a step of stage 1 spends its time, and what its shortcuts gain over the plain way, in one run.

    python benchmarks/stage1.py [--preset tiny] [--threads 2] [--repeats 5]

Prints the median time of each part of a training step at the size of a preset, its peak memory, and ratios:

- lifting by one scatter over all views and depths, against a Python loop over views and depths;
- features at the few samples that matter, against features at all samples;
- rays at the feature maps' resolution, against rays through every pixel;
- the perceptual distance and the discriminator on the preset's few views, against both on all views;
- a whole step, and one without the perceptual network, against the plain way: lifting in that loop, a ray through every
  pixel, features at all samples.

Needs the weights of LPIPS (`nfldm-weights get lpips-vgg`).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import torch
import torch.nn.functional as F
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.autoencoder import scene_autoencoder
from nfldm_ns.autoencoder.lifting import EPS, SEEN, fill_holes, frustum_voxels, fuse_frustums
from nfldm_ns.autoencoder.losses import StageOneLossConfig, make_discriminator, stage_one_losses
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.renderer import FeatureMaps, render_feature_maps
from nfldm_ns.autoencoder.scene_autoencoder import RenderedViews, SceneAutoencoder
from nfldm_ns.method_configs.presets import SCENE_AUTOENCODER
from nfldm_ns.method_configs.scene_ae import scene_autoencoder_config
from nfldm_ns.pretrained.weights import load_lpips
from nfldm_ns.reports.resources import GIB, ResourceMeter, resident_bytes
from nfldm_ns.scenes.views import Views, camera_rays, make_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from shared.comparisons import require_choice, use_threads
from shared.running import run


@dataclass
class Options:
    """How to measure."""

    preset: str = "tiny"
    """sizes of the networks, the images and the batch"""
    threads: int = 2
    """CPU threads"""
    repeats: int = 5
    """runs of each part; the median counts"""


def surround_cameras(count: int, size: int = 64) -> Cameras:
    """Level cameras `[1, count]` looking outwards all around."""
    poses = []
    for i in range(count):
        angle = 2 * math.pi * i / count
        forward = torch.tensor([math.cos(angle), math.sin(angle), 0.0])
        right = torch.tensor([math.sin(angle), -math.cos(angle), 0.0])
        poses.append(torch.stack([right, torch.tensor([0.0, 0.0, 1.0]), -forward, torch.zeros(3)], dim=1))
    focal = size / 2 / 0.625
    return make_cameras(torch.stack(poses)[None], focal, focal, size / 2, size / 2, size, size)


def random_views(scenes: int, count: int, size: int) -> Views:
    """Scenes of noise between 3 and 6 metres away."""
    cameras, shape = surround_cameras(count, size), (count, 1, size, size)
    one = [Views(cameras[0], torch.rand(count, 3, size, size), 3 + 3 * torch.rand(shape)) for _ in range(scenes)]
    return Views.stack(one)


# The plain way


def fuse_in_a_loop(
    density: Tensor,
    features: Tensor,
    cameras: Cameras,
    centres: Tensor,
    widths: Tensor,
    aabb: Tensor,
    shape: tuple[int, int, int],
    fusion: str = "occupancy",
    splatting: str = "nearest",
    attention: Tensor | None = None,
    valid: Tensor | None = None,
) -> VoxelGrid:
    """What `fuse_frustums` gives with the fusions "occupancy" and "attention", view by view and depth by depth."""
    if fusion == "mean" or splatting == "trilinear":
        raise ValueError(f"there is no loop for the fusion {fusion!r} with the splatting {splatting!r}")
    batch, views, bins, h, w = density.shape
    channels, num_voxels = features.shape[2], math.prod(shape)
    origins, directions = camera_rays(cameras, h, w)
    lengths = directions.norm(dim=-1)
    sums = [density.new_zeros(num_voxels * batch) for _ in range(3)]
    feature_sum = density.new_zeros(num_voxels * batch, channels)
    for scene in range(batch):
        for view in range(views):
            transmittance = density.new_ones(h, w)
            phi = features[scene, view].permute(1, 2, 0).reshape(-1, channels)
            share = 1.0 if attention is None else attention[scene, view].exp()
            for depth in range(bins):
                ray = origins[scene, view], directions[scene, view], centres[depth : depth + 1]
                ((index, inside),) = frustum_voxels(*ray, aabb, shape)
                index, inside = index.flatten() + scene * num_voxels, inside[..., 0]
                inside = inside if valid is None else inside * valid[scene, view]
                sigma = density[scene, view, depth]
                through = torch.exp(-sigma * widths[depth] * lengths[scene, view])
                occupancy = transmittance * (1 - through)
                weight = (share * transmittance * inside).flatten()
                kept = (share * occupancy * inside * (occupancy > SEEN)).flatten()
                for total, values in zip(sums, (weight * sigma.flatten(), weight, kept), strict=True):
                    total.index_add_(0, index, values)
                feature_sum.index_add_(0, index, phi * kept[:, None])
                transmittance = transmittance * through

    def per_voxel(*values: Tensor) -> Tensor:
        sums = torch.cat(values, dim=-1).reshape(batch, *shape, -1)
        return fill_holes(sums) if splatting == "filled" else sums

    densities = per_voxel(sums[0][:, None], sums[1][:, None])
    fused = per_voxel(feature_sum, sums[2][:, None])
    return VoxelGrid(
        (densities[..., :1] / (densities[..., 1:] + EPS)).movedim(-1, 1),
        (fused[..., :-1] / (fused[..., -1:] + SEEN)).movedim(-1, 1),
        aabb,
    )


def render_every_pixel(model: SceneAutoencoder, grid: VoxelGrid, cameras: Cameras) -> RenderedViews:
    """A ray through every pixel, features at all its samples; their means over cells enter the decoder."""
    height, width = model.image_size
    stride = model.config.feature_stride
    maps = model.feature_maps(grid, cameras, height, width, None)
    fields = (maps.features, maps.depth, maps.accumulation, maps.exit_depth, maps.directions, maps.background)
    cells = (F.avg_pool2d(values.flatten(0, 1), stride).unflatten(0, cameras.shape) for values in fields)
    return model.decode(FeatureMaps(*cells), height, width)


# A step


class Step:
    """One training step of a preset on noise, part by part.

    Args:
        device: "cpu" or "cuda".
        precision: "fp32" or "bf16", of the auto-encoder.
        perceptual: its network; by default LPIPS, in single precision.
        scenes: per batch; None for as many as the preset has.
    """

    def __init__(
        self,
        preset_name: str,
        device: str = "cpu",
        precision: str = "fp32",
        perceptual: PerceptualNetwork | None = None,
        scenes: int | None = None,
    ) -> None:
        preset = SCENE_AUTOENCODER[preset_name]
        size, scenes = preset.image_size, scenes or preset.sampling["scenes_per_batch"]
        focal = size / 2 / 0.625
        self.device, self.precision = device, precision
        model = SceneAutoencoder(**preset.network, image_size=(size, size), focal_length=focal)
        self.model = model.to(device).pack_channels_last()
        self.source = random_views(scenes, preset.num_source_views, size).to(device)
        self.target = random_views(scenes, preset.sampling["num_target_views"], size).to(device)
        self.loss = StageOneLossConfig(**preset.loss)
        self.perceptual = (perceptual or PerceptualNetwork(load_lpips("vgg"))).to(device)
        self.discriminator = make_discriminator(self.loss, model.image_size)
        if self.discriminator is not None:
            self.discriminator.to(device)
        settings = scene_autoencoder_config("benchmark", preset).optimizers
        modules = {"autoencoder": self.model, "discriminator": self.discriminator}
        self.optimisers = [
            settings[name]["optimizer"].setup(list(module.parameters())) for name, module in modules.items() if module
        ]

    def run(self, loss: StageOneLossConfig, adversarial: bool = True, plain: bool = False) -> dict[str, float]:
        """Milliseconds by part of one step."""
        times: dict[str, float] = {}
        begun = time.perf_counter()

        def lap(name: str) -> None:
            if self.device == "cuda":
                torch.cuda.synchronize()
            times[name] = 1000 * (time.perf_counter() - begun - sum(times.values()) / 1000)

        losses = self.losses(loss, adversarial, plain, lap)
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        lap("backward")
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        lap("optimiser")
        times["whole step"] = sum(times.values())
        return times

    def losses(
        self,
        loss: StageOneLossConfig,
        adversarial: bool = True,
        plain: bool = False,
        lap: Callable[[str], None] = lambda name: None,
    ) -> dict[str, Tensor]:
        """The losses of a step; `lap` is told when a part is done."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            if plain:
                with mock.patch.object(scene_autoencoder, "fuse_frustums", fuse_in_a_loop):
                    grid = self.model.encode(self.source)
            else:
                grid = self.model.encode(self.source)
            lap("encode, lift and fuse")
            cameras = self.target.cameras
            rendered = render_every_pixel(self.model, grid, cameras) if plain else self.model.render(grid, cameras)
            lap("render and decode")
        judge = self.discriminator if adversarial else None
        losses = stage_one_losses(loss, rendered, self.target, grid, self.perceptual, judge)
        lap("losses")
        return losses


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """Median wall time in milliseconds after one warm-up."""
    function()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times)


def alternating_medians(
    first: Callable[[], dict[str, float]], second: Callable[[], dict[str, float]], repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Medians by part of two functions that take turns, after one warm-up: other work then slows both alike."""
    first(), second()
    pairs = [(first(), second()) for _ in range(repeats)]
    medians = [
        {name: statistics.median(run[name] for run in runs) for name in runs[0]} for runs in zip(*pairs, strict=True)
    ]
    return medians[0], medians[1]


def peak_gib(function: Callable[[], object]) -> tuple[float, float]:
    """Resident memory in GiB before a call, and the largest during it."""
    before = resident_bytes() / GIB
    with ResourceMeter(interval_s=0.005) as meter:
        function()
    return before, meter.use.peak_rss_gib


def time_forward_parts(step: Step, repeats: int) -> dict[str, float]:
    """Milliseconds of the parts of the forward pass, the plain way too."""
    model, views, count = step.model, step.source, f"{step.target.shape[1]} views"
    rows, columns = (size // model.config.feature_stride for size in model.image_size)
    grid = model.encode(views)
    logits, features, extra = model._encode_images(views)
    density = F.softplus(logits - 3).unflatten(0, views.shape)
    entries = density, features.unflatten(0, views.shape), views.cameras, model.bin_centres, model.bin_widths
    attention = extra[:, -1].unflatten(0, views.shape) if model.config.fusion == "attention" else None
    way = model.config.fusion, model.config.splatting, attention

    def render(factor: int, feature_samples: int | None) -> None:
        size, config = (factor * rows, factor * columns), model.config
        render_feature_maps(grid, step.target.cameras, *size, config.near, config.num_samples, feature_samples)

    parts = {
        f"image encoder, {views.shape[1]} views": lambda: model._encode_images(views),
        "lift and fuse": lambda: fuse_frustums(*entries, model.aabb, model.grid_shape, *way),
        "lift and fuse, loop over views and depths": lambda: fuse_in_a_loop(
            *entries, model.aabb, model.grid_shape, *way
        ),
        f"volume rendering, {count}": lambda: render(1, model.config.num_feature_samples),
        "volume rendering, features at all samples": lambda: render(1, None),
        "volume rendering, a ray per pixel": lambda: render(
            model.config.feature_stride, model.config.num_feature_samples
        ),
        f"render and decode, {count}": lambda: model.render(grid, step.target.cameras),
    }
    return {name: median_ms(part, repeats) for name, part in parts.items()}


def main(options: Options) -> None:
    require_choice("preset", options.preset, SCENE_AUTOENCODER)
    use_threads(options.threads)
    torch.manual_seed(0)
    step = Step(options.preset)
    loss, repeats = step.loss, options.repeats
    memory = peak_gib(lambda: step.run(loss))  # first, because freed memory stays with the process
    plain_memory = peak_gib(lambda: step.run(loss, plain=True))
    own, plain = alternating_medians(lambda: step.run(loss), lambda: step.run(loss, plain=True), repeats)
    colours = replace(loss, lpips_mult=0)
    bare, plain_bare = alternating_medians(
        lambda: step.run(colours, adversarial=False), lambda: step.run(colours, adversarial=False, plain=True), repeats
    )
    steps = {
        "step without the discriminator": lambda: step.run(loss, adversarial=False),
        "step, perceptual network on all views": lambda: step.run(replace(loss, lpips_views=None)),
    }
    times = {name: median_ms(part, repeats) for name, part in steps.items()}
    with torch.no_grad():
        times.update(time_forward_parts(step, repeats))

    print(f"preset {options.preset}, {options.threads} threads, medians of {repeats}\n")
    print(f"{'part of a step':45s} {'ms':>8s} {'share':>6s} {'plain way, ms':>14s}")
    for name, value in own.items():
        print(f"{name:45s} {value:8.1f} {value / own['whole step']:6.0%} {plain[name]:14.1f}")
    print("\nalone:")
    times["step without the perceptual network"] = bare["whole step"]
    for name, value in times.items():
        print(f"{name:45s} {value:8.1f} ms")
    for name, (before, peak) in {"a step": memory, "the plain step": plain_memory}.items():
        print(f"peak memory of {name}: {peak:.2f} GiB resident, {peak - before:.2f} GiB more than before it")
    print()
    count = f"{step.target.shape[1]} views"
    times["step"], times["plain step"] = own["whole step"], plain["whole step"]
    times["bare step"], times["plain bare step"] = bare["whole step"], plain_bare["whole step"]
    ratios = {
        "lifting, loop / one scatter": ("lift and fuse, loop over views and depths", "lift and fuse"),
        "rendering, all / few feature samples": (
            "volume rendering, features at all samples",
            f"volume rendering, {count}",
        ),
        "rendering, a ray per pixel / this": ("volume rendering, a ray per pixel", f"volume rendering, {count}"),
        "step, perceptual network on all / few views": ("step, perceptual network on all views", "step"),
        "whole step, plain / this": ("plain step", "step"),
        "without the perceptual network, plain / this": ("plain bare step", "bare step"),
    }
    for name, (slow, ours) in ratios.items():
        print(f"{name:45s} {times[slow] / times[ours]:8.1f} x")


if __name__ == "__main__":
    run(main, Options, __doc__)
