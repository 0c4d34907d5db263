"""Looks at generated and real scenes one by one, and keeps what the evaluation needs of each."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from safetensors.torch import save_file
from torch import Tensor, nn

from nfldm_ns.autoencoder.lifting import box_exit_depth
from nfldm_ns.autoencoder.scene_autoencoder import RenderedViews, SceneAutoencoder
from nfldm_ns.choice import evenly
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, NFLDMPipelineOutput, scene_generators
from nfldm_ns.evaluation.settings import EvaluationSettings, RealScenes
from nfldm_ns.generated.cameras import surround_cameras
from nfldm_ns.generated.fly_throughs import flythrough_clips
from nfldm_ns.latents.scene_latents import SceneLatents
from nfldm_ns.metrics.geometry import DepthHistogram, floating_density
from nfldm_ns.metrics.image_sets import write_pictures
from nfldm_ns.metrics.videos import STANDARD_FRAMES, extract_video_features
from nfldm_ns.processes import ALONE, Processes
from nfldm_ns.scenes.collection import Scene, SceneCollection
from nfldm_ns.scenes.views import Views, camera_rays, index_cameras, resize_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.scenes.writing import atomic_path

FIXED_VIEWS = 4
STEPS_BETWEEN_CAMERAS = 8  # of fly-throughs; more where a path would be shorter than a video
SURFACE = 0.5  # accumulation from which on a ray is said to end at a surface

Record = dict[str, Tensor]
Progress = Callable[[float], None]


def render_sampled_views(
    pipeline: NFLDMPipeline, output: NFLDMPipelineOutput, views: int, image_size: tuple[int, int] | None = None
) -> list[RenderedViews]:
    """What `views` evenly chosen cameras of each generated scene's own trajectory see.

    Args:
        image_size: (height, width) of the views, by default that of the cameras.

    Returns:
        one `RenderedViews` of batch shape `[1, views]` per scene.
    """
    assert output.grids is not None
    rendered = []
    with torch.inference_mode():
        for i in range(output.grids.batch_size):
            chosen = torch.tensor(evenly(range(output.cameras.shape[1]), views))
            cameras = index_cameras(output.cameras, ([i], chosen[None]))
            if image_size is not None:
                cameras = resize_cameras(cameras, *image_size)
            rendered.append(pipeline.scene_autoencoder.render(output.grids[i], cameras))
    return rendered


# Where things lie


@dataclass(frozen=True)
class PictureFolder:
    """Pictures and records of scenes; a scene whose record is there is done.

    ```
    pictures/<set>/<scene>_<view>.png   views of the sets `samples`, `test`, `train`, `stage1`, `stage2`
    fixed/<set>/<scene>_<view>.png      views of the cameras that all scenes share: `generated`, `test`, `train`
    records/<set>/<scene>.safetensors   what was measured of a scene of these three
    ```
    """

    root: Path

    def pictures(self, name: str) -> Path:
        """Views of a set of images."""
        return self.root / "pictures" / name

    def fixed(self, name: str) -> Path:
        """Views of the shared cameras."""
        return self.root / "fixed" / name

    def record(self, name: str, scene: str) -> Path:
        """What was measured of a scene."""
        return self.root / "records" / name / f"{scene}.safetensors"

    def write(self, name: str, images: dict[str, Tensor], fixed: Tensor, record: Record, scene: str) -> None:
        """Keeps a scene: pictures by set, those of the shared cameras, and last its record."""
        for kind, views in images.items():
            self.pictures(kind).mkdir(parents=True, exist_ok=True)
            write_pictures(self.pictures(kind), scene, views)
        self.fixed(name).mkdir(parents=True, exist_ok=True)
        write_pictures(self.fixed(name), scene, fixed)
        with atomic_path(self.record(name, scene)) as temporary:
            save_file({key: value.cpu().contiguous() for key, value in record.items()}, temporary)


# Looking


class SceneJudge:
    """Looks at voxels with the networks of a pipeline.

    Args:
        pipeline: on the device to work on.
        i3d: the network of FVD, on the same device; None makes no videos.
        image_size: (height, width) of all pictures, by default that of the pipeline's.
    """

    def __init__(
        self, pipeline: NFLDMPipeline, i3d: nn.Module | None = None, image_size: tuple[int, int] | None = None
    ) -> None:
        self.pipeline = pipeline
        self.i3d = i3d
        self.device = pipeline.scene_autoencoder.device
        size, config = pipeline.scene_autoencoder.image_size, pipeline.scene_autoencoder.config
        self.image_size = image_size or size
        fixed = surround_cameras(FIXED_VIEWS, size, float(config.focal_length))
        self.cameras = resize_cameras(fixed, *self.image_size).to(self.device)
        aabb = pipeline.scene_autoencoder.aabb
        self.far = float((aabb[1] - aabb[0]).norm())
        self.turns = 4 if _can_turn(pipeline.scene_autoencoder.grid_shape, aabb) else 1

    def fixed_views(self, grid: VoxelGrid) -> Float[Tensor, "views 3 height width"]:
        """A scene (batch size 1) from the shared cameras: level, at the origin, a quarter turn apart."""
        return self.pipeline.scene_autoencoder.render(grid, index_cameras(self.cameras, None)).rgb[0]

    def latent_vectors(self, grid: VoxelGrid, turns: int) -> Float[Tensor, "turns size"]:
        """The latents of a scene (batch size 1) in its first quarter turns, as vectors that can be compared.

        Each of g, c and f, as far as there are such, is in the units of its denoiser (standard deviations over the
        training scenes) and weighs the same, so that the Euclidean distance of two vectors is the root of the mean over
        the latents of their mean squared differences.
        """
        encode = self.pipeline.latent_autoencoder.encode
        return torch.cat([self._vector(encode(grid.rotate90(turn) if turn else grid)) for turn in range(turns)])

    def _vector(self, latents: SceneLatents) -> Float[Tensor, "scenes size"]:
        code = self.pipeline.global_denoiser.code
        g = latents.global_latent
        trajectory = g.new_zeros(len(g), len(code.mean) - g.shape[1])
        parts = [
            code(torch.cat([g, trajectory], dim=1))[:, : g.shape[1]],
            self.pipeline.coarse_denoiser.latent(latents.coarse.flatten(1, 2)).flatten(1),
        ]
        if self.pipeline.fine_denoiser is not None:
            parts.append(self.pipeline.fine_denoiser.latent(latents.fine).flatten(1))
        parts = [part for part in parts if part.shape[1]]
        return torch.cat([part / (len(parts) * part.shape[1]) ** 0.5 for part in parts], dim=1)

    def record(self, grid: VoxelGrid, turns: int) -> Record:
        """`latents` `[turns, D]` in half precision and `floating` `[2]` (see `floating_density`) of one scene."""
        return {"latents": self.latent_vectors(grid, turns).half(), "floating": floating_density(grid)[0]}

    def video(self, grid: VoxelGrid, cameras: Cameras) -> Record:
        """`video` `[400]`: what I3D says of the fly-through of a scene (batch size 1) along cameras `[N]`."""
        if self.i3d is None:
            return {}
        return {"video": flight_features(self.i3d, self.pipeline.scene_autoencoder, grid, cameras)}

    def rendered_depth(self, rendered: RenderedViews) -> Tensor:
        """Counts of the depths of rendered views, where rays end at a surface."""
        return DepthHistogram.of(rendered.depth, rendered.accumulation >= SURFACE, self.far).counts

    def real_depth(self, views: Views) -> Tensor | None:
        """Counts of the real depths of views `[1, M]`, of surfaces beyond the box where the ray leaves it.

        So are they rendered, too: voxels end there. None if no view has depth.
        """
        if views.depths is None:
            return None
        depths = torch.minimum(views.depths, _exit_depth(views.cameras, views.image_size, self.pipeline))
        return DepthHistogram.of(depths, _known(views.depths), self.far).counts


def flight_features(
    i3d: nn.Module, renderer: SceneAutoencoder, grid: VoxelGrid, cameras: Cameras
) -> Float[Tensor, " 400"]:
    """What I3D says of a fly-through of a scene (batch size 1) along cameras `[N]`, two or more."""
    steps = max(STEPS_BETWEEN_CAMERAS, -(-STANDARD_FRAMES // (cameras.shape[0] - 1)))
    return extract_video_features(i3d, flythrough_clips(renderer, [(grid, cameras)], STANDARD_FRAMES, 1, steps))[0]


def _can_turn(shape: tuple[int, int, int], aabb: Float[Tensor, "2 3"]) -> bool:
    """Whether a box is square and centred in x and y, so that a scene can be turned in it."""
    low, high = aabb[:, :2].cpu()
    return shape[1] == shape[2] and torch.allclose(low, -high) and torch.allclose(high[0], high[1])


def _known(depths: Float[Tensor, "*batch 1 height width"]) -> Bool[Tensor, "*batch 1 height width"]:
    return depths > 0


def _exit_depth(cameras: Cameras, size: tuple[int, int], pipeline: NFLDMPipeline) -> Tensor:
    origins, directions = camera_rays(cameras, *size)
    origins = origins[..., None, None, :].expand_as(directions)
    return box_exit_depth(origins, directions, pipeline.scene_autoencoder.aabb)[1].unsqueeze(-3)


# Generated scenes


@torch.inference_mode()
def judge_generated(
    judge: SceneJudge,
    folder: PictureFolder,
    settings: EvaluationSettings,
    on_progress: Progress,
    num_videos: int = 0,
    processes: Processes = ALONE,
) -> list[str]:
    """Samples the scenes of the seeds `seed`, `seed + 1`, ... that are not there yet.

    Args:
        settings: `num_scenes` with their views, seed, steps and batches.
        num_videos: how many scenes, the first, the network of FVD sees fly-throughs of.
        processes: those that share the batches.

    Returns:
        names of all of them.
    """
    pipeline, num_scenes = judge.pipeline, settings.num_scenes
    pipeline.set_progress_bar_config(disable=True)
    names = [f"{settings.seed + i:06d}" for i in range(num_scenes)]
    firsts = processes.share(range(0, num_scenes, settings.batch_size))
    for done, first in enumerate(firsts):
        batch = names[first : first + settings.batch_size]
        if not all(folder.record("generated", name).is_file() for name in batch):
            generators = scene_generators(settings.seed + first, len(batch))
            output = pipeline(len(batch), generators, num_inference_steps=settings.num_inference_steps)
            assert output.grids is not None
            views = render_sampled_views(pipeline, output, settings.views_per_scene, judge.image_size)
            for i, rendered in enumerate(views):
                grid = output.grids[i]
                record = {**judge.record(grid, judge.turns), "depth": judge.rendered_depth(rendered)}
                if first + i < num_videos:
                    path = resize_cameras(index_cameras(output.cameras, i), *judge.image_size)
                    record.update(judge.video(grid, path))
                folder.write("generated", {"samples": rendered.rgb[0]}, judge.fixed_views(grid), record, batch[i])
        on_progress((done + 1) / len(firsts))
    return names


# Real scenes


@torch.no_grad()
def judge_real(
    judge: SceneJudge,
    collection: SceneCollection,
    folder: PictureFolder,
    split: str,
    scenes: RealScenes,
    with_source: bool,
    on_progress: Progress,
    filmed: Container[str] = (),
    processes: Processes = ALONE,
) -> None:
    """Encodes real scenes and looks at them as at generated ones, after the latents, so that a copy would be equal.

    Args:
        split: "train" or "test".
        scenes: of the split; those that are shown get pictures for the sets of images: the set of the split's name,
            and for "test" also `stage1` and `stage2`, rendered by the same cameras.
        with_source: take the views that the encoder sees after the target views.
        filmed: scenes that the network of FVD sees fly-throughs of, along the path of their source cameras: of the
            voxels of stage 1, and for "test" also after the latents.
        processes: those that share the scenes.
    """
    pipeline = judge.pipeline
    scene_ids = processes.share(scenes.scene_ids)
    for i, scene_id in enumerate(scene_ids):
        if not folder.record(split, scene_id).is_file():
            scene = collection.load_scene(scene_id)
            source = Views.stack([scene.source]).to(judge.device)
            before = pipeline.scene_autoencoder.encode(source)
            after = pipeline.latent_autoencoder.decode(pipeline.latent_autoencoder.encode(before))
            turns = 1 if split == "train" else judge.turns  # one of two scenes that are compared is turned
            record = judge.record(after, turns)
            images: dict[str, Tensor] = {}
            record["floating_stage1"] = floating_density(before)[0]
            if scene_id in scenes.shown:
                views = Views.stack([shown_views(scene, scenes.num_views, with_source)]).to(judge.device)
                images, depths = _look(judge, split, views, before, after)
                record.update(depths)
            if scene_id in filmed:
                path = index_cameras(source.cameras, 0)
                record.update(judge.video(before, path))
                if split == "test":
                    record.update({f"{key}_stage2": value for key, value in judge.video(after, path).items()})
            folder.write(split, images, judge.fixed_views(after), record, scene_id)
        on_progress((i + 1) / len(scene_ids))


def shown_views(scene: Scene, count: int, with_source: bool) -> Views:
    """The first views of a scene: those held back from the encoder, then, if wanted, those it sees."""
    views = Views.cat([scene.target, scene.source]) if with_source else scene.target
    return views[:count]


def _look(
    judge: SceneJudge, split: str, views: Views, before: VoxelGrid, after: VoxelGrid
) -> tuple[dict[str, Tensor], Record]:
    """Pictures by set and counts of depth, of a real scene's views `[1, M]`."""
    images, depths = {split: views.images[0]}, {}
    real = judge.real_depth(views)
    if real is not None:
        depths["depth"] = real
    if split == "test":
        for name, grid in (("stage1", before), ("stage2", after)):
            rendered = judge.pipeline.scene_autoencoder.render(grid, views.cameras)
            images[name] = views.covered(rendered.rgb)[0]
            depths[f"depth_{name}"] = judge.rendered_depth(rendered)
    return images, depths
