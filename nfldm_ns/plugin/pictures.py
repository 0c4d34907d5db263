"""Pictures of one scene for people to look at: perspective cameras of any size and field of view.

Training renders exactly the views it has (`SceneAutoencoder.render`). The viewer and `ns-render` ask for anything, so:

- rays always have the density of training, on a grid that covers at least the trained field of view and more than the
  image, and the image is resampled from it: it looks the same at every size, in a crop as in the whole;
- features are read at all samples of a ray, not only where the weights are largest: nothing jumps as the camera moves;
- the image decoder, which treats the pixels of one feature cell differently, runs once for every position of its cells
  along their diagonal, and the mean is shown: its pattern does not stick to the screen.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.autoencoder.decoder import UPSAMPLING_BLOCKS
from nfldm_ns.autoencoder.renderer import FeatureMaps
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.scenes.views import make_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid


def render_perspective(
    autoencoder: SceneAutoencoder,
    grid: VoxelGrid,
    camera: Cameras,
    *,
    num_feature_samples: int | None = None,
    phases: int | None = None,
) -> dict[str, Tensor]:
    """Pictures of an undistorted perspective camera at its own size.

    Args:
        grid: of one scene.
        camera: batch shape `[1, 1]`.
        num_feature_samples, phases: see `render_steadily`.

    Returns:
        rgb `[H, W, 3]` in [0, 1], depth `[H, W, 1]` in metres along the ray, accumulation `[H, W, 1]`.
    """
    focal, (trained_height, trained_width) = autoencoder.config.focal_length, autoencoder.image_size
    if float(camera.fy) <= (base := focal / autoencoder.upsampling):  # an upsampler's detail would not be seen
        focal, (trained_height, trained_width) = base, autoencoder.encoded_size
    stride = _stride(autoencoder, focal)
    height, width = (int(size) for size in (camera.height, camera.width))
    scale_y, scale_x = focal / float(camera.fy), focal / float(camera.fx)
    rows, top = _covering(height * scale_y, stride, trained_height)
    columns, left = _covering(width * scale_x, stride, trained_width)
    cover = make_cameras(
        camera.camera_to_worlds,
        focal,
        focal,
        float(camera.cx) * scale_x + left,
        float(camera.cy) * scale_y + top,
        rows,
        columns,
    )
    image = render_steadily(autoencoder, grid, cover, num_feature_samples=num_feature_samples, phases=phases)[0]

    def resample(channels: Tensor, cubic: bool) -> Tensor:
        down = resampling_weights(height, scale_y, top, rows, cubic=cubic).to(channels)
        across = resampling_weights(width, scale_x, left, columns, cubic=cubic).to(channels)
        return (down @ channels @ across.T).permute(1, 2, 0)

    surfaces = resample(image[3:], cubic=False)
    return {
        "rgb": resample(image[:3], cubic=True).clamp(0, 1),
        "depth": surfaces[..., :1] * ray_lengths(camera)[0, 0],
        "accumulation": surfaces[..., 1:],
    }


def _stride(autoencoder: SceneAutoencoder, focal: float) -> int:
    """Image pixels per feature pixel of cameras of this focal length: that of training, or that before an upsampler."""
    return round(autoencoder.config.feature_stride * focal / autoencoder.config.focal_length)


def _covering(size: float, stride: int, trained: int) -> tuple[int, float]:
    """Whole feature cells that cover `size` decoded pixels and the trained size: their pixels, and those before."""
    pixels = max(trained, math.ceil(size / stride - 1e-3) * stride)
    return pixels, (pixels - size) / 2


def render_steadily(
    autoencoder: SceneAutoencoder,
    grid: VoxelGrid,
    cameras: Cameras,
    *,
    num_feature_samples: int | None = None,
    phases: int | None = None,
) -> Float[Tensor, "views 5 height width"]:
    """Decoded images whose content depends neither on where their borders nor on where the decoder's cells lie.

    All views are decoded side by side as one image: the decoder's normalisation is the same for all of them.

    Args:
        cameras: batch shape `[1, M]`; their focal length is that of training, or as much shorter as an upsampler makes
            images larger, which then has no say; their size is whole feature cells.
        num_feature_samples: features per ray as in `render_feature_maps`; None reads all.
        phases: positions of the cells over which the mean is taken; by default all on their diagonal, in pixels before
            an upsampler.

    Returns:
        colours, expected planar depth in metres and accumulation.
    """
    stride, views = _stride(autoencoder, float(cameras.fx.reshape(-1)[0])), cameras.shape[1]
    height, width = (int(size.reshape(-1)[0]) for size in (cameras.height, cameras.width))
    margin = decoder_reach(autoencoder, stride == autoencoder.config.feature_stride) * stride
    mean = torch.zeros(views, 5, height, width, device=grid.device)
    positions = autoencoder.config.feature_stride // autoencoder.upsampling
    phases = phases or positions
    for phase in range(phases):
        before = margin + phase * stride // positions
        size = (height + 2 * margin + stride, width + 2 * margin + stride)
        wider = make_cameras(
            cameras.camera_to_worlds,
            cameras.fx[..., 0],
            cameras.fy[..., 0],
            cameras.cx[..., 0] + before,
            cameras.cy[..., 0] + before,
            *size,
        )
        tiled = _side_by_side(autoencoder, grid, wider, num_feature_samples, stride)
        decoded = autoencoder.decode(tiled, size[0], size[1] * views)
        images = torch.cat([decoded.rgb, decoded.depth, decoded.accumulation], dim=2)[0, 0]
        images = images.unflatten(-1, (views, size[1])).movedim(-2, 0)
        mean += images[..., before : before + height, before : before + width] / phases
    return mean


def _side_by_side(
    autoencoder: SceneAutoencoder, grid: VoxelGrid, cameras: Cameras, num_feature_samples: int | None, stride: int
) -> FeatureMaps:
    """The feature maps of M cameras as one, M times as wide; one camera at a time, to save memory."""
    rows, columns = (int(size.reshape(-1)[0]) // stride for size in (cameras.height, cameras.width))
    maps = [
        autoencoder.feature_maps(grid, cameras[:, i : i + 1], rows, columns, num_feature_samples)
        for i in range(cameras.shape[1])
    ]
    fields = ("features", "depth", "accumulation", "exit_depth", "directions")
    return FeatureMaps(*(torch.cat([getattr(view, field) for view in maps], dim=-1) for field in fields))


def decoder_reach(autoencoder: SceneAutoencoder, upsampled: bool = True) -> int:
    """Feature cells from an image's border at which the decoder no longer notices it.

    Args:
        upsampled: whether an upsampler, where there is one, has a say.
    """
    config = autoencoder.config
    stride = config.feature_stride // autoencoder.upsampling
    blocks = sum(2 * config.decoder_blocks / 2**level for level in range(len(config.decoder_channels)))
    reach = 1 + blocks + 1 / stride
    if upsampled and autoencoder.upsampling > 1:
        convolutions = 1 + 2 * UPSAMPLING_BLOCKS  # of 3 x 3, at either size
        reach += convolutions / stride + convolutions / config.feature_stride
    return math.ceil(reach)


def resampling_weights(
    count: int, scale: float, start: float, size: int, *, cubic: bool
) -> Float[Tensor, "count size"]:
    """Weights with which each of `count` pixels is interpolated from `size` pixels, antialiased where it shrinks.

    Pixel i covers `[start + i * scale, start + (i + 1) * scale]` of the source, whose pixels are 1 wide. Kernels are
    the triangle or Keys' cubic (a = -0.5), as wide as the larger pixel, as in Pillow.
    """
    centres = start + (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) * scale
    x = ((torch.arange(size) + 0.5 - centres) / max(1.0, scale)).abs()
    if cubic:
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    else:
        weights = (1 - x).clamp(min=0)
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def ray_lengths(cameras: Cameras) -> Float[Tensor, "*batch height width 1"]:
    """Length of the rays of each pixel per metre of planar depth."""
    height, width = int(cameras.height.reshape(-1)[0]), int(cameras.width.reshape(-1)[0])
    rows = torch.arange(height, device=cameras.device) + 0.5
    columns = torch.arange(width, device=cameras.device) + 0.5
    x = (columns - cameras.cx) / cameras.fx
    y = (rows - cameras.cy) / cameras.fy
    return (1 + x[..., None, :].square() + y[..., :, None].square()).sqrt()[..., None]
