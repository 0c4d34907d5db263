"""Where a step of stage 1 spends its time, and what its shortcuts gain over the plain way, in one run.

    python benchmarks/stage1.py [--threads 2] [--repeats 5]

Prints the median time of each part at the size of `nfldm-scene-ae-tiny`, and ratios:

- lifting by one scatter over all views and depths, against a Python loop over views and depths;
- features at the few samples that matter, against features at all samples;
- rays at the feature maps' resolution, against rays through every pixel;
- the perceptual distance and the discriminator on the preset's few views, against both on all views.

Needs the weights of LPIPS (`nfldm-weights get lpips-vgg`).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import tyro
from nerfstudio.cameras.cameras import Cameras

from nfldm_ns.autoencoder.discriminator import ProjectedDiscriminator
from nfldm_ns.autoencoder.lifting import fuse_frustums
from nfldm_ns.autoencoder.losses import StageOneLossConfig, stage_one_losses
from nfldm_ns.autoencoder.perceptual import PERCEPTUAL_CHANNELS, PerceptualNetwork
from nfldm_ns.autoencoder.renderer import render_feature_maps
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.evaluation.weights import load_lpips
from nfldm_ns.method_configs.presets import SCENE_AUTOENCODER
from nfldm_ns.scenes.views import Views, index_cameras, make_cameras


@dataclass
class Options:
    """How to measure."""

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


def random_views(count: int) -> Views:
    """A scene of noise between 3 and 6 metres away."""
    return Views(surround_cameras(count), torch.rand(1, count, 3, 64, 64), 3 + 3 * torch.rand(1, count, 1, 64, 64))


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """Median wall time in milliseconds after one warm-up."""
    function()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times)


def fuse_in_a_loop(model: SceneAutoencoder, density: torch.Tensor, features: torch.Tensor, cameras: Cameras) -> None:
    """The plain way: one scatter for every view and every depth bin."""
    for view in range(density.shape[1]):
        for depth in range(density.shape[2]):
            fuse_frustums(
                density[:, view : view + 1, depth : depth + 1],
                features[:, view : view + 1],
                index_cameras(cameras, (slice(None), slice(view, view + 1))),
                model.bin_centres[depth : depth + 1],
                model.bin_widths[depth : depth + 1],
                model.aabb,
                model.grid_shape,
            )


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    preset = SCENE_AUTOENCODER["tiny"]
    model = SceneAutoencoder(**preset.network).to(memory_format=torch.channels_last)
    source, target = random_views(8), random_views(4)
    perceptual, own = PerceptualNetwork(load_lpips("vgg")), StageOneLossConfig(**preset.loss)
    discriminator = ProjectedDiscriminator([PERCEPTUAL_CHANNELS[level] for level in own.adversarial_levels])

    def step(config: StageOneLossConfig, judge: ProjectedDiscriminator | None = None) -> None:
        grid = model.encode(source)
        rendered = model.render(grid, target.cameras)
        losses = stage_one_losses(config, rendered, target, grid, perceptual, judge)
        sum(losses.values()).backward()

    with torch.no_grad():
        grid = model.encode(source)
        logits, features = model._encode_images(source)
        density = torch.nn.functional.softplus(logits - 3)[None]

        def render(rays: int, feature_samples: int | None) -> None:
            config = model.config
            render_feature_maps(grid, target.cameras, rays, rays, config.near, config.num_samples, feature_samples)

        def lift() -> None:
            centres, widths = model.bin_centres, model.bin_widths
            fuse_frustums(density, features[None], source.cameras, centres, widths, model.aabb, model.grid_shape)

        parts = {
            "image encoder, 8 views": lambda: model._encode_images(source),
            "lift and fuse": lift,
            "lift and fuse, loop over views and depths": lambda: fuse_in_a_loop(
                model, density, features[None], source.cameras
            ),
            "volume rendering, 4 views": lambda: render(32, model.config.num_feature_samples),
            "volume rendering, features at all samples": lambda: render(32, None),
            "volume rendering, a ray per pixel": lambda: render(64, None),
            "render and decode, 4 views": lambda: model.render(grid, target.cameras),
        }
        times = {name: median_ms(part, options.repeats) for name, part in parts.items()}
    steps = {
        "step without the perceptual network": lambda: step(replace(own, lpips_mult=0)),
        "step without the discriminator": lambda: step(own),
        "step": lambda: step(own, discriminator),
        "step, perceptual network on all views": lambda: step(replace(own, lpips_views=None), discriminator),
    }
    times.update({name: median_ms(part, options.repeats) for name, part in steps.items()})
    for name, value in times.items():
        print(f"{name:45s} {value:8.1f} ms")
    ratios = {
        "lifting, loop / one scatter": ("lift and fuse, loop over views and depths", "lift and fuse"),
        "rendering, all / few feature samples": (
            "volume rendering, features at all samples",
            "volume rendering, 4 views",
        ),
        "rendering, a ray per pixel / this": ("volume rendering, a ray per pixel", "volume rendering, 4 views"),
        "step, perceptual network on all / few views": ("step, perceptual network on all views", "step"),
    }
    for name, (plain, ours) in ratios.items():
        print(f"{name:45s} {times[plain] / times[ours]:8.1f} x")


if __name__ == "__main__":
    main(tyro.cli(Options))
