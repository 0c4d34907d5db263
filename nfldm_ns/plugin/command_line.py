"""What nerfstudio's commands were given, which they do not pass on, or would read too late."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import read_json
from nfldm_ns.scenes.schema import Checked, Finite, Pixels, Positive, validated_json

DEFAULT_PATH = "camera_path.json"  # of ns-render


class _Camera(Checked):
    camera_to_world: Annotated[list[Finite], Field(min_length=16, max_length=16)]
    fov: Annotated[float, Field(gt=0, lt=180)]


class CameraPathFile(Checked):
    """What nerfstudio needs of a camera path that its viewer wrote."""

    camera_type: str | None = None
    render_height: Pixels
    render_width: Pixels
    seconds: Positive
    camera_path: list[_Camera]


def check_camera_path(arguments: Sequence[str]) -> None:
    """Raises `UserInputError` if a command is `ns-render camera-path`, and its file holds no path.

    nerfstudio's commands open the run first, and would end in a traceback at the file.

    Args:
        arguments: the command line.
    """
    if "camera-path" not in arguments:
        return
    path = Path(option(arguments, "--camera-path-filename") or DEFAULT_PATH)
    if not path.is_file():
        raise UserInputError(
            f"There is no camera path {path}: save one in the viewer, and give --camera-path-filename."
        )
    found = validated_json(CameraPathFile, read_json(path), path, "save the path in the viewer again")
    if not found.camera_path:
        raise UserInputError(f"The camera path {path} has no cameras: add some in the viewer, and save it again.")


def config_folder(arguments: Sequence[str]) -> Path | None:
    """The folder of the file given as `--load-config` on a command line, if there is such a file."""
    path = Path(option(arguments, "--load-config") or "")
    return path.resolve().parent if path.is_file() else None


def option(arguments: Sequence[str], wanted: str) -> str | None:
    """What a command line gives as an option, written with hyphens or underscores; None if it does not."""
    for i, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name.replace("_", "-") == wanted:
            return value or (arguments[i + 1] if i + 1 < len(arguments) else None)
    return None
