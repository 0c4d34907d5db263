"""How every script of benchmarks/ is run: its options, errors as sentences, and a record of what was measured how."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from nfldm_ns.errors import exit_on_bad_input
from nfldm_ns.reports.report import Table
from nfldm_ns.reports.resources import device_info, package_versions
from nfldm_ns.scenes.writing import atomic_path, write_json

OptionsType = TypeVar("OptionsType")
RECORD = "record.json"
ROOT = Path(__file__).parent.parent.parent


def run(main: Callable[[OptionsType], None], options_class: type[OptionsType], description: str | None) -> None:
    """Runs a script by its command line; what `docs/results.md` says of a result is printed, and left beside it.

    Args:
        main: does it.
        options_class: of its options; those with `output_dir` or `output` leave `record.json` there.
        description: of the script, for its help.
    """
    with exit_on_bad_input():
        options = tyro.cli(options_class, description=description)
        begun = time.time()
        main(options)
        made = record(options, time.time() - begun)
        folder = output_folder(options)
        if folder is not None:
            write_json(folder / RECORD, made)
        device = made["device"]
        hardware = f"{device.get('gpu', device['processor'])}, {device['torch_threads']} threads"
        print(f"\n`{made['command']}` (commit {made['commit']}, seed {made['seed']}, {hardware}, {made['seconds']} s)")


def write_tables(path: Path, tables: Sequence[Table]) -> None:
    """Writes tables in one step, in Markdown, and prints them."""
    text = "\n\n".join(table.markdown() for table in tables)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text)


def record(options: Any, seconds: float) -> dict[str, Any]:
    """What makes a result one that can be repeated: command, commit, data, seed, hardware, versions, and its time."""
    script = Path(sys.argv[0])
    return {
        "command": shlex.join(["python", f"benchmarks/{script.name}", *sys.argv[1:]]),
        "commit": commit(),
        "data": None if getattr(options, "data", None) is None else str(options.data),
        "seed": getattr(options, "seed", getattr(options, "seeds", None)),
        "seconds": round(seconds, 1),
        "device": device_info(),
        "versions": package_versions(),
    }


def commit(root: Path = ROOT) -> str:
    """The commit that is checked out, with a plus where files differ from it; "unknown" outside of a repository."""
    try:
        found = subprocess.run(
            ["git", "-C", root, "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def output_folder(options: Any) -> Path | None:
    """Where a script writes."""
    if getattr(options, "output_dir", None) is not None:
        return Path(options.output_dir)
    output = getattr(options, "output", None)
    if output is None:
        return None
    return output.parent if output.suffix else output
