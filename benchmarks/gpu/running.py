"""Runs the parts of the check one after the other, each in a process of its own, within the time that there is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu.parts import Part
from nfldm_ns.scenes.collection import read_json
from nfldm_ns.scenes.writing import write_json

BENCHMARKS = Path(__file__).parent.parent
PASSED, FAILED, LEFT_OUT = "passed", "failed", "left out"
UNFINISHED = "ended"  # name of the failure of a part that did not come to its end


def run_parts(
    parts: Sequence[Part], device: str, folder: Path, budget_s: float, head: dict[str, Any]
) -> dict[str, Any]:
    """All parts as far as the time lasts; the JSON is written after each, so that it is there whatever happens.

    Args:
        folder: for `gpu_check.json`, and for each part `NAME.json` and `NAME.log`.
        budget_s: no part goes on after so many seconds.
        head: what the JSON says besides.

    Returns:
        the JSON: `head`; `passed`; `failed`, a sentence for each failure by part and name; `left_out`, sentences by
        part; `bars`; and `parts` with `state`, `seconds`, `numbers`, `failures` and `bars` of each.
    """
    begun, found = time.monotonic(), {}
    for part in parts:
        left = budget_s - (time.monotonic() - begun)
        print(f"{part.name}: {part.title} ...", flush=True)
        found[part.name] = run_part(part, device, folder, left)
        print(described(part, found[part.name]), flush=True)
        summary = {**head, **summarised(found)}
        write_json(folder / "gpu_check.json", summary)
    return summary


def run_part(part: Part, device: str, folder: Path, left_s: float) -> dict[str, Any]:
    """One part, ended after its limit or when no time is left.

    Args:
        left_s: seconds of the whole check.
    """
    if left_s < part.needs_s:
        said = f"It needs {part.needs_s:.0f} s, and {max(left_s, 0):.0f} s were left: run it alone, with --only."
        return {"state": LEFT_OUT, "said": said, "seconds": 0.0, "numbers": {}, "failures": {}, "bars": []}
    path, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    path.unlink(missing_ok=True)
    limit, begun = min(part.limit_s, left_s), time.monotonic()
    code = _run(["-m", "gpu", part.work, device, str(path), json.dumps(part.changes)], log, limit)
    result = read_json(path) if path.is_file() else {"numbers": {}, "failures": {}, "bars": [], "done": False}
    attempting, done = result.pop("attempting", None), result.pop("done")
    result["seconds"] = round(time.monotonic() - begun, 1)
    where = f" in '{attempting}'" if attempting else ""
    if code is None and limit < part.limit_s and not result["failures"]:
        said = f"The time of the check was over{where}: run it alone, with --only."
        return {"state": LEFT_OUT, "said": said, **result}
    if code is None:
        result["failures"][UNFINISHED] = f"It was ended after its {limit:.0f} s{where}: see {log}."
    elif not done:
        result["failures"][UNFINISHED] = f"It broke off{where}, {_ending(code)} ({_last_line(log)}): see {log}."
    return {"state": FAILED if result["failures"] else PASSED, **result}


def _run(arguments: list[str], log: Path, limit_s: float) -> int | None:
    """Exit code of a Python process; None if it had to be ended, with all that it started."""
    paths = os.pathsep.join(filter(None, (str(BENCHMARKS), os.environ.get("PYTHONPATH"))))
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _ending(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"with exit code {code}"


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def summarised(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What `run_parts` returns of what was found by part."""
    failed = {f"{name}, {what}": said for name, result in found.items() for what, said in result["failures"].items()}
    return {
        "passed": not failed,
        "failed": failed,
        "left_out": {name: result["said"] for name, result in found.items() if result["state"] == LEFT_OUT},
        "bars": [bar for result in found.values() for bar in result["bars"]],
        "parts": found,
    }


def described(part: Part, result: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    lines = [f"{part.name}: {result['state']} ({result['seconds']:.0f} s)"]
    lines += [f"  {result['said']}"] if "said" in result else []
    lines += [f"  FAILED {name}: {said}" for name, said in result["failures"].items()]
    for bar in result["bars"]:
        kind, limit = ("at most", bar["at_most"]) if "at_most" in bar else ("at least", bar["at_least"])
        verdict = "met" if bar["met"] else "not met"
        lines.append(f"  {bar['name']}: {bar['value']:.3g}, {kind} {limit:g} is the aim: {verdict}")
    return "\n".join(lines)
