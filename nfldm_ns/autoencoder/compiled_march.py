"""`skipping.march` and `skipping.what_rays_see` as one compiled function, where there is a C++ compiler.

`march.cpp` is compiled once per machine, within seconds, and kept in the user's cache, `$XDG_CACHE_HOME` or `~/.cache`.
Without a compiler PyTorch does the same, more slowly, and nothing is said; where compiling fails or the cache cannot be
written, a warning says so once. `NFLDM_COMPILED=0` turns it off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from nfldm_ns.autoencoder.lifting import EPS
from nfldm_ns.autoencoder.skipping import WEIGHT_BOUND, SampledRays
from nfldm_ns.scenes.empty_space import EmptySpace
from nfldm_ns.scenes.writing import atomic_path
from nfldm_ns.user_cache import cache_folder

SOURCE = Path(__file__).with_name("march.cpp")
# The parts of -ffast-math that matter here. The flag itself links code that has the whole process flush denormal
# numbers to zero when the library is loaded, in PyTorch and NumPy, too.
MATHS = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math")
FLAGS = ("-std=c++17", "-O3", *MATHS, "-ffinite-math-only", "-march=native", "-shared", "-fPIC", "-pthread")
_WHOLE, _REAL, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_ARGUMENTS = [_POINTER] * 3 + [_WHOLE] * 4 + [_POINTER] * 3 + [_WHOLE] * 3 + [_REAL] * 2 + [_WHOLE] + [_POINTER] * 3


@cache
def compiled() -> Callable[..., None] | None:
    """The compiled function; None where there is no C++ compiler, it fails (which is told), or it is turned off."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if os.environ.get("NFLDM_COMPILED", "1") == "0" or compiler is None:
        return None
    try:
        library = cache_folder() / f"march-{_fingerprint(compiler)}.so"
        if not library.is_file():
            library.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(library) as temporary:
                command = [*compiler.split(), *FLAGS, str(SOURCE), "-o", str(temporary)]
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        function = ctypes.CDLL(str(library)).nfldm_what_rays_see
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: a user without a home
        warnings.warn(
            f"{SOURCE.name} could not be compiled by {compiler} ({_first_line(error)}): scenes are rendered by PyTorch "
            "alone, more slowly. NFLDM_COMPILED=0 leaves this message out.",
            stacklevel=2,
        )
        return None
    function.argtypes, function.restype = _ARGUMENTS, None
    return function


def _first_line(error: Exception) -> str:
    """What a compiler said, or else what went wrong with it."""
    told = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
    return (told.strip() or str(error)).splitlines()[0]


def _fingerprint(compiler: str) -> str:
    """Of all that the compiled code depends on, the processor among it."""
    processor = platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor += "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    parts = (SOURCE.read_text(encoding="utf-8"), compiler, *FLAGS, processor)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def compiled_what_rays_see(
    density: Float[Tensor, "z y x"],
    space: EmptySpace,
    rays: SampledRays,
    table: Float[Tensor, "voxels channels"],
    num_feature_samples: int | None,
) -> tuple[Float[Tensor, "rays channels"], Float[Tensor, " rays"], Float[Tensor, " rays"]]:
    """As `skipping.what_rays_see` of what `skipping.march` finds, on the CPU and without gradients.

    Args:
        density: float32 with a border of zeros, `[Z + 2, Y + 2, X + 2]`.
    """
    function = compiled()
    assert function is not None
    shape = tuple(size - 2 for size in density.shape)
    kept = num_feature_samples if num_feature_samples is not None and num_feature_samples < rays.num_samples else 0
    features = torch.empty(rays.count, table.shape[1])
    accumulation, ended = torch.empty(rays.count), torch.empty(rays.count)
    inputs = [v.contiguous() for v in (space.distance, density, table, rays.first, rays.step, rays.delta)]
    distance, dense, rows, first, step, delta = (v.data_ptr() for v in inputs)
    function(
        *(distance, dense, rows, *shape, table.shape[1]),
        *(first, step, delta, rays.count, rays.num_samples, kept, WEIGHT_BOUND, EPS, torch.get_num_threads()),
        *(features.data_ptr(), accumulation.data_ptr(), ended.data_ptr()),
    )
    return features, accumulation, ended
