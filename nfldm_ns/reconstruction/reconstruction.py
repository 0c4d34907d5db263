"""Scenes of a few posed images: what they show as they show it, and the rest as the prior has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.autoencoder.grid_optimisation import GridOptimiserConfig, optimise_grid
from nfldm_ns.autoencoder.losses import StageOneLossConfig
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.diffusion.inpainting import Inpainting
from nfldm_ns.diffusion.pipeline import NFLDMPipeline
from nfldm_ns.editing.blending import blend_voxels
from nfldm_ns.latents.scene_latents import SceneLatents
from nfldm_ns.latents.voxel_code import VoxelCode
from nfldm_ns.reconstruction.fine_tuning import FineTuningConfig, fine_tune
from nfldm_ns.reconstruction.prior_refinement import PriorRefinement, refine_by_prior
from nfldm_ns.reconstruction.rendering_guide import GuidanceConfig, RenderingGuide, RenderingLoss
from nfldm_ns.reconstruction.scene_code import cameras_around, sample_scene_code, scene_code_of_views
from nfldm_ns.reconstruction.visibility import Visibility, ends_of_rays, seen_voxels
from nfldm_ns.scenes.views import Views, resize_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid

LOSS = StageOneLossConfig(lpips_mult=0.0, rgb_mult=1.0, depth_mult=0.1, depth_norm="l1")


@dataclass(frozen=True)
class ReconstructionConfig:
    """How scenes are made of images.

    Attributes:
        num_inference_steps: of each latent.
        code_strength: share of psi_g's steps that the scene code of the given views is noised back, see
            `sample_scene_code`.
        resamplings, jump_length: of the inpainting of what no image shows, see `Inpainting`.
        inpaint: keep latents of seen cells and sample the others; False samples all of them, by guidance alone.
        guidance: of the sampling.
        fine_tuning: of the latents afterwards.
        temperatures: of g, c and f; None: the pipeline's own.
        keep_seen: whether seen voxels are those of stage 1 in the end, as far as these are sure.
        voxel_steps: of Adam on V itself, for the given images and near to what it was.
        column_share, cell_share: see `Visibility`.
        loss: weights of the rendering loss.
    """

    num_inference_steps: int = 10
    code_strength: float = 0.0
    resamplings: int = 1
    jump_length: int = 3
    inpaint: bool = True
    guidance: GuidanceConfig = field(default_factory=lambda: GuidanceConfig(scale=0.0))
    fine_tuning: FineTuningConfig = field(default_factory=FineTuningConfig)
    temperatures: tuple[float, float, float] | None = (1.0, 1.0, 1.0)
    keep_seen: bool = True
    voxel_steps: int = 0
    column_share: float = 0.1
    cell_share: float = 0.25
    loss: StageOneLossConfig = field(default_factory=lambda: LOSS)


@dataclass
class Reconstruction:
    """One answer.

    Attributes:
        grid: V, batch size 1.
        latents: g, c and f, batch size 1.
        cameras: the given ones and others around them, batch shape `[N]`.
        visibility: what the images show.
    """

    grid: VoxelGrid
    latents: SceneLatents
    cameras: Cameras
    visibility: Visibility


@dataclass
class SeenPlace:
    """What stages 1 and 2 make of the given images alone.

    Attributes:
        views: the images, batch shape `[1, N]`.
        grid: V of stage 1.
        latents: of that V.
        visibility: which of it the images show.
    """

    views: Views
    grid: VoxelGrid
    latents: SceneLatents
    visibility: Visibility

    @staticmethod
    @torch.no_grad()
    def of(pipeline: NFLDMPipeline, views: Views, config: ReconstructionConfig) -> SeenPlace:
        """Encodes views of batch shape `[1, N]`."""
        stage1, stage2 = pipeline.scene_autoencoder, pipeline.latent_autoencoder
        views = views.to(stage1.device)
        grid = stage1.encode(views)
        rendered = stage1.render(grid, views.cameras).depth[0]
        ends = ends_of_rays(None if views.depths is None else views.depths[0], rendered)
        masks = None if views.masks is None else views.masks[0]
        voxels = seen_voxels(views[0].cameras, ends, grid.shape, grid.aabb, masks)
        visibility = Visibility(voxels, config.column_share, config.cell_share)
        return SeenPlace(views, grid, stage2.encode(grid), visibility)


def reconstruct_scene(
    pipeline: NFLDMPipeline,
    views: Views,
    seed: int = 0,
    config: ReconstructionConfig | None = None,
    perceptual: PerceptualNetwork | None = None,
    refinement: PriorRefinement | None = None,
) -> Reconstruction:
    """One answer of as many as there are seeds.

    Stage 1 lifts the images to V, and stage 2 encodes it. c and f of what the images show are kept, those of the rest
    are inpainted, and images guide all of it through what they would show of the denoised estimate. Then the latents
    are fine-tuned under rendering and diffusion losses. Voxels that the images show are those of stage 1 in the end.

    Args:
        views: 1 to 4 posed images of one place, batch shape `[1, N]`, of the size that stage 1 was trained on, with
            depth where there is any.
        perceptual: the network of LPIPS, if `config.loss` has weights for it.
        refinement: of the voxels by a prior of images; none by default.
    """
    config = config or ReconstructionConfig()
    return reconstruct_seen(pipeline, SeenPlace.of(pipeline, views, config), seed, config, perceptual, refinement)


def reconstruct_seen(
    pipeline: NFLDMPipeline,
    seen: SeenPlace,
    seed: int,
    config: ReconstructionConfig,
    perceptual: PerceptualNetwork | None = None,
    refinement: PriorRefinement | None = None,
) -> Reconstruction:
    """`reconstruct_scene` of a place that is encoded."""
    stage1, stage2 = pipeline.scene_autoencoder, pipeline.latent_autoencoder
    generator = torch.Generator().manual_seed(seed)
    loss = RenderingLoss(stage1, seen.views, config.loss, perceptual)
    guide = RenderingGuide(pipeline, loss, seen.latents, config.guidance)
    with frozen(pipeline):
        code = scene_code_of_views(pipeline, seen.latents.global_latent, seen.views[0].cameras)
        code = sample_scene_code(pipeline, code, config.code_strength, config.num_inference_steps, generator, guide)
        inpainting = None
        if config.inpaint:
            unknown = seen.visibility.unknown(stage2.downsampling)
            settings = {"resamplings": config.resamplings, "jump_length": config.jump_length}
            inpainting = Inpainting(seen.latents, *(part.cpu() for part in unknown), **settings)  # type: ignore[arg-type]
        output = pipeline(
            1,
            generator,
            config.num_inference_steps,
            "latent",
            temperatures=config.temperatures,
            scene_code=code,
            inpainting=inpainting,
            guide=guide,
        )
        latents = fine_tune(pipeline, output.latents, code, loss, config.fine_tuning, generator)
        with torch.no_grad():
            grid = stage2.decode(latents)
        grid = _with_seen(grid, seen, config)
        if refinement is not None:
            grid = refine_unseen(pipeline, seen, grid, config, refinement, seed)
        if config.voxel_steps:
            grid = _optimise_voxels(pipeline, grid, seen.views, config, perceptual, seed)
    return Reconstruction(grid, latents, _cameras(pipeline, seen.views), seen.visibility)


def refine_unseen(
    pipeline: NFLDMPipeline,
    seen: SeenPlace,
    grid: VoxelGrid,
    config: ReconstructionConfig,
    refinement: PriorRefinement,
    seed: int,
) -> VoxelGrid:
    """V of an answer, refined by a prior of images; seen voxels are those of stage 1 again afterwards."""
    cameras = _cameras(pipeline, seen.views)
    refined = refine_by_prior(pipeline.scene_autoencoder, grid, seen.views, cameras, refinement, seed)
    return _with_seen(refined, seen, config)


def _with_seen(grid: VoxelGrid, seen: SeenPlace, config: ReconstructionConfig) -> VoxelGrid:
    """V with the voxels of stage 1 where the images show them, if these are kept."""
    return blend_voxels(grid, seen.grid, seen.visibility.weights()) if config.keep_seen else grid


def _cameras(pipeline: NFLDMPipeline, views: Views) -> Cameras:
    """The given ones and others around them, `[N]`; their images are as large as an upsampler makes them."""
    count = pipeline.global_denoiser.config.num_cameras
    cameras = cameras_around(views[0].cameras, max(count, views.shape[1]))
    stage1, size = pipeline.scene_autoencoder, views.image_size
    if size[0] >= stage1.image_size[0]:
        return cameras
    return resize_cameras(cameras, *(stage1.upsampling * side for side in size))


def _optimise_voxels(
    pipeline: NFLDMPipeline,
    grid: VoxelGrid,
    views: Views,
    config: ReconstructionConfig,
    perceptual: PerceptualNetwork | None,
    seed: int,
) -> VoxelGrid:
    code: VoxelCode = pipeline.latent_autoencoder.voxel_code
    start = code.normalise(grid).detach()

    def anchor(shown: VoxelGrid) -> Tensor:
        return 0.1 * (code.normalise(shown) - start).abs().mean()

    settings = GridOptimiserConfig(max_steps=config.voxel_steps, check_every=config.voxel_steps, seed=seed)
    return optimise_grid(pipeline.scene_autoencoder, grid, views, config.loss, perceptual, settings, anchor).grid


@contextmanager
def frozen(pipeline: NFLDMPipeline) -> Iterator[None]:
    """No gradients for the pipeline's weights within, as graphs through them cost memory and time."""
    modules = [module for module in pipeline.components.values() if isinstance(module, torch.nn.Module)]
    wanted = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
