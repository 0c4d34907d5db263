"""Refining at paper size: memory and seconds per step, with a prior of Stable unCLIP's sizes and random weights."""

from __future__ import annotations

from pathlib import Path

import refining_memory

from gpu.findings import Findings
from gpu.sizes import Sizes


def refine(findings: Findings, device: str, sizes: Sizes) -> None:
    """A few steps of `ns-train nfldm-refine` as `benchmarks/refining_memory.py` takes them (`peak_gib`,
    `seconds_per_step`), in bf16."""
    with findings.attempt("refining"):
        options = refining_memory.Options(Path("unused"), steps=sizes.refining_steps)
        found = refining_memory.measure(options)
        findings.numbers |= {key: found[key] for key in ("peak_gib", "seconds_per_step", "views_per_step", "precision")}
