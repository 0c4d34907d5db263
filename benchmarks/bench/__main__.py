"""How fast this package is on this machine: one number per module of benchmarks/bench, in outputs/bench/results.json.

    make bench                                  # all
    make bench ARGS="--only startup sample"     # some; results of the others stay

A module has a `KEY`, the name of its result, and `measure() -> dict`. Each runs in a process of its own, so that none
finds what another imported, and its peak memory is its own. A module that cannot measure here returns
`{"absent": why}`.
"""

from __future__ import annotations

import importlib
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from nfldm_ns.errors import UserInputError, exit_on_bad_input

MODULES = Path(__file__).parent
RESULTS = Path("outputs/bench/results.json")
KIB = 1024


@dataclass
class Options:
    """Measure how fast this package is on this machine."""

    only: tuple[str, ...] = ()
    """keys of what to measure; by default all"""
    output: Path = RESULTS
    """the file of results"""


def modules() -> dict[str, str]:
    """Names of modules by key.

    Raises:
        UserInputError: if two have the same key.
    """
    found: dict[str, str] = {}
    for path in sorted(MODULES.glob("*.py")):
        if path.stem.startswith("_"):
            continue
        key = importlib.import_module(f"bench.{path.stem}").KEY
        if key in found:
            raise UserInputError(f"bench/{path.name} and bench/{found[key]}.py have the same KEY, {key}: rename one.")
        found[key] = path.stem
    return found


def measured(name: str) -> dict[str, Any]:
    """What a module measures, its seconds and its peak memory, from a process of its own; `error` if it fails."""
    begun = time.time()
    done = subprocess.run([sys.executable, "-m", "bench", "--measure", name], capture_output=True, text=True)
    seconds = round(time.time() - begun, 1)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"error": words[-1], "took_seconds": seconds}
    return {**json.loads(lines[-1]), "took_seconds": seconds}


def measure_here(name: str) -> None:
    """Prints what a module measures, and the peak memory of this process or the largest of those that it started."""
    result = importlib.import_module(f"bench.{name}").measure()
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print()
    print(json.dumps({**result, "peak_memory_gib": round(peak / KIB**2, 2)}))


def main(options: Options) -> int:
    """Measures, prints and writes; returns 1 if a module failed."""
    from nfldm_ns.scenes.collection import read_json
    from nfldm_ns.scenes.writing import require_writable, write_json

    known = modules()
    unknown = [key for key in options.only if key not in known]
    if unknown:
        raise UserInputError(f"There is no measurement {unknown[0]}: choose from {', '.join(sorted(known))}.")
    require_writable(options.output.parent)
    results: dict[str, Any] = read_json(options.output) if options.output.is_file() else {}
    failed = False
    for key in options.only or sorted(known):
        print(f"{key} ...", flush=True)
        results[key] = {**measured(known[key]), **provenance()}
        write_json(options.output, results)
        print(f"{key}: {described(results[key])}", flush=True)
        failed |= "error" in results[key]
    print(f"Results: {options.output}")
    return int(failed)


def provenance() -> dict[str, Any]:
    """Hardware, versions and commit."""
    from nfldm_ns.reports.resources import device_info, package_versions
    from shared.running import commit

    return {"commit": commit(), "device": device_info(), "versions": package_versions()}


def described(result: dict[str, Any]) -> str:
    """One line of a result."""
    for word in ("absent", "error"):
        if word in result:
            return f"{word}: {result[word]}"
    hidden = ("commit", "device", "versions", "took_seconds")
    numbers = {name: value for name, value in result.items() if name not in hidden}
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if isinstance(value, int | float))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure_here(sys.argv[2])
    else:
        with exit_on_bad_input():
            code = main(tyro.cli(Options, prog="make bench", description=__doc__))
        raise SystemExit(code)
