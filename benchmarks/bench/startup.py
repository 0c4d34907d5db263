"""CPU seconds that `nfldm-sample` spends outside of the denoisers: imports, reading, decoding, rendering and files."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

KEY = "startup"
NUM_SCENES = 8
REPEATS = 3


def measure(num_scenes: int = NUM_SCENES, repeats: int = REPEATS, options: tuple[str, ...] = ()) -> dict[str, float]:
    """`seconds` and those of the `imports` and `denoisers`, medians; by one thread, so that no waiting counts."""
    runs = [_run(num_scenes, options) for _ in range(repeats)]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def _run(num_scenes: int, options: tuple[str, ...]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "bench.startup", "--num-scenes", str(num_scenes), "--output-dir", folder, *options],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=True,
        )
    return json.loads(done.stdout.splitlines()[-1])


def _watched(arguments: list[str]) -> dict[str, float]:
    """Runs the command with a clock around the denoisers."""
    from nfldm_ns.commands.sample import main
    from nfldm_ns.diffusion import denoisers

    imports, spent = time.process_time(), [0.0]

    def timed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begun = time.thread_time()
            try:
                return forward(*args, **kwargs)
            finally:
                spent[0] += time.thread_time() - begun

        return run

    for cls in (denoisers.GlobalDenoiser, denoisers.CoarseDenoiser, denoisers.FineDenoiser):
        cls.forward = timed(cls.forward)  # type: ignore[method-assign]
    main(arguments)
    return {"seconds": time.process_time() - spent[0], "imports": imports, "denoisers": spent[0]}


if __name__ == "__main__":
    result = _watched(sys.argv[1:])
    print(json.dumps(result))
