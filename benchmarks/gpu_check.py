"""Whether everything works on this machine's GPU, and how fast, within eight minutes.

    make gpu-check                                    # all parts, in order, as far as the time lasts
    make gpu-check ARGS="--only rendering sampling"   # some

Leaves `gpu_check.json`, which names what failed, and a log of each part beside it; docs/gpu.md says how to read them.
Exit code 1 if something failed; bars that are missed and parts that the time did not last for are named, and are no
failures. Without a CUDA device there is nothing to check.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from gpu.parts import PARTS
from gpu.running import run_parts

from nfldm_ns.errors import UserInputError
from nfldm_ns.reports.resources import device_info, package_versions
from nfldm_ns.scenes.writing import require_writable
from shared.comparisons import require_choice
from shared.running import commit, run


@dataclass
class Options:
    """Checks a GPU."""

    output_dir: Path = Path("outputs/gpu-check")
    """Folder for gpu_check.json, and for logs."""
    only: tuple[str, ...] = ()
    """Parts to run, by the names in docs/gpu.md; by default all."""
    minutes: float = 8.0
    """Ends after so many."""


def main(options: Options) -> None:
    for name in options.only:
        require_choice("part", name, [part.name for part in PARTS])
    if options.minutes <= 0:
        raise UserInputError(f"--minutes is {options.minutes:g}: give a time above 0.")
    if not torch.cuda.is_available():
        print("skipped: there is no CUDA device here, so there is nothing to check.")
        return
    require_writable(options.output_dir)
    parts = [part for part in PARTS if not options.only or part.name in options.only]
    head = {"commit": commit(), "device": device_info(), "versions": package_versions(), "cuda": torch.version.cuda}
    found = run_parts(parts, "cuda", options.output_dir.resolve(), 60 * options.minutes, head)
    failed, left_out = len(found["failed"]), len(found["left_out"])
    print(f"\n{failed} failures, {left_out} parts left out: {options.output_dir}/gpu_check.json")
    if not found["passed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    run(main, Options, __doc__)
