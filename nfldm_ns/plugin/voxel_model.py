"""What nerfstudio's models of voxel grids have in common: cameras in, pictures out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import Frustums, RayBundle, RaySamples
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.field_components.field_heads import FieldHeadNames
from nerfstudio.fields.base_field import Field
from nerfstudio.model_components import renderers
from nerfstudio.models.base_model import Model
from nerfstudio.viewer.viewer_elements import ViewerCheckbox, ViewerSlider
from torch import Tensor, nn

from nfldm_ns.autoencoder.lifting import box_exit_depth
from nfldm_ns.autoencoder.renderers import ProjectionRenderer
from nfldm_ns.autoencoder.scene_autoencoder import RenderedViews, SceneAutoencoder
from nfldm_ns.errors import UserInputError, exit_on_bad_input
from nfldm_ns.plugin.panorama import panoramic_pictures, render_panorama
from nfldm_ns.plugin.pictures import ray_lengths, render_perspective
from nfldm_ns.scenes.views import make_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid, voxel_centres

EYE_SLAB = (-1.0, 0.5)  # metres about eye height: between floor and ceiling, so that walls show from above
PATCH = 4  # rays on the side of a patch in which all see the same
WIDEST = math.tan(math.radians(55))  # an image plane that reaches further from its axis is no plane for a decoder
FROM_ONE_POINT = (CameraType.PERSPECTIVE, CameraType.FISHEYE, CameraType.EQUIRECTANGULAR, CameraType.FISHEYE624)


class VoxelGridField(Field):
    """One scene's density and feature voxels, and its background if it has one, as a nerfstudio field.

    Args:
        grid: a grid of one scene.
        trainable: makes them parameters.
    """

    def __init__(self, grid: VoxelGrid, trainable: bool = False) -> None:
        super().__init__()
        if grid.batch_size != 1:
            raise ValueError(f"a field holds one scene, not {grid.batch_size}")
        self.density = nn.Parameter(grid.density.float(), requires_grad=trainable)
        self.features = nn.Parameter(grid.features.float(), requires_grad=trainable)
        background = grid.background
        self.background = None if background is None else nn.Parameter(background.float(), requires_grad=trainable)
        self.register_buffer("aabb", grid.aabb.float().clone())
        self._shown: tuple[list[tuple[Tensor, int, int]], VoxelGrid] | None = None

    def grid(self) -> VoxelGrid:
        """The voxels; without gradients the same object until a parameter changes.

        So what is made of it once for all pictures (`TensorCache`) stays.
        """
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return self.make_grid()
        state = [(tensor, tensor._version, tensor.data_ptr()) for tensor in (*self.parameters(), self.aabb)]
        if self._shown is None or len(state) != len(self._shown[0]) or not all(map(_same, state, self._shown[0])):
            self._shown = (state, self.make_grid())
        return self._shown[1]

    def make_grid(self) -> VoxelGrid:
        """The voxels; densities that an optimiser pushed below zero count as empty."""
        return VoxelGrid(self.density.clamp(min=0), self.features, self.aabb, self.background)

    def get_density(
        self, ray_samples: RaySamples
    ) -> tuple[Float[Tensor, "*batch 1"], Float[Tensor, "*batch channels"]]:
        """Trilinear density in 1/m, and the features as embedding."""
        positions = ray_samples.frustums.get_positions()
        density, features = self.grid().sample(positions.reshape(1, -1, 3))
        shape = positions.shape[:-1]
        return density.reshape(*shape, 1), features.reshape(*shape, -1)

    def get_outputs(
        self, ray_samples: RaySamples, density_embedding: Tensor | None = None
    ) -> dict[FieldHeadNames, Tensor]:
        """Features under `FieldHeadNames.SEMANTICS`: colours exist only after the image decoder."""
        if density_embedding is None:
            _, density_embedding = self.get_density(ray_samples)
        return {FieldHeadNames.SEMANTICS: density_embedding}


def _same(now: tuple[Tensor, int, int], before: tuple[Tensor, int, int]) -> bool:
    return now[0] is before[0] and now[1:] == before[1:]


class VoxelModel(Model):
    """Renders the grid of one scene for the viewer and `ns-render`. Subclasses say which grid and which renderer."""

    def populate_modules(self) -> None:
        super().populate_modules()
        low, high = (float(z) for z in self.scene_box.aabb[:, 2])
        default = tuple(min(max(z, low), high) for z in EYE_SLAB)
        self.slab_low = ViewerSlider("From above: lowest z [m]", default[0], low, high, 0.1)
        self.slab_high = ViewerSlider("From above: highest z [m]", default[1], low, high, 0.1)
        self.steady = ViewerCheckbox("Steady pictures", True, hint="off: as in training, with its flicker")

    def shown_grid(self) -> VoxelGrid:
        """The grid of the scene on show, batch size 1."""
        raise NotImplementedError

    def renderer(self) -> SceneAutoencoder:
        """What turns the grid into images."""
        raise NotImplementedError

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """Perspective cameras are rendered exactly as in training, to evaluate or to tune what was trained."""
        steady, self.steady.value = self.steady.value, False
        try:
            yield
        finally:
            self.steady.value = steady

    @exit_on_bad_input()
    @torch.no_grad()
    def get_outputs_for_camera(self, camera: Cameras, obb_box: OrientedBox | None = None) -> dict[str, Tensor]:
        """Pictures of one camera at its own size: perspective, fisheye or equirectangular, distorted or not.

        Features are rendered at the ray density of training, perspective cameras as `render_perspective` describes,
        others and those wider than 110 degrees from a `Panorama`.

        Args:
            camera: one camera, of batch shape `[]` or `[1]`.
            obb_box: only what lies inside is shown, over the background colour that nerfstudio's viewer or camera path
                asks for with it, if it does.

        Returns:
            rgb `[H, W, 3]` in [0, 1]; depth `[H, W, 1]`, metres along the ray as everywhere in nerfstudio;
            accumulation `[H, W, 1]`; density_from_above `[H, W, 1]`, opacity seen from above, north up.

        A camera whose rays do not start at one point ends the command with one sentence.
        """
        grid, renderer = self.shown_grid(), self.renderer()
        if obb_box is not None:
            grid = crop_grid(grid, obb_box)
        camera = camera.reshape((1,)).to(self.device)
        if not is_plane(camera):
            outputs = panoramic_pictures(render_panorama(renderer, grid, camera.camera_to_worlds[0, :, 3]), camera)
        elif self.steady.value:
            outputs = render_perspective(renderer, grid, single_camera(camera))
        else:
            cameras = single_camera(camera)
            outputs = picture_dict(renderer.render(grid, cameras), cameras)
        override = renderers.BACKGROUND_COLOR_OVERRIDE
        if obb_box is not None and override is not None:
            opaque = outputs["accumulation"]
            outputs["rgb"] = opaque * outputs["rgb"] + (1 - opaque) * override.to(opaque)
        height, width = outputs["rgb"].shape[:2]
        outputs["density_from_above"] = density_from_above(
            grid, height, width, self.slab_low.value, self.slab_high.value
        )
        return outputs

    def get_outputs(self, ray_bundle: Any) -> dict[str, Tensor]:
        """Single rays, as `ns-export` asks for them; whole images look better (`get_outputs_for_camera`)."""
        if isinstance(ray_bundle, Cameras):
            return self.get_outputs_for_camera(ray_bundle)
        return ray_pictures(self.renderer(), self.shown_grid(), ray_bundle)

    def get_rgba_image(self, outputs: dict[str, Tensor], output_name: str = "rgb") -> Tensor:
        """`[H, W, 4]`: colours with the accumulation as opacity."""
        return torch.cat([outputs[output_name], outputs["accumulation"]], dim=-1)


def is_plane(camera: Cameras) -> bool:
    """Whether a camera's image is part of one plane that is not too wide: an undistorted perspective camera.

    Raises:
        UserInputError: if its rays do not start at one point.
    """
    kind = CameraType(int(camera.camera_type.reshape(-1)[0]))
    if kind not in FROM_ONE_POINT:
        raise UserInputError(
            f"Cameras of type {kind.name} look from more than one point, which voxel scenes cannot show: choose a "
            "perspective, fisheye or equirectangular camera."
        )
    distorted = camera.distortion_params is not None and bool(camera.distortion_params.any())
    fx, fy, cx, cy, width, height = (
        float(getattr(camera, name).reshape(-1)[0]) for name in ("fx", "fy", "cx", "cy", "width", "height")
    )
    reach = max(cx / fx, (width - cx) / fx, cy / fy, (height - cy) / fy)
    return kind == CameraType.PERSPECTIVE and not distorted and reach < WIDEST


def single_camera(camera: Cameras) -> Cameras:
    """One nerfstudio camera with batch shape `[1, 1]`.

    Raises:
        UserInputError: if it is not a perspective camera.
    """
    if int(camera.camera_type.reshape(-1)[0]) != CameraType.PERSPECTIVE.value:
        raise UserInputError("Voxel scenes are rendered by perspective cameras only: choose that camera type.")
    fx, fy, cx, cy = (getattr(camera, name).reshape(1, 1) for name in ("fx", "fy", "cx", "cy"))
    height, width = (int(size.reshape(-1)[0]) for size in (camera.height, camera.width))
    return make_cameras(camera.camera_to_worlds.reshape(1, 1, 3, 4), fx, fy, cx, cy, height, width)


def picture_dict(rendered: RenderedViews, cameras: Cameras) -> dict[str, Tensor]:
    """The pictures of the one camera of a `[1, 1]` batch, channels last, depth along the ray."""
    rgb, depth, accumulation = (
        image[0, 0].permute(1, 2, 0) for image in (rendered.rgb.clamp(0, 1), rendered.depth, rendered.accumulation)
    )
    return {"rgb": rgb, "depth": depth * ray_lengths(cameras)[0, 0], "accumulation": accumulation}


def crop_grid(grid: VoxelGrid, box: OrientedBox) -> VoxelGrid:
    """Without the density outside a box."""
    centres = voxel_centres(grid.shape, grid.aabb)
    inside = box.within(centres.reshape(-1, 3).to(box.T)).reshape(grid.shape)
    return replace(grid, density=grid.density * inside.to(grid.density))


def density_from_above(
    grid: VoxelGrid, height: int, width: int, low: float, high: float
) -> Float[Tensor, "height width 1"]:
    """Opacity of the layer between two heights (metres) seen from above, north up, centred in an image of any size."""
    centres = voxel_centres(grid.shape, grid.aabb)[:, 0, 0, 2]
    layer = (centres >= low) & (centres <= high)
    thickness = float(grid.voxel_size[2])
    opacity = 1 - torch.exp(-(grid.density[0, 0].float() * layer[:, None, None]).sum(0) * thickness)
    map_height, map_width = ((grid.aabb[1] - grid.aabb[0])[axis].item() for axis in (1, 0))
    scale = min(height / map_height, width / map_width)
    size = (max(1, int(map_height * scale)), max(1, int(map_width * scale)))
    picture = F.interpolate(opacity.flip(0)[None, None], size=size, mode="nearest-exact")[0, 0]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return F.pad(picture, (left, width - size[1] - left, top, height - size[0] - top))[..., None]


@torch.no_grad()
def ray_pictures(renderer: SceneAutoencoder, grid: VoxelGrid, rays: RayBundle) -> dict[str, Tensor]:
    """What single rays see.

    The decoder looks at the features around a pixel, and a ray alone has no neighbours: its colour is that of a patch
    in which all rays see the same, without the detail between pixels. All patches are decoded as one image, because the
    decoder's norms look at the whole of it.

    Returns:
        `rgb [*B, 3]` in [0, 1]; `depth [*B, 1]`, expected distance along the ray in metres, where rays that end nowhere
        reach the box's border; `accumulation [*B, 1]`.

    Raises:
        UserInputError: for scenes whose colours are not those of their density.
    """
    if isinstance(renderer, ProjectionRenderer):
        raise UserInputError(
            "Single rays of this scene have no colours, because a learned projection makes its images (HoloGAN): look "
            "at whole views, or sample a baseline of another rendering."
        )
    shape = rays.origins.shape[:-1]
    outputs = ray_features(grid, rays.flatten(), renderer.config.num_samples)
    directions = rays.directions.reshape(1, 1, -1, 1, 3).movedim(-1, 2)
    beyond = renderer.background(directions, grid.background)[0, 0, :, :, 0].T
    features = outputs.pop("features") + (1 - outputs["accumulation"]) * beyond
    outputs["rgb"] = _patch_colours(renderer, torch.cat([features, outputs["accumulation"]], dim=-1))
    return {name: values.reshape(*shape, -1) for name, values in outputs.items()}


def _patch_colours(
    renderer: SceneAutoencoder, values: Float[Tensor, "rays features_and_accumulation"]
) -> Float[Tensor, "rays 3"]:
    """Colours in the middle of patches, each of one ray's features alone."""
    count = len(values)
    side = math.isqrt(max(count - 1, 0)) + 1
    filled = values[torch.arange(side * side, device=values.device) % count]
    mosaic = filled.reshape(1, side, side, -1).movedim(-1, 1)
    mosaic = mosaic.repeat_interleave(PATCH, dim=-2).repeat_interleave(PATCH, dim=-1)
    features, height = mosaic[:, :-1].contiguous(memory_format=torch.channels_last), mosaic.shape[-2]
    image = renderer.decoder(features, mosaic[:, -1:], height).float()  # no upsampler: there is no detail to add
    size = image.shape[-1] // side
    patches = image.unflatten(-1, (side, size)).unflatten(-3, (side, size))[0].permute(1, 3, 0, 2, 4)
    middle = slice(size // 4, size - size // 4)
    colours = patches[..., middle, middle].mean((-2, -1)).reshape(side * side, 3)[:count]
    return ((colours + 1) / 2).clamp(0, 1)


def ray_features(grid: VoxelGrid, rays: RayBundle, num_samples: int) -> dict[str, Tensor]:
    """Features `[N, C]` of the voxels, expected distance `[N, 1]` and accumulation `[N, 1]` along rays."""
    enter, leave = box_exit_depth(rays.origins, rays.directions, grid.aabb)
    start = torch.minimum(enter.clamp(min=0), leave)
    edges = torch.linspace(0, 1, num_samples + 1, device=grid.device)
    edges = (start[..., None] + (leave - start)[..., None] * edges)[..., None]
    frustums = Frustums(
        rays.origins[..., None, :].expand(*edges.shape[:-2], num_samples, 3),
        rays.directions[..., None, :].expand(*edges.shape[:-2], num_samples, 3),
        edges[..., :-1, :],
        edges[..., 1:, :],
        torch.ones_like(edges[..., :-1, :]),
    )
    samples = RaySamples(frustums, deltas=edges[..., 1:, :] - edges[..., :-1, :])
    density, features = VoxelGridField(grid).get_density(samples)
    weights = samples.get_weights(density)
    accumulation = weights.sum(-2)
    middles = (frustums.starts + frustums.ends) / 2
    return {
        "features": (weights * features).sum(-2),
        "depth": (weights * middles).sum(-2) + (1 - accumulation) * leave[..., None],
        "accumulation": accumulation,
    }
