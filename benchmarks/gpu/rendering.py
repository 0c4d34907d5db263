"""Views per second of a paper-size scene: rays that skip against dense ones, and against the plain way."""

from __future__ import annotations

import math

import torch
from bench.render_cpu import camera, density_and_features, enlarged, ours, plain, sampled_room
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor, nn

from gpu.findings import Bar, Findings
from gpu.measuring import Memory, median_seconds
from gpu.sizes import Sizes
from nfldm_ns.autoencoder.decoder import ImageDecoder
from nfldm_ns.autoencoder.packed_samples import nerfacc_works
from nfldm_ns.autoencoder.scene_autoencoder import decode_images
from nfldm_ns.autoencoder.skipping import WEIGHT_BOUND
from nfldm_ns.method_configs.presets import SCENE_AUTOENCODER
from nfldm_ns.scenes.voxel_grid import VoxelGrid

TOLERANCE = 20 * WEIGHT_BOUND
"""Root mean square of the difference between skipping and dense feature maps, relative to that of the dense ones. No
sample that is left out weighs more than `WEIGHT_BOUND`; that all of a ray's together weigh 20 times that is rare."""
VIEWS_PER_SECOND, RATIO = 60.0, 5.0  # bars, of the largest pictures
RAYS_AT_ONCE = 2**16  # of the plain way: about a GiB at a time
NO_NERFACC = (
    "nerfacc has no compiled CUDA code here, so PyTorch alone finds which samples to skip: install a wheel of nerfacc "
    "for this PyTorch and CUDA, or the CUDA toolkit (nvcc) for it to compile with."
)


@torch.no_grad()
def render(findings: Findings, device: str, sizes: Sizes) -> None:
    """Views of one scene with the preset's voxels, samples and image decoder, at a ray per feature pixel.

    Numbers by the picture's side: `dense`, `plain`, `skipping` (views per second), `ratio` (skipping by plain),
    `ratio_dense`, `peak_gib` (of skipping) and `error` (`TOLERANCE`). Beside them are views with the ray density of
    training, as the viewer asks for them (`viewer`).
    """
    with findings.attempt("scene"):
        grid, decoder = paper_scene(device, sizes), image_decoder(device, sizes)
        findings.numbers["nerfacc"] = nerfacc_works()
        findings.require("nerfacc", device != "cuda" or nerfacc_works(), NO_NERFACC)
    if "scene" in findings.failures:
        return
    for side in sizes.pictures:
        with findings.attempt(f"{side} pixels"):
            found = views_per_second(grid, decoder, side, device, sizes)
            findings.numbers[str(side)] = found
            said = f"differ from dense ones by {found['error']:.1e}, more than the {TOLERANCE:.1e} that are allowed."
            findings.require(f"{side} pixels, agreement", found["error"] <= TOLERANCE, f"Skipping feature maps {said}")
            if side == max(sizes.pictures):
                findings.bars += [
                    Bar(f"views of {side} x {side} pixels per second", found["skipping"], VIEWS_PER_SECOND),
                    Bar(f"times the plain way at {side} x {side} pixels", found["ratio"], RATIO),
                ]


def paper_scene(device: str, sizes: Sizes) -> VoxelGrid:
    """A room of a generator with the preset's voxels, or voxels of random numbers."""
    network = SCENE_AUTOENCODER[sizes.preset].network
    shape, channels = tuple(network["grid_shape"]), network["feature_channels"]
    if sizes.room is not None:
        return enlarged(sampled_room(sizes.room, device), shape, channels).to(device)
    generator = torch.Generator().manual_seed(0)
    density = (3 * torch.randn(1, 1, *shape, generator=generator) - 1).clamp(min=0)
    features = torch.randn(1, channels, *shape, generator=generator)
    box = torch.tensor([[-8.0, -8.0, -2.5], [8.0, 8.0, 4.0]])
    return VoxelGrid(density, features, box).to(device)


def image_decoder(device: str, sizes: Sizes) -> nn.Module:
    """The preset's, with random weights."""
    network = SCENE_AUTOENCODER[sizes.preset].network
    torch.manual_seed(0)
    channels, blocks = tuple(network["decoder_channels"]), network.get("decoder_blocks", 1)
    decoder = ImageDecoder(network["feature_channels"], _stride(sizes), channels, blocks).eval()
    return decoder.to(device).to(memory_format=torch.channels_last)


def views_per_second(
    grid: VoxelGrid, decoder: nn.Module, side: int, device: str, sizes: Sizes
) -> dict[str, float | dict[str, float]]:
    """What `render` says of one size of pictures. All ways have the same decoder."""
    samples, rays = SCENE_AUTOENCODER[sizes.preset].network["num_samples"], side // _stride(sizes)
    voxels, view = density_and_features(grid), camera(side).to(device)
    memory = Memory(device)

    def skipping(count: int = rays) -> tuple[Tensor, Tensor]:
        return ours(grid, view, count, True, samples)

    def rate(maps) -> float:
        def show() -> None:
            features, accumulation = maps()
            decode_images(decoder, features, accumulation, side, side)

        return 1 / median_seconds(show, device, sizes.repeats, sizes.budget_s)

    trained = SCENE_AUTOENCODER[sizes.preset].image_size // _stride(sizes)
    found = {"skipping": rate(skipping), "peak_gib": memory.peak_gib(), "viewer": rate(lambda: skipping(trained))}
    found["dense"] = rate(lambda: ours(grid, view, rays, False, samples))
    found["plain"] = rate(lambda: plain(voxels, grid, view, rays, samples, RAYS_AT_ONCE))
    found["ratio"], found["ratio_dense"] = found["skipping"] / found["plain"], found["skipping"] / found["dense"]
    return {**found, "error": map_error(grid, view, rays, samples)}


def map_error(grid: VoxelGrid, view: Cameras, rays: int, samples: int) -> float:
    """Of skipping feature maps, relative to dense ones; infinite where one is not finite."""
    dense, _ = ours(grid, view, rays, False, samples)
    found, _ = ours(grid, view, rays, True, samples)
    error = float((found - dense).square().mean().sqrt() / dense.square().mean().sqrt().clamp(min=1e-12))
    return error if math.isfinite(error) else math.inf


def _stride(sizes: Sizes) -> int:
    return SCENE_AUTOENCODER[sizes.preset].network.get("feature_stride", 2)
