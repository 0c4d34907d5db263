"""PLY files of vertices alone, binary and little endian."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.writing import atomic_path

_TYPES = {"f4": "float", "u1": "uchar"}
_CODES = {name: code for code, name in _TYPES.items()}


def write_vertices(path: Path, properties: Mapping[str, np.ndarray]) -> None:
    """Writes vertices whole or not at all.

    Args:
        properties: one array of float32 or uint8 per property, all of one length, in the order of the file.
    """
    codes = {name: values.dtype.str[1:] for name, values in properties.items()}
    count = len(next(iter(properties.values())))
    table = np.empty(count, dtype=[(name, f"<{code}") for name, code in codes.items()])
    for name, values in properties.items():
        table[name] = values
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {count}"]
    lines += [f"property {_TYPES[code]} {name}" for name, code in codes.items()]
    header = "\n".join([*lines, "end_header", ""]).encode("ascii")
    with atomic_path(path) as temporary:
        temporary.write_bytes(header + table.tobytes())


def read_vertices(path: Path) -> dict[str, np.ndarray]:
    """The properties that `write_vertices` wrote.

    Raises:
        UserInputError: if it is another kind of PLY, or damaged.
    """
    header, mark, body = path.read_bytes().partition(b"end_header\n")
    lines = [line.split() for line in header.decode("ascii", errors="replace").splitlines()]
    try:
        if not mark or lines[1] != ["format", "binary_little_endian", "1.0"] or lines[2][:2] != ["element", "vertex"]:
            raise ValueError("another kind of PLY")
        fields = [(name, f"<{_CODES[kind]}") for _, kind, name in lines[3:]]
        table = np.frombuffer(body, dtype=fields, count=int(lines[2][2]))
    except (ValueError, KeyError, IndexError) as error:
        raise UserInputError(f"{path} is no PLY of nfldm-export ({error}): export it again.") from None
    return {name: table[name].copy() for name, _ in fields}
