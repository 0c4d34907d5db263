"""Stage 1: the scene auto-encoder of the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import get_args

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor, nn

from nfldm_ns.autoencoder.background import BACKGROUND_MOMENTS, Background, background_code
from nfldm_ns.autoencoder.decoder import UPSAMPLING, ImageDecoder
from nfldm_ns.autoencoder.encoder import ImageEncoder
from nfldm_ns.autoencoder.lifting import DepthSpacing, Fusion, Splatting, box_exit_depth, depth_bins, fuse_frustums
from nfldm_ns.autoencoder.refinement import GridRefiner, edge_error, refine_grid
from nfldm_ns.autoencoder.renderer import FeatureMaps, render_feature_maps
from nfldm_ns.scenes.views import Views, camera_rays, resize_cameras, valid_cells
from nfldm_ns.scenes.voxel_grid import VoxelGrid

REFINEMENT_DEPTH_WEIGHT = 0.1  # of depth errors in metres beside those of colours, as in the presets' losses
ATTENTION_RANGE = 4.0  # logits by which views are weighted stay within plus and minus this


@dataclass
class RenderedViews:
    """Rendered images of `[B, M]` cameras.

    Attributes:
        rgb: `[B, M, 3, H, W]`; in [0, 1] but not clamped, so that losses keep their gradients.
        depth: `[B, M, 1, H, W]`, expected planar depth in metres.
        accumulation: `[B, M, 1, H, W]` in [0, 1].
        maps: the same at the resolution of the rays, with the features.
    """

    rgb: Float[Tensor, "batch views 3 height width"]
    depth: Float[Tensor, "batch views 1 height width"]
    accumulation: Float[Tensor, "batch views 1 height width"]
    maps: FeatureMaps


class SceneAutoencoder(ModelMixin, ConfigMixin):
    """Images with poses to voxels (`encode`), and voxels to images of any camera (`render`).

    Args:
        grid_shape: voxels (Z, Y, X).
        feature_channels: C of the voxels.
        aabb: corners of the box in metres.
        near, far: planar depth in metres; bins for lifting lie between `near` and the far corner of the box.
        image_size: (height, width) of the images it is trained on.
        focal_length: horizontal focal length in pixels at `image_size`; with the image's size it fixes the ray density
            at which features are rendered whatever size is asked for.
        max_focal_length: the largest one, where cameras differ and `focal_length` is the smallest; None if they do not.
        feature_stride: image pixels per feature pixel, for encoder and decoder alike.
        num_depth_bins: D.
        depth_spacing: "linear", "inverse" or "log", see `depth_bins`.
        encoder_input: "rgbd" takes depth where a view has it, as input and as prior of the densities; "rgb" is the
            paper's way.
        density_from: "views", the paper's: the image encoder gives explicit densities along its rays; "voxels", its
            ablation: they are predicted from the fused features.
        fusion: "attention", "occupancy" or "mean" (the paper's), see `fuse_frustums`.
        splatting: "filled", "nearest" or "trilinear", see there too.
        background_channels: K of the code of what lies beyond the box, see `Background`.
        background_implementation: of its network: "torch", or "tcnn" where tiny-cuda-nn is there; weights of one do not
            fit the other.
        num_samples, num_feature_samples: per rendered ray, see `render_feature_maps`.
        encoder_channels, encoder_blocks, decoder_channels, decoder_blocks: network sizes.
        decoder_upsampling_channels: width of an `ImageUpsampler` that makes images of `image_size` of images half as
            large; the encoder looks at images of half the size, too. 0 for none.
        refinement_channels: width of `GridRefiner`; 0 leaves V as it is fused.
        refinement_steps: how often it changes V, unless `encode` is told otherwise.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        grid_shape: tuple[int, int, int] = (16, 48, 48),
        feature_channels: int = 16,
        aabb: tuple[tuple[float, float, float], tuple[float, float, float]] = ((-10, -10, -2.5), (10, 10, 4)),
        near: float = 0.1,
        far: float = 30.0,
        image_size: tuple[int, int] = (64, 64),
        focal_length: float = 51.2,
        max_focal_length: float | None = None,
        feature_stride: int = 2,
        num_depth_bins: int = 40,
        depth_spacing: str = "linear",
        encoder_input: str = "rgbd",
        density_from: str = "views",
        fusion: str = "attention",
        splatting: str = "filled",
        background_channels: int = 8,
        background_implementation: str = "torch",
        num_samples: int = 48,
        num_feature_samples: int | None = 8,
        encoder_channels: tuple[int, ...] = (32, 64),
        encoder_blocks: int = 1,
        decoder_channels: tuple[int, ...] = (48, 24),
        decoder_blocks: int = 1,
        decoder_upsampling_channels: int = 0,
        refinement_channels: int = 0,
        refinement_steps: int = 2,
    ) -> None:
        super().__init__()
        choices = {
            "encoder_input": (encoder_input, ("rgb", "rgbd")),
            "density_from": (density_from, ("views", "voxels")),
            "depth_spacing": (depth_spacing, get_args(DepthSpacing)),
            "fusion": (fusion, get_args(Fusion)),
            "splatting": (splatting, get_args(Splatting)),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
        box = torch.tensor(aabb, dtype=torch.float32)
        self.register_buffer("box", box, persistent=False)
        reach = math.hypot(*(max(abs(low), abs(high)) for low, high in zip(*aabb, strict=True)))
        centres, widths = depth_bins(near, min(far, reach), num_depth_bins, depth_spacing)  # type: ignore[arg-type]
        self.register_buffer("bin_centres", centres, persistent=False)
        self.register_buffer("bin_widths", widths, persistent=False)
        self.encoder = ImageEncoder(
            5 if encoder_input == "rgbd" else 3,
            num_depth_bins if density_from == "views" else 0,
            feature_channels,
            feature_stride // self.upsampling,
            tuple(encoder_channels),
            encoder_blocks,
            extra_channels=background_channels + (fusion == "attention"),
        )
        self.decoder = ImageDecoder(
            feature_channels, feature_stride, tuple(decoder_channels), decoder_blocks, decoder_upsampling_channels
        )
        self.density_bias = nn.Parameter(torch.tensor(-3.0))
        if density_from == "voxels":
            self.density_head = nn.Sequential(nn.Linear(feature_channels, 32), nn.SiLU(), nn.Linear(32, 1))
        elif encoder_input == "rgbd":
            # Densities (1/m before softplus) that a measured depth adds at the surface and removes before it, and that
            # the lack of one removes along the ray.
            self.prior_surface = nn.Parameter(torch.tensor(16.0))
            self.prior_empty = nn.Parameter(torch.tensor(5.0))
            self.prior_unknown = nn.Parameter(torch.tensor(5.0))
        self.background = Background(background_channels, feature_channels, background_implementation)
        self.refiner = GridRefiner(feature_channels, refinement_channels) if refinement_channels else None

    @property
    def aabb(self) -> Float[Tensor, "2 3"]:
        """Corners of the box in metres."""
        return self.box

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        return tuple(self.config.grid_shape)

    @property
    def feature_channels(self) -> int:
        return self.config.feature_channels

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) it is trained on."""
        return tuple(self.config.image_size)

    @property
    def upsampling(self) -> int:
        """How many times larger images are than those that the encoder looks at, and that a ray density is of."""
        return UPSAMPLING if self.config.decoder_upsampling_channels else 1

    @property
    def encoded_size(self) -> tuple[int, int]:
        """(height, width) of the images that the encoder was trained on; those of `image_size` are shrunk to it."""
        height, width = self.image_size
        return height // self.upsampling, width // self.upsampling

    @property
    def background_shape(self) -> tuple[int, int]:
        """Of a scene's code of what lies beyond the box."""
        return self.config.background_channels, BACKGROUND_MOMENTS

    def pack_channels_last(self) -> SceneAutoencoder:
        """Lays out the weights of the networks of images as CPUs and GPUs convolve fastest; returns itself.

        The refinement's are of volumes, whose channels this layout does not know.
        """
        for network in (self.encoder, self.decoder):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    @apply_forward_hook
    def encode(self, views: Views, refinement_steps: int | None = None) -> VoxelGrid:
        """Source views of batch shape `[B, N]`, any number of them, to one grid per scene.

        Masked pixels have no say in it: the encoder sees a constant in their place, and no feature pixel that holds one
        becomes a part of V or of the background's code. Where an upsampler makes the images, views of their size are
        shrunk to the size before it.

        Args:
            refinement_steps: of learned refinement (`refine`); by default as configured, 0 for none.
        """
        views = self.as_encoded(views)
        grid = self._encode_fused(views)
        if refinement_steps is None:
            refinement_steps = 0 if self.refiner is None else self.config.refinement_steps
        return self.refine(grid, views, refinement_steps) if refinement_steps else grid

    def refine(self, grid: VoxelGrid, views: Views, num_steps: int) -> VoxelGrid:
        """V after so many steps of learned refinement on the views that it was made of, see `refine_grid`.

        It needs gradients: `torch.no_grad` is fine, but there are none in `torch.inference_mode`.

        Raises:
            RuntimeError: in `torch.inference_mode`.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("Learned refinement takes gradients, and torch.inference_mode has none: use no_grad.")
        if self.refiner is None:
            raise ValueError("this scene auto-encoder has no refinement: train one with refinement_channels")
        views = self.as_encoded(views)
        return refine_grid(self.refiner, grid, num_steps, lambda shown: self._view_error(shown, views))

    def as_encoded(self, views: Views) -> Views:
        """Views of the size that the encoder was trained on, where they have that of the upsampler's images."""
        if self.upsampling > 1 and views.image_size[0] >= self.image_size[0]:
            return shrink_views(views, self.upsampling)
        return views

    def _view_error(self, grid: VoxelGrid, views: Views) -> Float[Tensor, ""]:
        """How far V is from showing these views: colours, edges, and depth where it is known."""
        rendered = self.render(grid, views.cameras)
        error = edge_error(views.covered(rendered.rgb), views.images)
        if views.depths is not None and self.config.encoder_input == "rgbd":
            far, known = depth_errors(rendered.maps, views.depths)
            error = error + REFINEMENT_DEPTH_WEIGHT * (far * known).mean()
        return error * views.shape[0]

    def _encode_fused(self, views: Views) -> VoxelGrid:
        batch, num_views = views.shape
        logits, features, extra = (
            output.float().unflatten(0, (batch, num_views)) for output in self._encode_images(views)
        )
        beyond, attention = extra.tensor_split([self.config.background_channels], dim=2)
        h, w = features.shape[-2:]
        _, directions = camera_rays(views.cameras, h, w)
        valid = None if views.masks is None else valid_cells(views.masks, h, w)[:, :, 0]
        density = None
        leaves = torch.ones_like(features[:, :, 0])
        if self.config.density_from == "views":
            if self.config.encoder_input == "rgbd" and views.depths is not None:
                logits = logits + self._depth_prior(views, h, w)
            density = F.softplus(logits + self.density_bias)
            optical_depth = torch.einsum("bndhw,d->bnhw", density, self.bin_widths) * directions.norm(dim=-1)
            leaves = torch.exp(-optical_depth)
        grid = fuse_frustums(
            density,
            features,
            views.cameras,
            self.bin_centres,
            self.bin_widths,
            self.aabb,
            self.grid_shape,
            self.config.fusion,
            self.config.splatting,
            ATTENTION_RANGE * torch.tanh(attention[:, :, 0]) if self.config.fusion == "attention" else None,
            valid,
        )
        if density is None:
            logits = self.density_head(grid.features.movedim(1, -1)).movedim(-1, 1)
            grid.density = F.softplus(logits + self.density_bias)
        grid.background = background_code(beyond, leaves if valid is None else leaves * valid, directions)
        return grid

    def _encode_images(self, views: Views) -> tuple[Tensor, Tensor, Tensor]:
        inputs = views.images * 2 - 1
        if self.config.encoder_input == "rgbd":
            depths = views.depths if views.depths is not None else torch.zeros_like(views.images[..., :1, :, :])
            inputs = torch.cat([inputs, depths / self.bin_centres[-1], (depths > 0).to(depths.dtype)], dim=-3)
        if views.masks is not None:
            inputs = torch.where(views.masks, inputs, 0)
        inputs = inputs.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return self.encoder(inputs)

    def _depth_prior(self, views: Views, h: int, w: int) -> Float[Tensor, "batch views bins h w"]:
        """Logits that put density at the measured surface and none before it.

        Surfaces beyond the box are painted onto its border, where the ray leaves it. A pixel without a reading may be a
        sky: it starts with no density, the more so the more of its view was measured.
        """
        assert views.depths is not None
        depth = downsample_depth(views.depths, h, w)
        origins, directions = camera_rays(views.cameras, h, w)
        _, leave = box_exit_depth(origins[:, :, None, None].expand_as(directions), directions, self.aabb)
        known = depth > 0
        border = leave[:, :, None] - self.bin_widths[0]
        surface = torch.minimum(depth, border)
        centres = self.bin_centres.view(-1, 1, 1)
        distance = (centres - surface) / self.bin_widths.view(-1, 1, 1)
        at_surface = (1 - distance.abs()).clamp(min=0)
        before = (-distance).clamp(min=0, max=1)
        surface_logits = self.prior_surface * at_surface - self.prior_empty * before
        return torch.where(known, surface_logits, -self.prior_unknown * measured_share(views))

    @apply_forward_hook
    def render(
        self,
        grid: VoxelGrid,
        cameras: Cameras,
        height: int | None = None,
        width: int | None = None,
        skipping: bool | None = None,
    ) -> RenderedViews:
        """Renders a grid from cameras of batch shape `[B, M]`.

        Args:
            height, width: size of the images; by default that of the cameras. Features are rendered at the ray density
                of training and the decoded image is resized to what was asked for.
            skipping: whether rays skip empty and hidden space, see `render_feature_maps`.
        """
        height = height or int(cameras.height.reshape(-1)[0])
        width = width or int(cameras.width.reshape(-1)[0])
        return self.decode(self.render_maps(grid, cameras, skipping), height, width)

    @apply_forward_hook
    def render_maps(self, grid: VoxelGrid, cameras: Cameras, skipping: bool | None = None) -> FeatureMaps:
        """What `render` decodes: features of cameras of shape `[B, M]` at the ray density of training."""
        rows, columns = self._ray_grid(cameras)
        return self.feature_maps(grid, cameras, rows, columns, self.config.num_feature_samples, skipping)

    @apply_forward_hook
    def feature_maps(
        self,
        grid: VoxelGrid,
        cameras: Cameras,
        rows: int,
        columns: int,
        num_feature_samples: int | None,
        skipping: bool | None = None,
    ) -> FeatureMaps:
        """What `rows` x `columns` rays of cameras of shape `[B, M]` see: voxels, and beyond them the background."""
        maps = render_feature_maps(
            grid, cameras, rows, columns, self.config.near, self.config.num_samples, num_feature_samples, skipping
        )
        beyond = self.background(maps.directions, grid.background)
        return replace(maps, features=maps.features + (1 - maps.accumulation) * beyond, background=beyond)

    def _ray_grid(self, cameras: Cameras) -> tuple[int, int]:
        """Rows and columns of rays, so that a ray covers an angle as in training.

        Cameras of one size share a grid: of their focal lengths their mean counts, and any that was trained on, of the
        trained size, has the grid of training.
        """
        focal, trained = float(cameras.fx.double().mean()), float(self.config.focal_length)
        trained = min(max(focal, trained), float(self.config.max_focal_length or trained))
        stride = self.config.feature_stride * focal / trained
        sizes = (int(cameras.height.reshape(-1)[0]), int(cameras.width.reshape(-1)[0]))
        rows, columns = (max(4, round(size / stride)) for size in sizes)
        return rows, columns

    @apply_forward_hook
    def decode(self, maps: FeatureMaps, height: int, width: int) -> RenderedViews:
        """Feature maps to images of `height` x `width` pixels."""
        batch, num_views = maps.features.shape[:2]
        image = decode_images(self.decoder, maps.features.flatten(0, 1), maps.accumulation.flatten(0, 1), height, width)
        rgb = image.unflatten(0, (batch, num_views))

        def resize(values: Tensor) -> Tensor:
            return F.interpolate(values.flatten(0, 1), size=(height, width), mode="bilinear").unflatten(
                0, (batch, num_views)
            )

        return RenderedViews(rgb, resize(maps.depth), resize(maps.accumulation), maps)

    def grow_decoder(self, num_blocks: int | None = None, upsampling_channels: int | None = None) -> None:
        """Gives the image decoder more residual blocks per level, an upsampler, or both.

        New blocks begin as identities, and a new upsampler as an interpolation: images stay what they are. With one
        `image_size` is twice as large; V is encoded as before.

        Raises:
            ValueError: if it has more blocks already, or an upsampler of another width.
        """
        config = self.config
        num_blocks = config.decoder_blocks if num_blocks is None else num_blocks
        if num_blocks < config.decoder_blocks:
            raise ValueError(f"the image decoder has {config.decoder_blocks} blocks per level already: it only grows")
        old = config.decoder_upsampling_channels
        upsampling_channels = old if upsampling_channels is None else upsampling_channels
        if old not in (0, upsampling_channels):
            raise ValueError(f"the image decoder has an upsampler of width {old} already")
        scale = 1 if old == upsampling_channels else UPSAMPLING
        stride, sizes = scale * config.feature_stride, (tuple(config.decoder_channels), num_blocks)
        grown = ImageDecoder(config.feature_channels, stride, *sizes, upsampling_channels)
        grown.load_state_dict({**grown.state_dict(), **self.decoder.state_dict()})
        self.decoder = grown.to(self.decoder.out.weight)
        farthest = config.max_focal_length
        self.register_to_config(
            decoder_blocks=num_blocks,
            decoder_upsampling_channels=upsampling_channels,
            feature_stride=stride,
            image_size=tuple(scale * size for size in self.image_size),
            focal_length=scale * config.focal_length,
            max_focal_length=None if farthest is None else scale * farthest,
        )


