"""The tests that need a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from gpu.findings import Findings
from gpu.sizes import Sizes
from shared.running import ROOT

MARK = re.compile(r"mark\.gpu\b")
NOTHING_COLLECTED = 5  # exit code of pytest


def run_tests(findings: Findings, device: str, sizes: Sizes) -> None:
    """All tests marked `gpu`, in a process of their own; those that fail are failures by name."""
    with findings.attempt("tests"):
        judge_tests(findings, marked_files(ROOT / "tests"), "gpu")


def marked_files(folder: Path) -> list[Path]:
    """Files of tests, some of which are marked: the others need not be imported."""
    return [path for path in sorted(folder.glob("test_*.py")) if MARK.search(path.read_text(encoding="utf-8"))]


def judge_tests(findings: Findings, files: Sequence[Path], marker: str) -> None:
    """Runs the tests of some files that have a marker; `passed` is their number, `skipped` has reasons by name."""
    report = findings.folder / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", marker, f"--junit-xml={report}", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *map(str, files)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
    )
    if not report.is_file() or done.returncode == NOTHING_COLLECTED:
        findings.failures["tests"] = f"pytest ran no test and ended with exit code {done.returncode}: see the log."
        return
    cases, skipped = list(ElementTree.parse(report).getroot().iter("testcase")), {}
    for case in cases:
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if problem is None:
            continue
        name, told = f"{case.get('classname')}::{case.get('name')}", (problem.get("message") or problem.tag)
        if problem.tag == "skipped":
            skipped[name] = told
        else:
            findings.failures[name] = told.splitlines()[0]
    findings.numbers |= {"passed": len(cases) - len(skipped) - len(findings.failures), "skipped": skipped}
