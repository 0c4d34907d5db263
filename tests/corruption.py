"""Ways in which files go bad, drawn by hypothesis."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from PIL import Image

Draw = Callable[[st.SearchStrategy[Any]], Any]

VALUES = [
    *(None, True, False, 0, -1, 3, 0.5, 1e-300, 1e30, 1e308, 10**12, -(10**12), 10**400, float("nan"), float("inf")),
    *("", "x", "1", "../..", "/", "a\0b", "line\nbreak", "\ud800", "long" * 100, "depths", "images/nowhere.png"),
    *([], {}, [1], [[1, 2], [3]], ["x"], [None], {"a": 1}, [[0.0] * 4] * 4, [float("nan")] * 3),
]
NO_JSON = [
    *(b"", b"nonsense", b'{"frames": [', b"null", b"[]", b"[1, 2]", b"{}", b'"text"', b"7", b"NaN", b"\xff\xfe\x00"),
    *(b"[" * 100_000, b"1" * 5000, b'{"version": ' + b"1" * 5000 + b"}", '{"name": "\xe9"}'.encode("latin-1")),
]
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK")
PICTURES = (".png", ".jpg", ".tiff")
WORDS = (
    "",
    "x",
    "0",
    "-1",
    "7",
    "1e30",
    "1e400",
    "nan",
    "inf",
    "-inf",
    "1 2",
    "#",
    "\0",
    "99999999999999999999",
    "../..",
)


def corrupt(folder: Path, draw: Draw) -> str:
    """Changes one file or folder below `folder`, and says how; never writes in place, so that files may be links."""
    path = draw(st.sampled_from(sorted(p for p in folder.rglob("*") if p != folder)))
    if path.is_dir():
        ways = [remove, make_a_file]
    elif path.suffix == ".json":
        ways = [*[change_value] * 8, *[change_keys] * 4, *[no_json] * 2, *ANY_FILE]
    elif path.suffix == ".txt":
        ways = [*[change_word] * 8, *ANY_FILE]
    elif path.suffix in PICTURES:
        ways = [*[other_picture] * 4, *ANY_FILE]
    else:
        ways = [*ANY_FILE]
    way = draw(st.sampled_from(ways))
    return f"{path.relative_to(folder)}: {way.__name__} {way(path, draw) or ''}"


def replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def remove(path: Path, draw: Draw) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_a_file(path: Path, draw: Draw) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"a file")


def make_a_folder(path: Path, draw: Draw) -> None:
    path.unlink()
    path.mkdir()


def truncate(path: Path, draw: Draw) -> str:
    data = path.read_bytes()
    length = draw(st.integers(0, max(0, len(data) - 1)))
    replace(path, data[:length])
    return f"to {length} bytes"


def flip_bytes(path: Path, draw: Draw) -> str:
    data = bytearray(path.read_bytes())
    places = draw(st.lists(st.integers(0, min(len(data), 4096) - 1), min_size=1, max_size=4)) if data else []
    for place in places:
        data[place] ^= draw(st.integers(1, 255))
    replace(path, bytes(data))
    return f"at {places}"


def another_file(path: Path, draw: Draw) -> str:
    """Two files mixed up."""
    other = draw(st.sampled_from(sorted(p for p in path.parent.rglob("*") if p.is_file())))
    replace(path, other.read_bytes())
    return f"is {other.name}"


ANY_FILE = (remove, make_a_folder, truncate, truncate, flip_bytes, flip_bytes, another_file)


def no_json(path: Path, draw: Draw) -> str:
    data = draw(st.sampled_from(NO_JSON))
    replace(path, data)
    return f"{data[:30]!r}"


def other_picture(path: Path, draw: Draw) -> str:
    mode = draw(st.sampled_from(MODES))
    size = draw(st.sampled_from([(16, 16), (1, 1), (16, 9), (40, 40)]))
    pages = draw(st.integers(1, 2))
    buffer = io.BytesIO()
    images = [Image.new(mode, size) for _ in range(pages)]
    images[0].save(buffer, format="TIFF", save_all=True, append_images=images[1:])
    replace(path, buffer.getvalue())
    return f"{pages} x {mode} {size}"


def change_word(path: Path, draw: Draw) -> str:
    """Of a text."""
    words = re.split(r"(\s+)", path.read_bytes().decode(errors="replace"))
    place, word = draw(st.integers(0, len(words) - 1)), draw(st.sampled_from(WORDS))
    replace(path, "".join([*words[:place], word, *words[place + 1 :]]).encode())
    return f"{words[place]!r} = {word!r}"


def change_value(path: Path, draw: Draw) -> str:
    value = draw(st.sampled_from(VALUES))

    def change(holder: Any, key: Any) -> None:
        holder[key] = value

    return _edit(path, draw, change) + f" = {str(value)[:30]!r}"


def change_keys(path: Path, draw: Draw) -> str:
    what = draw(st.sampled_from(["drop", "add", "double"]))

    def change(holder: Any, key: Any) -> None:
        if what == "drop":
            holder.pop(key)
        elif isinstance(holder, list):
            holder.append(holder[key])
        else:
            holder["no_such_key" if what == "add" else f"{key}2"] = holder[key]

    return f"{what} " + _edit(path, draw, change)


def _edit(path: Path, draw: Draw, change: Callable[[Any, Any], None]) -> str:
    """Changes a place of a JSON file: each level of its tree is as likely as the next."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = {}
    holder, key, way = {"": content}, "", []
    while isinstance(holder[key], (dict, list)) and holder[key] and (not way or draw(st.integers(0, 3))):
        holder = holder[key]
        key = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
        way.append(key)
    if way:
        change(holder, key)
        replace(path, json.dumps(content).encode())
    return ".".join(map(str, way))
