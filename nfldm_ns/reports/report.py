"""Builds a report: one self-contained HTML page of pictures, videos, tables and curves.

A report is a plain description: `Report(title, intro, [Section(title, text, [Gallery(...), Table(...), ...])])`.
Nothing on the page is loaded from elsewhere, so the file can be mailed or archived as it is.
"""

from __future__ import annotations

import base64
import html
import importlib.resources
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as MatplotlibFigure
from PIL import Image
from torch import Tensor

from nfldm_ns.errors import UserInputError
from nfldm_ns.reports.galleries import to_uint8
from nfldm_ns.scenes.writing import atomic_path

MISSING = "\N{EN DASH}"
SMOOTHED_FROM = 100
ImageLike = Image.Image | Tensor | np.ndarray | Path | bytes

# Videos play when they come into view, unless the reader asked for less motion.
SCRIPT = """
if (!matchMedia("(prefers-reduced-motion: reduce)").matches) {
  const seen = new IntersectionObserver(entries => entries.forEach(
    entry => entry.isIntersecting ? entry.target.play() : entry.target.pause()));
  document.querySelectorAll("video").forEach(video => seen.observe(video));
}
"""


# What a page consists of


@dataclass
class Picture:
    """An image with its caption.

    Attributes:
        image: `[3, H, W]` in [0, 1], 8-bit `[H, W, 3]`, a PIL image, or an image file (its path or bytes).
        alt: what is to be seen, for those who cannot see it; default: the caption.
    """

    image: ImageLike
    caption: str = ""
    alt: str = ""


@dataclass
class Video:
    """An mp4 (its path or bytes, see `galleries.write_video`) with its caption."""

    video: Path | bytes
    caption: str = ""
    alt: str = ""


@dataclass
class Gallery:
    """Pictures and videos in as many columns as fit.

    Attributes:
        items: what to show.
        tile_width: least width of a column in CSS pixels (two thirds of it on phones).
        title: a heading above.
        pixels: enlarge images without smoothing.
    """

    items: Sequence[Picture | Video]
    tile_width: int = 200
    title: str = ""
    pixels: bool = False


@dataclass
class Wide:
    """One picture in its own size, such as a labelled grid; it shrinks with the page."""

    picture: Picture


