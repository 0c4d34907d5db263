"""Writes a generated scene as one folder that is a nerfstudio run and a nerfstudio dataset."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.generated.cameras import fly_through
from nfldm_ns.generated.scene_files import (
    GeneratedScene,
    half_precision,
    in_compact_precision,
    renderer_of,
    write_scene_files,
)
from nfldm_ns.plugin.scene_config import scene_config_yml
from nfldm_ns.scenes.views import Views, index_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.scenes.writing import atomic_path, write_scene

CAMERAS_AT_ONCE = 8


def write_generated_scene(
    folder: Path,
    grid: VoxelGrid,
    autoencoder: SceneAutoencoder,
    cameras: Cameras,
    latents: Mapping[str, Tensor] | None = None,
    provenance: Mapping[str, Any] | None = None,
    eval_cameras: Cameras | None = None,
    attachments: Mapping[str, bytes] | None = None,
    compact: bool = False,
) -> None:
    """Writes one scene, whole or not at all; an existing folder is replaced.

    The folder is a run (`config.yml`, `nerfstudio_models/`) for ns-viewer, ns-render and ns-eval, and a dataset
    (`transforms.json`, `images/`, `depths/`) for any nerfstudio method: `cameras` are its training views,
    `eval_cameras` its validation and test views. `scene.safetensors` and `scene.json` hold the voxels and background
    (half precision), the latents, the renderer and the provenance.

    Args:
        grid: batch size 1.
        autoencoder: stage 1, of which only the renderer is kept.
        cameras: batch shape `[N]`, at the size the images shall have.
        latents: tensors by name.
        provenance: seed and what made it, as JSON; no times, so that the same seed gives the same files.
        eval_cameras: batch shape `[M]`; by default 8 views of `fly_through(cameras)`.
        attachments: further files by name.
        compact: rounds features so that `scene.safetensors` is half as large, see `in_compact_precision`.

    Raises:
        ValueError: if the grid holds more than one scene.
    """
    if grid.batch_size != 1:
        raise ValueError(f"one scene at a time, not {grid.batch_size}")
    scene = GeneratedScene(
        (in_compact_precision if compact else half_precision)(grid),
        renderer_of(autoencoder),
        cameras,
        dict(latents or {}),
        dict(provenance or {}),
    )
    eval_cameras = fly_through(cameras, 8) if eval_cameras is None else eval_cameras
    with atomic_path(folder) as temporary:
        write_scene(temporary, render_views(scene, cameras), render_views(scene, eval_cameras))
        write_scene_files(temporary, scene, compact)
        (temporary / "config.yml").write_text(scene_config_yml(folder.resolve()), encoding="utf-8")
        _write_checkpoint(temporary / "nerfstudio_models", scene)
        for name, content in (attachments or {}).items():
            (temporary / name).write_bytes(content)


@torch.inference_mode()
def render_views(scene: GeneratedScene, cameras: Cameras) -> Views:
    """Images and planar depths of cameras of batch shape `[N]`, on the CPU."""
    cameras = cameras.to("cpu")
    images, depths = [], []
    for first in range(0, cameras.shape[0], CAMERAS_AT_ONCE):
        chunk = index_cameras(cameras, (None, slice(first, first + CAMERAS_AT_ONCE)))
        rendered = scene.renderer.render(scene.grid, chunk)
        images.append(rendered.rgb[0].clamp(0, 1))
        depths.append(rendered.depth[0])
    return Views(cameras, torch.cat(images), torch.cat(depths))


def _write_checkpoint(folder: Path, scene: GeneratedScene) -> None:
    folder.mkdir()
    state = {
        "device_indicator_param": torch.empty(0),
        "field.density": scene.grid.density,
        "field.features": scene.grid.features,
        "field.aabb": scene.grid.aabb,
        **({} if scene.grid.background is None else {"field.background": scene.grid.background}),
        **{f"decoder.{name}": value for name, value in scene.renderer.state_dict().items()},
    }
    checkpoint = {
        "step": 0,
        "pipeline": {f"_model.{name}": value for name, value in state.items()},
        "optimizers": {},
        "schedulers": {},
        "scalers": {},
    }
    torch.save(checkpoint, folder / "step-000000000.ckpt")
