"""The parts of the check in their order: what is cheap and tells most comes first."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gpu.findings import Findings
from gpu.sizes import Sizes

SMALL_BATCH = 2  # scenes, where two trainings are in memory at once


@dataclass(frozen=True)
class Part:
    """One part of the check, which runs in a process of its own.

    Attributes:
        name: in the JSON, for `--only`, and of its log.
        title: what it does, in a few words.
        work: module and function, which is given findings, device and sizes.
        needs_s: with less time left it is not begun.
        limit_s: it is ended after so many seconds.
        changes: of `Sizes`.
    """

    name: str
    title: str
    work: str
    needs_s: float
    limit_s: float
    changes: dict[str, Any] = field(default_factory=dict)


def do_work(work: str, findings: Findings, device: str, changes: Mapping[str, Any]) -> None:
    """Does a part in this process.

    Args:
        work, changes: of the part.
    """
    module, name = work.split(":")
    function: Callable[[Findings, str, Sizes], None] = getattr(importlib.import_module(module), name)
    function(findings, device, replace(Sizes(), **changes))
    findings.finish()


_COMPARED = {"preset": "base", "batch_size": SMALL_BATCH}
PARTS = (
    Part("tests", "tests marked gpu", "gpu.marked_tests:run_tests", 20, 120),
    Part("rendering", "views per second of a paper-size scene", "gpu.rendering:render", 20, 75),
    Part("bf16", "losses in bf16 against single precision", "gpu.precision:compare_bf16", 20, 75, _COMPARED),
    Part("nccl", "NCCL with one process", "gpu.nccl:communicate", 10, 45),
    Part("sampling", "a paper-size room", "gpu.sampling:sample", 20, 75),
    Part("train_base", "a training step of base", "gpu.trainings:train", 20, 75, {"preset": "base"}),
    Part("train_paper", "a training step of paper", "gpu.trainings:train", 25, 90, {"preset": "paper"}),
    Part("refining", "refining at paper size", "gpu.refining:refine", 25, 75),
    Part("agreement", "all stages trained for a few steps, GPU against CPU", "gpu.agreement:agree", 60, 150),
    Part("compile", "torch.compile against eager", "gpu.precision:compare_compiled", 45, 200, _COMPARED),
)
