"""Files of generated scenes: compact ones against those of version 1, and what each way to leave out voxels would save.

    python -m benchmarks.bench.sparse [FOLDERS of generated scenes]

Without folders, two rooms are sampled with `vizdoom-rooms`. Sizes are of `scene.safetensors`; PSNR is between pictures
of the scene as it was and as it is read from a compact file, along a fly-through.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.diffusion.pipeline import load_pipeline
from nfldm_ns.generated.cameras import fly_through
from nfldm_ns.generated.scene_files import GeneratedScene, load_generated_scene, write_scene_files
from nfldm_ns.models import GENERATOR, resolve_model
from nfldm_ns.plugin.pictures import render_perspective
from nfldm_ns.sampling.scenes import sample_scenes
from nfldm_ns.scenes.sparse_grid import SparseGrid
from nfldm_ns.scenes.voxel_grid import VoxelGrid

KEY = "sparse"
VIEWS = 4


def size_of_version_1(scene: GeneratedScene) -> int:
    """Bytes of `scene.safetensors` as it was before tensors were compressed."""
    grid = scene.grid
    tensors: dict[str, Tensor] = {"density": grid.density[0].half(), "features": grid.features[0].half()}
    if grid.background is not None:
        tensors["background"] = grid.background[0].half()
    tensors |= {f"latents.{name}": value for name, value in scene.latents.items()}
    tensors |= {f"renderer.{name}": value for name, value in scene.renderer.state_dict().items()}
    return len(save({name: value.contiguous() for name, value in tensors.items()}))


@torch.no_grad()
def pictures(renderer: SceneAutoencoder, grid: VoxelGrid, scene: GeneratedScene) -> Tensor:
    assert scene.cameras is not None
    cameras = fly_through(scene.cameras, VIEWS)
    return torch.stack(
        [render_perspective(renderer, grid, cameras[i : i + 1].reshape((1, 1)))["rgb"] for i in range(VIEWS)]
    )


def kept_shares(grid: VoxelGrid) -> dict[str, float]:
    """Shares of voxels, and of blocks of them, that hold density or have a neighbour that does."""
    kept = SparseGrid.from_dense(grid).kept
    blocks = {f"{n}^3 blocks": F.max_pool3d(kept[None, None].float(), n, ceil_mode=True).mean() for n in (4, 8)}
    return {"voxels": float(kept.float().mean()), **{name: float(share) for name, share in blocks.items()}}


def measure_scene(scene: GeneratedScene, folder: Path) -> dict[str, Any]:
    before = size_of_version_1(scene)
    sizes = {}
    for name, compact in (("lossless", False), ("compact", True)):
        (folder / name).mkdir(parents=True)
        write_scene_files(folder / name, scene, compact)
        sizes[name] = (folder / name / "scene.safetensors").stat().st_size / before
    stored = load_generated_scene(folder / "compact")
    error = pictures(scene.renderer, scene.grid, scene) - pictures(stored.renderer, stored.grid, scene)
    worst = error.square().mean((1, 2, 3)).max()
    return {
        "size_ratio": sizes["compact"],
        "size_ratio_lossless": sizes["lossless"],
        "psnr": float(-10 * worst.log10()),
        "bytes_before": before,
        "kept": kept_shares(scene.grid),
    }


def measure(folders: Sequence[Path] = ()) -> dict[str, Any]:
    """`size_ratio`: the largest, compact by version 1; `psnr`: of the worst view of all scenes (dB)."""
    with tempfile.TemporaryDirectory() as temporary:
        if not folders:
            pipeline = load_pipeline(resolve_model(GENERATOR))
            folders = list(sample_scenes(pipeline, Path(temporary) / "sampled", 2, source=GENERATOR))
        scenes = [measure_scene(load_generated_scene(f), Path(temporary) / str(i)) for i, f in enumerate(folders)]
    return {
        "size_ratio": max(found["size_ratio"] for found in scenes),
        "size_ratio_lossless": statistics.median(found["size_ratio_lossless"] for found in scenes),
        "psnr": min(found["psnr"] for found in scenes),
        "scenes": scenes,
    }


if __name__ == "__main__":
    print(json.dumps(measure([Path(argument) for argument in sys.argv[1:]]), indent=1))
