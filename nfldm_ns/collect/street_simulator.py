"""MetaDrive in an environment and a process of its own: made once, asked through `metadrive/server.py`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from nfldm_ns.collect.street_light import StreetLight
from nfldm_ns.collect.street_roads import Lane, read_lanes
from nfldm_ns.collect.street_scenery import Scenery
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.writing import atomic_path, clear_unfinished
from nfldm_ns.user_cache import cache_folder

PACKAGES = ("metadrive-simulator==0.3.0.1", "panda3d-gltf==0.13", "panda3d-simplepbr==0.10")
"""The last release of MetaDrive whose wheel carries its models, and what reads them."""
_SERVER = Path(__file__).parent / "metadrive" / "server.py"
_ARRAYS = ("vertices", "normals", "uv", "colours", "triangles")
_OPENGL = (
    "it needs OpenGL through EGL, without a display (on Debian and Ubuntu: sudo apt install libegl1 libgl1 "
    "libgl1-mesa-dri)"
)


def default_environment() -> Path:
    """Where MetaDrive's environment is made unless told otherwise: our folder in the user's cache."""
    return cache_folder() / "-".join(PACKAGES[0].split("=="))


def ready_environment(folder: Path) -> bool:
    """Whether MetaDrive's environment has been made there."""
    return _python(folder).exists()


def make_environment(folder: Path) -> None:
    """Makes a virtual environment with MetaDrive, from the package index that pip is set up with; whole or not at all.

    One process installs at a time; others wait. What a killed one left beside the folder, about 1 GB, is removed.

    Raises:
        UserInputError: if the folder holds something else, or pip cannot install it.
    """
    if ready_environment(folder):
        return
    if folder.exists():
        raise UserInputError(f"{folder} exists and has no Python in it: remove it, or give another --environment.")
    with _one_at_a_time(folder):
        if ready_environment(folder):
            return
        clear_unfinished(folder.parent, folder.name)
        with atomic_path(folder) as temporary:
            _install(temporary)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Waits until no other process makes this folder; the system takes the lock from one that is killed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _install(folder: Path) -> None:
    steps = (
        [sys.executable, "-m", "venv", str(folder)],
        [str(_python(folder)), "-m", "pip", "install", "--quiet", "--no-compile", *PACKAGES],
    )
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            told = [line for line in done.stderr.splitlines() if line.strip() and "WARNING" not in line]
            why = told[-1].strip() if told else f"exit code {done.returncode}"
            raise UserInputError(
                f"The environment of MetaDrive could not be made ({why}): install {' '.join(PACKAGES)} into a "
                "virtual environment of your own and give its folder as --environment."
            )


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


class StreetSimulator:
    """A process of MetaDrive's environment; use it as a context.

    Args:
        size: width and height of pictures in pixels.

    Raises:
        UserInputError: if it does not start, or cannot draw.
    """

    def __init__(self, environment: Path, size: tuple[int, int]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="nfldm_streets_"))
        variables = {
            key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "DISPLAY"))
        }
        variables |= {"SDL_VIDEODRIVER": "dummy", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "1"}
        self._log = (self._folder / "log").open("w+")
        self._process = subprocess.Popen(
            [str(_python(environment)), str(_SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=variables,
        )
        try:
            self.versions = self._ask("hello", size=list(size))
        except UserInputError:
            self.close()
            raise

    def __enter__(self) -> StreetSimulator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process and removes its files; may be called again."""
        if not self._folder.exists():
            return
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._process.terminate()
        self._process.wait()
        self._log.close()
        for path in self._folder.iterdir():
            path.unlink()
        self._folder.rmdir()

    def open_layout(self, seed: int, blocks: int) -> list[Lane]:
        """Makes the road network of a seed; returns its lanes."""
        file = self._folder / "lanes.npz"
        self._ask("layout", seed=seed, blocks=blocks, file=str(file))
        return read_lanes(file)

    def set_traffic(self, seed: int, cars: float) -> int:
        """Puts cars onto that share of the places on lanes; returns how many."""
        return self._ask("traffic", seed=seed, cars=cars)["cars"]

    def step(self, steps: int) -> list[dict[str, Any]]:
        """Lets the traffic drive for so many tenths of a second; returns its vehicles."""
        return self._ask("step", steps=steps)["vehicles"]

    def set_scenery(self, scenery: Scenery) -> None:
        """What stands still, until the next layout."""
        file = self._folder / "scenery.npz"
        arrays = {f"texture_{name}": pixels for name, pixels in scenery.textures.items()}
        arrays |= {f"{i}_{key}": mesh[key] for i, mesh in enumerate(scenery.meshes) for key in _ARRAYS}
        np.savez(file, **arrays)  # type: ignore[arg-type]
        meshes = [{key: value for key, value in mesh.items() if key not in _ARRAYS} for mesh in scenery.meshes]
        self._ask("scenery", file=str(file), meshes=meshes)

    def draw(
        self,
        light: StreetLight,
        vehicles: Sequence[dict[str, Any]],
        poses: Float[np.ndarray, "views 3 4"],
        focal_lengths: Sequence[float],
    ) -> tuple[
        UInt8[np.ndarray, "views height width 3"],
        Float[np.ndarray, "views height width"],
        UInt8[np.ndarray, "views height width"],
    ]:
        """Colours, planar depth in metres (0 in the sky) and classes of cameras of one moment.

        Args:
            vehicles: with `kind`, `x`, `y`, `heading`, `paint` and `label`, their class in the pictures.
            poses: OpenGL camera-to-world in the layout's world.
        """
        file = self._folder / "views.npz"
        self._ask(
            "draw",
            light={key: value for key, value in vars(light).items() if key != "kind"},
            centre=poses[:, :2, 3].mean(axis=0).tolist(),
            vehicles=list(vehicles),
            poses=poses.tolist(),
            focal_lengths=[float(f) for f in focal_lengths],
            file=str(file),
        )
        with np.load(file) as arrays:
            return arrays["colours"], arrays["depths"], arrays["labels"]

    def _ask(self, what: str, **values: Any) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps({"do": what, **values}) + "\n")
            stdin.flush()
            line = stdout.readline()
        if not line:
            raise UserInputError(
                f"MetaDrive's process ended while asked to '{what}' ({self._last_words()}): {_OPENGL}."
            )
        answer = json.loads(line)
        if not answer.pop("ok"):
            if what == "hello":
                raise UserInputError(f"MetaDrive's streets cannot be drawn here ({answer['error']}): {_OPENGL}.")
            raise RuntimeError(f"MetaDrive failed to '{what}': {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1] if lines else f"exit code {self._process.returncode}"
