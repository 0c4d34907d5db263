"""Galleries, videos, resource use, and the page that shows them."""

from __future__ import annotations

import base64
import io
import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from nfldm_ns.errors import UserInputError
from nfldm_ns.reports import galleries
from nfldm_ns.reports.report import (
    MISSING,
    Curves,
    Gallery,
    Picture,
    Plots,
    Report,
    Section,
    Table,
    Video,
    Wide,
    _smooth,
)
from nfldm_ns.reports.resources import ResourceMeter, device_info, package_versions
from nfldm_ns.scenes.collection import BevClass, SceneCollection
from nfldm_ns.scenes.voxel_grid import VoxelGrid

# Galleries


def test_depth_colors_are_fixed_by_the_range_and_mark_the_unknown() -> None:
    depth = torch.tensor([[0.0, 1.0, 5.0, 10.0, 50.0]])[None, None]
    colors = galleries.depth_colors(depth, 1.0, 10.0)
    assert colors.shape == (1, 3, 1, 5)
    assert torch.equal(colors[0, :, 0, 0], torch.full((3,), galleries.UNKNOWN_COLOR))
    near, far = colors[0, :, 0, 1], colors[0, :, 0, 3]
    assert near[2] > near[0] and far[0] > far[2]  # blue to red
    assert torch.equal(colors[0, :, 0, 4], far)
    torch.testing.assert_close(galleries.depth_colors(depth[..., 2:3], 1.0, 10.0), colors[..., 2:3])


def test_error_colors_are_black_where_equal() -> None:
    true = torch.full((2, 3, 4, 4), 0.5)
    assert float(galleries.error_colors(true, true).max()) < 0.02
    assert bool((galleries.error_colors(true + 0.4, true).sum(dim=-3) > 0.9).all())


def test_bev_colors() -> None:
    classes = [BevClass(0, "void", (0, 0, 0)), BevClass(3, "floor", (255, 51, 0))]
    colors = galleries.bev_colors(np.array([[0, 3]], np.uint8), classes)
    torch.testing.assert_close(colors[:, 0, 1], torch.tensor([1.0, 0.2, 0.0]))
    assert float(colors[:, 0, 0].sum()) == 0


def test_density_from_above_puts_north_up_and_leaves_the_ceiling_out() -> None:
    density = torch.zeros(1, 1, 4, 6, 5)
    density[0, 0, 3] = 100  # a ceiling at z = 1.5
    density[0, 0, 0, 5, 1] = 100  # a low block far to the north, west of the middle
    density[0, 0, 2, 0, 4] = 100  # a high block in the south-east corner
    grid = VoxelGrid(density, torch.zeros(1, 2, 4, 6, 5), torch.tensor([[-2.0, -2, -2], [2, 2, 2]]))
    above = galleries.density_from_above(grid, below_m=1.0)
    assert above.shape == (1, 3, 6, 5)
    painted = (above[0].mean(dim=0) < 0.95).nonzero().tolist()
    assert painted == [[0, 1], [5, 4]]
    assert above[0, :, 5, 4].sum() > above[0, :, 0, 1].sum()  # higher is brighter
    with pytest.raises(ValueError, match="no voxel lies lower"):
        galleries.density_from_above(grid, below_m=-5)


def test_image_grid_keeps_pixels_and_accepts_columns_of_different_sizes(tmp_path: Path) -> None:
    a, b = torch.rand(2, 3, 16, 16), torch.rand(3, 3, 32, 24)
    grid = galleries.image_grid({"source": a, "render": b}, row_labels=["first", "second", "third"], tile_size=64)
    galleries.write_png(tmp_path / "grid.png", grid)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    tile = galleries.to_uint8(a[0]).repeat(4, axis=0).repeat(4, axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(pixels[:, :, 0], (64, 64))
    assert bool((windows == tile[:, :, 0]).all(axis=(-1, -2)).any())
    assert pixels.shape[0] > 3 * 64
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]
    with pytest.raises(ValueError, match="no images"):
        galleries.image_grid({"source": []})


