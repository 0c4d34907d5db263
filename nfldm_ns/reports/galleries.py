"""Pictures of views, depth, maps and voxels, as labelled grids and videos."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.voxel_grid import VoxelGrid, voxel_centres
from nfldm_ns.scenes.writing import atomic_path

if TYPE_CHECKING:
    from nfldm_ns.scenes.collection import BevClass

UNKNOWN_COLOR = 0.15
BACKGROUND = (255, 255, 255)
TEXT_COLOR = (30, 30, 30)

Images = Float[Tensor, "*batch 3 height width"]
Colormap = Literal["turbo", "viridis", "magma", "inferno", "cividis", "gray"]


# Colours


def color_values(
    values: Float[Tensor, "*batch 1 height width"], low: float, high: float, colormap: Colormap = "turbo"
) -> Images:
    """Colours of values over the fixed range from `low` to `high`, so that pictures can be compared."""
    from nerfstudio.utils.colormaps import apply_float_colormap  # matplotlib takes a while

    if not high > low:
        raise ValueError(f"the range from {low} to {high} is empty")
    unit = ((values.float() - low) / (high - low)).clamp(0, 1).nan_to_num()
    return apply_float_colormap(unit.movedim(-3, -1), colormap).movedim(-1, -3)


def depth_colors(depths: Float[Tensor, "*batch 1 height width"], near: float, far: float) -> Images:
    """Depth in metres from blue (near) to red (far); unknown depth (0) is dark grey."""
    return torch.where(depths > 0, color_values(depths, near, far), UNKNOWN_COLOR)


def error_colors(predicted: Images, true: Images, largest: float = 0.5) -> Images:
    """Mean absolute error over the colour channels, from black (0) to bright (`largest` or more)."""
    error = (predicted.clamp(0, 1) - true).abs().mean(dim=-3, keepdim=True)
    return color_values(error, 0, largest, "inferno")


def bev_colors(bev: UInt8[np.ndarray, "height width"], classes: Sequence[BevClass]) -> Float[Tensor, "3 height width"]:
    """A semantic map in the colours of its classes."""
    palette = np.zeros((256, 3), np.float32)
    for bev_class in classes:
        palette[bev_class.id] = np.asarray(bev_class.color, np.float32) / 255
    return torch.from_numpy(palette[bev]).permute(2, 0, 1)


def density_from_above(grid: VoxelGrid, below_m: float = 0.5) -> Float[Tensor, "batch 3 y x"]:
    """The voxels' density seen from above, north up, as a map.

    Colour is the height at which a ray going down ends (dark low, bright high, over the height of the box), white is
    where nothing stops it.

    Args:
        grid: any scenes.
        below_m: only voxels whose centres lie lower than this many metres above the origin (eye height), or the ceiling
            would hide the room.
    """
    heights = voxel_centres(grid.shape, grid.aabb)[:, 0, 0, 2]
    shown = (heights < below_m).nonzero().flatten()
    if len(shown) == 0:
        raise ValueError(f"no voxel lies lower than {below_m} m")
    density = grid.density[:, 0, shown].float().flip(1)  # from the top
    alpha = 1 - torch.exp(-density * grid.voxel_size[2])
    through = torch.cumprod(1 - alpha, dim=1)
    weights = alpha * torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], dim=1)
    opacity = weights.sum(dim=1, keepdim=True)
    height = (weights * heights[shown].flip(0)[:, None, None]).sum(dim=1, keepdim=True) / opacity.clamp(min=1e-6)
    colors = color_values(height, float(grid.aabb[0, 2]), below_m, "viridis")
    return (opacity * colors + 1 - opacity).flip(-2)


# Grids


def to_uint8(image: Float[Tensor, "3 height width"]) -> UInt8[np.ndarray, "height width 3"]:
    """An image in [0, 1] as 8-bit RGB, channels last."""
    return image.detach().float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()


def strip(pictures: Sequence[Float[Tensor, "3 height width"]], gap: int = 2) -> Float[Tensor, "3 height total_width"]:
    """Pictures of one height side by side, white between them."""
    white = torch.ones(3, pictures[0].shape[1], gap)
    return torch.cat([part for picture in pictures for part in (white, picture)][1:], dim=2)


def stack(pictures: Sequence[Float[Tensor, "3 height width"]], gap: int = 2) -> Float[Tensor, "3 total_height width"]:
    """Pictures of one width below each other, white between them."""
    white = torch.ones(3, gap, pictures[0].shape[2])
    return torch.cat([part for picture in pictures for part in (white, picture)][1:], dim=1)


def image_grid(
    columns: Mapping[str, Iterable[Float[Tensor, "3 height width"]]],
    row_labels: Sequence[str] = (),
    tile_size: int = 128,
    gap: int = 4,
) -> Image.Image:
    """One picture of labelled columns of images, row by row.

    Args:
        columns: images in [0, 1] by label, for example `{"source": ..., "render": ..., "depth": ...}`; the columns may
            differ in length and image size.
        row_labels: written to the left of the rows; they may have several lines.
        tile_size: images are enlarged by whole factors until they are at least this high (pixels stay visible), and all
            tiles get the height of the largest.
        gap: white space between tiles in pixels.
    """
    tiles = {label: [_enlarge(to_uint8(image), tile_size) for image in images] for label, images in columns.items()}
    everything = [tile for column in tiles.values() for tile in column]
    if not everything:
        raise ValueError("there are no images for a grid")
    height = max(tile.height for tile in everything)
    num_rows = max(len(column) for column in tiles.values())
    font = _font(max(12, height // 9))
    lines = [line for label in row_labels for line in label.splitlines()]
    margin = max((int(font.getlength(line)) + 2 * gap for line in lines), default=gap)
    label_height = int(font.size * 1.5)
    widths = {
        label: max([*(tile.width for tile in column), int(font.getlength(label))]) for label, column in tiles.items()
    }
    canvas = Image.new(
        "RGB", (margin + sum(widths.values()) + gap * len(widths), label_height + num_rows * (height + gap)), BACKGROUND
    )
    draw = ImageDraw.Draw(canvas)
    for row, label in enumerate(row_labels):
        middle = label_height + row * (height + gap) + height // 2
        draw.text((gap, middle), label, TEXT_COLOR, font=font, anchor="lm")
    x = margin
    for label, column in tiles.items():
        draw.text((x + widths[label] // 2, label_height // 2), label, TEXT_COLOR, font=font, anchor="mm")
        for row, tile in enumerate(column):
            canvas.paste(tile, (x, label_height + row * (height + gap)))
        x += widths[label] + gap
    return canvas


def write_png(path: Path, picture: Image.Image | Float[Tensor, "3 height width"]) -> None:
    """Writes a picture in one step."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(to_uint8(picture))
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", optimize=True)


