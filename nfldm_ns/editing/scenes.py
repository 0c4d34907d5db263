"""The scenes that are edited, generated and real ones alike: `GeneratedScene` with one batch of latents."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.choice import evenly
from nfldm_ns.diffusion.pipeline import NFLDMPipeline
from nfldm_ns.diffusion.trajectory import cameras_to_trajectory
from nfldm_ns.editing.region import Region
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.scene_files import GeneratedScene, half_precision, load_generated_scene, renderer_of
from nfldm_ns.latents.scene_latents import SceneLatents
from nfldm_ns.plugin.generated_run import write_generated_scene
from nfldm_ns.scenes.collection import BEV_FILE, SceneCollection
from nfldm_ns.scenes.views import index_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid

REGION_PICTURE = "region.png"
_NAMES = ("global_latent", "coarse", "fine")


def load_scene(folder: Path | str) -> GeneratedScene:
    """`load_generated_scene`, with the folder in the provenance, so that what is made of it names it as a source."""
    scene = load_generated_scene(folder)
    return replace(scene, provenance={"folder": str(folder), **scene.provenance})


def pipeline_named_by(provenance: Mapping[str, Any]) -> str | None:
    """The generator that a scene's record names, or the first that the records of what it was made of do."""
    named = provenance.get("pipeline")
    if isinstance(named, str) and named:
        return named
    sources = provenance.get("sources")
    records = [source for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
    return next((found for found in map(pipeline_named_by, records) if found), None)


@torch.no_grad()
def encode_real_scene(
    pipeline: NFLDMPipeline, collection: SceneCollection, scene_id: str, source: str = ""
) -> GeneratedScene:
    """A scene of a collection as stages 1 and 2 encode it: its V is stage 1's, its latents are those of V.

    Args:
        source: where the pipeline is from, for the record.

    Raises:
        UserInputError: if there is no such scene, or the pipeline was made for another box or another number of views.
    """
    if scene_id not in collection.scene_ids:
        first = ", ".join(collection.scene_ids[:3])
        raise UserInputError(f"{collection.root} has no scene {scene_id}: name one of its scenes, such as {first}.")
    stage1 = pipeline.scene_autoencoder
    if not torch.allclose(collection.aabb, stage1.aabb.cpu(), atol=1e-4):
        raise UserInputError(
            f"The pipeline was trained for the box {stage1.aabb.tolist()}, but {collection.root} has "
            f"{collection.aabb.tolist()}: use a collection with the pipeline's box."
        )
    views = collection.batch([collection.load_scene(scene_id)]).source
    grid = half_precision(stage1.encode(views.to(stage1.device)))
    scene = GeneratedScene(grid, renderer_of(stage1), index_cameras(views.cameras, 0))
    _trajectory(pipeline, scene)  # refuses scenes of too few views
    provenance = {"command": "nfldm-edit encode", "pipeline": source}
    provenance |= {"collection": str(collection.root), "scene": scene_id}
    return replace(encode_again(pipeline, scene), provenance=provenance)


@torch.no_grad()
def encode_again(pipeline: NFLDMPipeline, scene: GeneratedScene) -> GeneratedScene:
    """A scene with the latents that stage 2 encodes its V to, whatever latents it had."""
    require_pipeline_of(pipeline, scene)
    stage2 = pipeline.latent_autoencoder
    return with_latents(scene, stage2.encode(scene.grid.to(stage2.device)))


def with_latents(scene: GeneratedScene, latents: SceneLatents) -> GeneratedScene:
    """A scene with other latents (batch size 1)."""
    return replace(scene, latents={name: value[0] for name, value in latents.to("cpu").state_dict().items()})


def latents_of(pipeline: NFLDMPipeline, scene: GeneratedScene) -> SceneLatents:
    """The latents of a scene, batch size 1, on the pipeline's device.

    Raises:
        UserInputError: if it has none, or they are of another pipeline.
    """
    if not set(_NAMES) <= set(scene.latents):
        raise UserInputError(
            "The scene has voxels, but no latents: encode it with 'nfldm-edit encode', and edit what that writes."
        )
    stage2 = pipeline.latent_autoencoder
    shapes = [tuple(scene.latents[name].shape) for name in _NAMES]
    expected = [(stage2.global_dim,), stage2.coarse_shape, stage2.fine_shape]
    if shapes != expected:
        raise UserInputError(
            f"The scene's g, c and f are of sizes {shapes}, but those of the pipeline are {expected}: "
            "give the pipeline that made the scene."
        )
    return SceneLatents(*(scene.latents[name][None].float() for name in _NAMES)).to(pipeline.device)


def scene_code_of(pipeline: NFLDMPipeline, scene: GeneratedScene) -> Float[Tensor, "1 code"]:
    """What psi_c and psi_f are told of a scene: its g and the trajectory of its cameras.

    Raises:
        UserInputError: if it has fewer cameras than the pipeline was trained with, or no latents.
    """
    return torch.cat([latents_of(pipeline, scene).global_latent, _trajectory(pipeline, scene)], dim=1)


def _trajectory(pipeline: NFLDMPipeline, scene: GeneratedScene) -> Float[Tensor, "1 views_times_5"]:
    needed = pipeline.global_denoiser.config.num_cameras
    cameras = cameras_of(scene)
    if cameras.shape[0] < needed:
        raise UserInputError(
            f"The scene has {cameras.shape[0]} cameras, but the pipeline was trained with {needed}: "
            "give a scene with as many source views."
        )
    chosen = index_cameras(cameras, torch.tensor(evenly(range(cameras.shape[0]), needed)))
    return cameras_to_trajectory(chosen).to(pipeline.device)[None]


def cameras_of(scene: GeneratedScene) -> Cameras:
    """The scene's cameras; `UserInputError` if it has none."""
    if scene.cameras is None:
        raise UserInputError("The scene has no cameras (transforms.json): restore the file or make the scene again.")
    return scene.cameras


def require_pipeline_of(pipeline: NFLDMPipeline, scene: GeneratedScene) -> None:
    """Raises `UserInputError` unless a scene's voxels are such as the pipeline makes, for its decoder."""
    _require_same(scene.grid, pipeline.scene_autoencoder.aabb, pipeline.scene_autoencoder.grid_shape, "the pipeline")
    _require_decoder(scene, pipeline.scene_autoencoder, "the pipeline")


def require_joinable(scenes: Sequence[GeneratedScene]) -> None:
    """Raises `UserInputError` unless all scenes have the box, the voxels and the decoder of the first."""
    for other in scenes[1:]:
        _require_same(other.grid, scenes[0].grid.aabb, scenes[0].grid.shape, "the first one")
        _require_decoder(other, scenes[0].renderer, "the first one")


def _require_same(grid: VoxelGrid, aabb: Tensor, shape: tuple[int, int, int], whose: str) -> None:
    if grid.shape != tuple(shape) or not torch.allclose(grid.aabb.cpu(), aabb.cpu(), atol=1e-4):
        raise UserInputError(
            f"A scene has {' x '.join(map(str, grid.shape))} voxels (z, y, x) in the box {grid.aabb.tolist()}, but "
            f"{whose} {' x '.join(map(str, shape))} in {aabb.tolist()}: use scenes of one pipeline."
        )


def _require_decoder(scene: GeneratedScene, autoencoder: SceneAutoencoder, whose: str) -> None:
    expected = {k: v for k, v in autoencoder.state_dict().items() if not k.startswith(("encoder.", "refiner."))}
    found = scene.renderer.state_dict()
    if found.keys() != expected.keys() or not all(torch.equal(found[k], v.cpu()) for k, v in expected.items()):
        raise UserInputError(
            f"A scene's voxels are for another decoder (stage 1) than that of {whose}: use scenes of one pipeline."
        )


def write_edited_scene(
    folder: Path, scene: GeneratedScene, region: Region | None = None, bev_map: bytes | None = None
) -> None:
    """Writes a scene as a folder, with the region that was edited as `region.png` (north up, white inside).

    Args:
        bev_map: a PNG of the map that the edit followed, becomes `bev.png`.
    """
    attachments: dict[str, bytes] = {} if bev_map is None else {BEV_FILE: bev_map}
    if region is not None:
        buffer = io.BytesIO()
        region.picture().save(buffer, format="PNG")
        attachments[REGION_PICTURE] = buffer.getvalue()
    write_generated_scene(
        folder,
        scene.grid,
        scene.renderer,
        cameras_of(scene),
        scene.latents,
        scene.provenance,
        attachments=attachments,
    )