def read_video(path: Path) -> tuple[dict, np.ndarray]:
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return meta, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def test_video_plays_everywhere_and_shows_the_frames(tmp_path: Path) -> None:
    shades = torch.linspace(0.1, 0.9, 12)
    path = tmp_path / "flight.mp4"
    galleries.write_video(path, (shade.expand(3, 32, 43) for shade in shades), fps=12, min_height=64)
    meta, frames = read_video(path)
    assert meta["codec"] == "h264"
    assert meta["pix_fmt"].startswith("yuv420p")
    assert meta["fps"] == 12
    assert frames.shape == (12, 64, 86, 3)
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), shades.numpy() * 255, atol=4)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # starts before it is loaded whole


def test_video_without_frames_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="has no frames"):
        galleries.write_video(tmp_path / "empty.mp4", [])
    assert list(tmp_path.iterdir()) == []


def test_video_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    def frames():
        yield torch.zeros(3, 32, 32)
        raise UserInputError("the renderer stopped")

    with pytest.raises(UserInputError, match="renderer stopped"):
        galleries.write_video(tmp_path / "half.mp4", frames())
    assert list(tmp_path.iterdir()) == []


# The page


class Page(HTMLParser):
    """Collects tags, and checks that they are closed in order."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == name]


def example_report(collection: SceneCollection) -> Report:
    """Every kind of item, as `nfldm-demo` uses them."""
    scene = collection.load_scene(collection.split("test")[0])
    images, depths = scene.target.images, scene.target.depths
    assert depths is not None and scene.bev is not None
    colors = galleries.depth_colors(depths, collection.near, collection.far)
    noisy = (images + 0.1 * torch.randn_like(images)).clamp(0, 1)
    flight = galleries.encode_video([images[0].roll(i, -1) for i in range(8)], fps=8)
    steps = torch.arange(300).tolist()
    losses = [math.exp(-s / 100) + 0.05 * math.sin(9 * s) ** 2 for s in steps]
    columns = ["views of held-out places", "PSNR [dB] ↑", "LPIPS ↓"]
    rows = [["stage 1", 24.69, 0.442], ["nearest source view", 20.9, 0.398], ["mean image", 20.5, None]]
    grid = galleries.image_grid(
        {"target": images, "render": noisy, "depth": colors, "error": galleries.error_colors(noisy, images)}
    )
    return Report(
        title="Scenes <generated> & rebuilt",
        intro="Made by `nfldm-demo` on rooms of colour.\n\nEvery number stands beside a baseline.",
        sections=[
            Section(
                "Real and reconstructed views",
                "Held-out places, rendered from eight source views.",
                [
                    Wide(Picture(grid, "Target, render, depth and error.", "Grid of four columns of room views")),
                    Gallery(
                        [Picture(image, f"view {i}", f"A room, view {i}") for i, image in enumerate(images)],
                        title="Targets",
                        pixels=True,
                    ),
                    Gallery([Picture(galleries.bev_colors(scene.bev, collection.bev_classes), "map from above")]),
                ],
            ),
            Section("Fly-throughs", items=[Gallery([Video(flight, "a flight", "Moving through a room")] * 2)]),
            Section(
                "Numbers",
                items=[
                    Table(columns, rows, "Higher is better for PSNR, lower for LPIPS.", emphasis=[0], digits=(0, 2, 3)),
                    Plots(
                        [
                            Curves({"train": (steps, losses), "val": (steps[::50], losses[::50])}, title="Stage 1"),
                            Curves({"coarse": (steps, losses)}, title="Stage 3", log_y=True),
                        ]
                    ),
                    Curves({"short": ([0, 1], [2.0, 1.0])}, alt="falls"),
                    "Text between `items`.",
                ],
            ),
        ],
        footer="Seed 0.",
    )


def test_report_is_one_self_contained_accessible_page(box_room_collection: SceneCollection, tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    example_report(box_room_collection).write(path)
    assert [file.name for file in tmp_path.iterdir()] == ["index.html"]
    page = Page(path.read_text(encoding="utf-8"))

    media = page.all("img") + page.all("video")
    assert len(page.all("video")) == 2
    for attrs in media:
        assert (attrs["src"] or "").startswith("data:")
        assert attrs.get("alt") or attrs.get("aria-label")
    assert page.all("script") == [{}]
    assert [attrs["href"] for attrs in page.all("link")] == ["data:,"]
    targets = {attrs.get("id") for attrs in page.all("section")}
    assert {(attrs["href"] or "").removeprefix("#") for attrs in page.all("a")} == targets
    assert page.all("meta")[1]["name"] == "viewport"
    assert page.all("html")[0]["lang"] == "en"

    assert "Scenes <generated> & rebuilt" in page.text  # escaped in the source, so shown literally
    for shown in ("24.69", "0.442", "20.90", MISSING, "nearest source view"):
        assert shown in page.text
    assert "`" not in page.text
    assert page.all("tr")[1] == {"class": "emphasis"}
    alts = [attrs.get("alt") or "" for attrs in page.all("img")]
    assert any(alt.startswith("Stage 1 over step: train ends at") for alt in alts)
    assert "falls" in alts


def test_report_takes_images_of_every_kind(tmp_path: Path) -> None:
    pixels = (np.arange(48).reshape(4, 4, 3) * 5).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    tensor = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    kinds = [pixels, tensor, Image.fromarray(pixels), buffer.getvalue(), tmp_path / "a.png"]
    page = Page(Report("t", sections=[Section("s", items=[Gallery([Picture(k, "c") for k in kinds])])]).render())
    sources = [(attrs["src"] or "").split(",", 1)[1] for attrs in page.all("img")]
    for source in sources:
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))), pixels)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Gallery([Picture(Path("gone.png"))]), "gone.png cannot be read for the report"),
        (Gallery([Video(Path("gone.mp4"))]), "gone.mp4 cannot be read for the report"),
        (Gallery([Picture(b"GIF89a")]), "neither PNG, JPEG nor SVG"),
    ],
)
def test_report_with_missing_pieces_is_not_written(tmp_path: Path, item: Gallery, message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        Report("t", sections=[Section("s", items=[item])]).write(tmp_path / "index.html")
    assert list(tmp_path.iterdir()) == []


def test_table_rows_must_fit() -> None:
    with pytest.raises(ValueError, match="does not fit 2 columns"):
        Report("t", sections=[Section("s", items=[Table(["a", "b"], [["x", 1, 2]])])]).render()


def test_smoothing_keeps_lines_and_ignores_nan() -> None:
    line = np.arange(200.0)
    np.testing.assert_allclose(_smooth(line)[5:-5], line[5:-5])
    constant = np.full(200, 3.0)
    constant[50] = np.nan
    np.testing.assert_allclose(_smooth(constant), 3.0)


# Resources


METER = """
import json, time
import numpy as np
from nfldm_ns.reports.resources import ResourceMeter