def _enlarge(image: UInt8[np.ndarray, "height width 3"], tile_size: int) -> Image.Image:
    factor = max(1, -(-tile_size // image.shape[0]))
    return Image.fromarray(image.repeat(factor, axis=0).repeat(factor, axis=1))


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


# Videos


def write_video(
    path: Path, frames: Iterable[Float[Tensor, "3 height width"]], fps: float = 24.0, min_height: int = 256
) -> None:
    """Writes an mp4 (H.264, yuv420p) that plays in browsers.

    Args:
        path: the file.
        frames: images in [0, 1], all of one size; an iterator is consumed frame by frame.
        fps: frames per second.
        min_height: smaller frames are enlarged smoothly by a whole factor until they are at least this high.

    Raises:
        UserInputError: if there are no frames.
    """
    with atomic_path(path) as temporary:
        writer = None
        try:
            for frame in frames:
                pixels = _video_frame(frame, min_height)
                if writer is None:
                    writer = _open_writer(temporary, pixels.shape[1], pixels.shape[0], fps)
                writer.send(pixels)
        finally:
            if writer is not None:
                writer.close()
        if writer is None:
            raise UserInputError(f"The video {path} has no frames: render at least one.")


def encode_video(frames: Iterable[Float[Tensor, "3 height width"]], fps: float = 24.0, min_height: int = 256) -> bytes:
    """The bytes of such a video."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(path, frames, fps, min_height)
        return path.read_bytes()


def _open_writer(path: Path, width: int, height: int, fps: float):
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (width, height),
        fps=fps,
        codec="libx264",
        pix_fmt_out="yuv420p",
        quality=None,
        macro_block_size=2,
        output_params=["-crf", "20", "-preset", "medium", "-movflags", "+faststart", "-f", "mp4"],
    )
    writer.send(None)
    return writer


def _video_frame(frame: Float[Tensor, "3 height width"], min_height: int) -> UInt8[np.ndarray, "height width 3"]:
    factor = max(1, -(-min_height // frame.shape[-2]))
    frame = frame.detach().float().cpu()
    if factor > 1:
        frame = F.interpolate(frame[None], scale_factor=factor, mode="bicubic", align_corners=False)[0]
    pixels = to_uint8(frame)
    height, width = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
    return np.ascontiguousarray(pixels[:height, :width])