def decode_images(
    decoder: nn.Module,
    features: Float[Tensor, "batch channels h w"],
    accumulation: Float[Tensor, "batch 1 h w"],
    height: int,
    width: int,
) -> Float[Tensor, "batch 3 height width"]:
    """What an image decoder makes of rendered features, in [0, 1] but not clamped, at the size that was asked for."""
    image = decoder(features.contiguous(memory_format=torch.channels_last), accumulation, height)
    image = (image.float() + 1) / 2
    if image.shape[-2:] == (height, width):
        return image
    smaller = height < image.shape[-2]
    return F.interpolate(image, size=(height, width), mode="bilinear", align_corners=False, antialias=smaller)


def depth_errors(
    maps: FeatureMaps, depths: Float[Tensor, "batch views 1 height width"]
) -> tuple[Float[Tensor, "batch views 1 h w"], Bool[Tensor, "batch views 1 h w"]]:
    """Absolute errors (m) of expected depth at the rays' resolution, and where depth is known.

    Surfaces beyond the box count as lying on its border: that is where the encoder paints them.
    """
    depth = downsample_depth(depths, *maps.depth.shape[-2:])
    return (maps.depth - torch.minimum(depth, maps.exit_depth)).abs(), depth > 0


def shrink_views(views: Views, scale: int) -> Views:
    """Views of 1 / `scale` of the size: mean colours, the nearest known depth, masks where all of a pixel is valid.

    Raises:
        ValueError: for sizes that are no multiple of it.
    """
    height, width = (size // scale for size in views.image_size)
    if (height * scale, width * scale) != tuple(views.image_size):
        raise ValueError(f"images of {views.image_size} pixels cannot be shrunk to 1 / {scale}")
    images = F.avg_pool2d(views.images.flatten(0, -4), scale).unflatten(0, views.images.shape[:-3])
    return Views(
        resize_cameras(views.cameras, height, width),
        images,
        None if views.depths is None else downsample_depth(views.depths, height, width),
        None if views.masks is None else valid_cells(views.masks, height, width),
    )


def measured_share(views: Views) -> Float[Tensor, "*batch 1 1 1"]:
    """Share of each view's valid pixels whose depth is known."""
    assert views.depths is not None
    known = (views.depths > 0).to(views.depths)
    if views.masks is None:
        return known.mean((-2, -1), keepdim=True)
    return known.sum((-2, -1), keepdim=True) / views.masks.sum((-2, -1), keepdim=True).clamp(min=1)


def downsample_depth(depths: Float[Tensor, "*batch 1 height width"], h: int, w: int) -> Float[Tensor, "*batch 1 h w"]:
    """The nearest known depth of each cell: never a mean across an edge; 0 where all is unknown."""
    height, width = depths.shape[-2:]
    if height % h or width % w:
        return F.interpolate(depths.flatten(0, -4), size=(h, w), mode="nearest-exact").reshape(*depths.shape[:-2], h, w)
    cells = depths.unflatten(-2, (h, height // h)).unflatten(-1, (w, width // w))
    cells = cells.movedim(-3, -2).flatten(-2)
    nearest = torch.where(cells > 0, cells, torch.inf).amin(-1)
    return torch.where(nearest.isinf(), torch.zeros_like(nearest), nearest)