with ResourceMeter(interval_s=0.02) as meter:
    before = meter.use.peak_rss_gib
    block = np.ones(200 * 2**20, np.uint8)
    time.sleep(0.3)
    del block
use = meter.use
print(json.dumps([before, use.as_dict(), meter.use == use]))
"""


def test_meter_counts_time_and_memory_of_this_process() -> None:
    """In a process of its own, where nothing else is freed meanwhile."""
    printed = subprocess.run([sys.executable, "-c", METER], check=True, capture_output=True, text=True).stdout
    before, use, stands_still = json.loads(printed)
    assert 0.3 <= use["seconds"] < 5
    assert use["peak_rss_gib"] - before > 0.15
    assert stands_still


def test_meter_counts_children() -> None:
    code = "import time; block = bytearray(300 * 2**20); print(flush=True); time.sleep(1)"
    with ResourceMeter(interval_s=0.02) as meter:
        before = meter.use.peak_rss_gib
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert meter.use.peak_rss_gib - before > 0.25


def test_versions_and_device() -> None:
    assert package_versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]
    info = device_info()
    assert info["cores"] >= 1 and info["memory_gib"] > 0.1
    assert ("gpu" in info) == torch.cuda.is_available()


def test_a_table_in_markdown() -> None:
    table = Table(["", "a"], [["x", 1.234], ["y", None]], "Numbers.", emphasis=[0], digits=1)
    assert table.markdown() == "Numbers.\n\n|  | a |\n| --- | --- |\n| **x** | **1.2** |\n| y | \N{EN DASH} |\n"
    with pytest.raises(ValueError, match="does not fit"):
        Table(["a"], [[1, 2]]).markdown()