@dataclass
class Table:
    """Numbers, with a name for each row in the first column.

    Attributes:
        columns: names of all columns.
        rows: one cell per column; floats are rounded, None becomes a dash.
        caption: what the numbers are and which direction is better.
        emphasis: indices of rows to set off.
        digits: decimals of floats; one number for all columns, or one per column.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]
    caption: str = ""
    emphasis: Sequence[int] = ()
    digits: int | Sequence[int] = 3

    def markdown(self) -> str:
        """The table in Markdown, its caption above it."""
        rows = [self.columns, ["---"] * len(self.columns)]
        digits = _column_digits(self)
        for index, row in enumerate(self.rows):
            cells = [_plain_cell(cell, n) for cell, n in zip(row, digits, strict=True)]
            rows.append([f"**{cell}**" for cell in cells] if index in self.emphasis else cells)
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([self.caption, ""] * bool(self.caption) + lines) + "\n"


@dataclass
class Curves:
    """Lines over a common axis, such as losses over steps.

    Attributes:
        series: (x, y) by name. Long series are also shown smoothed.
        x_label: name of the horizontal axis.
        y_label: name of the vertical axis.
        title: above the plot.
        log_y: logarithmic vertical axis.
        alt: what is to be seen; default: names and the last values.
    """

    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    x_label: str = "step"
    y_label: str = "loss"
    title: str = ""
    log_y: bool = False
    alt: str = ""


@dataclass
class Plots:
    """Plots side by side where there is room."""

    plots: Sequence[Curves]
    tile_width: int = 340


Item = Gallery | Wide | Table | Curves | Plots | str


@dataclass
class Section:
    """A heading, text, and items; a string among the items is more text."""

    title: str
    text: str = ""
    items: Sequence[Item] = ()


@dataclass
class Report:
    """A whole page.

    Text is plain: empty lines part paragraphs and `backticks` mark code.
    """

    title: str
    intro: str = ""
    sections: Sequence[Section] = field(default_factory=list)
    footer: str = ""

    def render(self) -> str:
        """The page as HTML.

        Raises:
            UserInputError: if a picture or video file is missing or cannot be read.
        """
        css = importlib.resources.files("nfldm_ns.reports").joinpath("report.css").read_text(encoding="utf-8")
        links = "".join(f'<a href="#s{i}">{_text(s.title)}</a>' for i, s in enumerate(self.sections))
        body = "\n".join(_section(i, section) for i, section in enumerate(self.sections))
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<title>{html.escape(self.title)}</title>\n<link rel="icon" href="data:,">\n'
            f"<style>\n{css}</style>\n</head>\n"
            f"<body>\n<header>\n<h1>{_text(self.title)}</h1>\n{_paragraphs(self.intro)}\n"
            f'<nav aria-label="Sections">{links}</nav>\n</header>\n<main>\n{body}\n</main>\n'
            f"<footer>{_paragraphs(self.footer)}</footer>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
        )

    def write(self, path: Path) -> None:
        """Writes the page in one step."""
        page = self.render()
        with atomic_path(path) as temporary:
            temporary.write_text(page, encoding="utf-8")


# Text


def _text(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _paragraphs(text: str) -> str:
    return "\n".join(f"<p>{_text(part.strip())}</p>" for part in text.split("\n\n") if part.strip())


def _section(index: int, section: Section) -> str:
    items = "\n".join(_item(item) for item in section.items)
    return f'<section id="s{index}">\n<h2>{_text(section.title)}</h2>\n{_paragraphs(section.text)}\n{items}\n</section>'


def _item(item: Item) -> str:
    if isinstance(item, str):
        return _paragraphs(item)
    if isinstance(item, Gallery):
        return _gallery(item)
    if isinstance(item, Wide):
        return f'<div class="wide">{_figure(item.picture)}</div>'
    if isinstance(item, Table):
        return _table(item)
    if isinstance(item, Curves):
        return _item(Plots([item]))
    if isinstance(item, Plots):
        return _gallery(Gallery([_curves(plot) for plot in item.plots], item.tile_width), kind="plots")
    raise TypeError(f"a report cannot show a {type(item).__name__}")


# Pictures and videos


def _gallery(gallery: Gallery, kind: str = "") -> str:
    heading = f"<h3>{_text(gallery.title)}</h3>\n" if gallery.title else ""
    kind = f"gallery {'pixels' if gallery.pixels else kind}".strip()
    figures = "\n".join(_figure(item) for item in gallery.items)
    return f'{heading}<div class="{kind}" style="--tile: {gallery.tile_width}px">\n{figures}\n</div>'


def _figure(item: Picture | Video) -> str:
    alt = html.escape(item.alt or item.caption, quote=True)
    caption = f"<figcaption>{_text(item.caption)}</figcaption>" if item.caption else ""
    if isinstance(item, Video):
        source = _data_uri("video/mp4", _read(item.video) if isinstance(item.video, Path) else item.video)
        media = f'<video controls loop muted playsinline preload="auto" aria-label="{alt}" src="{source}"></video>'
    else:
        kind, data = _image_bytes(item.image)
        media = f'<img src="{_data_uri(kind, data)}" alt="{alt}">'
    return f"<figure>{media}{caption}</figure>"


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserInputError(f"{path} cannot be read for the report ({error.strerror}): make it again.") from None


def _image_bytes(image: ImageLike) -> tuple[str, bytes]:
    if isinstance(image, Path):
        image = _read(image)
    if isinstance(image, bytes):
        return _image_kind(image), image
    if isinstance(image, Tensor):
        image = to_uint8(image)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "image/png", buffer.getvalue()


def _image_kind(data: bytes) -> str:
    if data.startswith(b"\x89PNG"):
        return "image/png"
    if data.startswith(b"\xff\xd8"):
        return "image/jpeg"
    if data.lstrip().startswith((b"<svg", b"<?xml")):
        return "image/svg+xml"
    raise UserInputError("A picture of the report is neither PNG, JPEG nor SVG: make it again.")


# Numbers


def _table(table: Table) -> str:
    digits = _column_digits(table)
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in table.columns)
    body = "\n".join(_row(row, digits, emphasis=index in table.emphasis) for index, row in enumerate(table.rows))
    caption = f"<caption>{_text(table.caption)}</caption>" if table.caption else ""
    return f'<div class="table"><table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _column_digits(table: Table) -> list[int]:
    """Decimals by column; `ValueError` unless every row fits the columns."""
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(f"a row of {len(row)} cells does not fit {len(table.columns)} columns: {row}")
    return [table.digits] * len(table.columns) if isinstance(table.digits, int) else list(table.digits)


def _row(row: Sequence[Any], digits: Sequence[int], emphasis: bool) -> str:
    kind = ' class="emphasis"' if emphasis else ""
    cells = "".join(f"<td>{_cell(cell, n)}</td>" for cell, n in zip(row[1:], digits[1:], strict=True))
    return f'<tr{kind}><th scope="row">{_cell(row[0], digits[0])}</th>{cells}</tr>'


def _cell(value: Any, digits: int) -> str:
    return _text(_plain_cell(value, digits))


def _plain_cell(value: Any, digits: int) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _curves(curves: Curves) -> Picture:
    """Draws without pyplot, so that no display is asked for and no global state is changed."""
    figure = MatplotlibFigure(figsize=(4.6, 2.9), layout="constrained")
    axes = figure.add_subplot()
    lasts = []
    for i, (name, (x, y)) in enumerate(curves.series.items()):
        values = np.asarray(y, dtype=np.float64)
        long = len(values) >= SMOOTHED_FROM
        axes.plot(x, values, color=f"C{i}", alpha=0.25 if long else 1, linewidth=1.2, label=None if long else name)
        if long:
            axes.plot(x, _smooth(values), color=f"C{i}", linewidth=1.6, label=name)
        if len(values):
            lasts.append(f"{name} ends at {_smooth(values)[-1] if long else values[-1]:.4g}")
    if curves.log_y:
        axes.set_yscale("log")
    axes.set(xlabel=curves.x_label, ylabel=curves.y_label, title=curves.title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if curves.series:
        axes.legend(frameon=False, fontsize="small")
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    alt = curves.alt or f"{curves.title or curves.y_label} over {curves.x_label}: {'; '.join(lasts)}"
    return Picture(buffer.getvalue(), alt=alt)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a twentieth of the series, narrower at both ends; ignores NaN."""
    half = max(1, len(values) // 40)
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    centre = np.arange(len(values))
    low, high = np.maximum(centre - half, 0), np.minimum(centre + half + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])
