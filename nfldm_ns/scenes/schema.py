"""What the JSON files of scenes may say, checked by pydantic and told in one sentence where it is wrong."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Annotated, Any, TypeVar

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from nfldm_ns.errors import UserInputError

INTRINSICS = ("fl_x", "fl_y", "cx", "cy")
LONGEST_NAME = 255  # bytes of one part of a path
# What stands in lists and objects of its own, and the key that tells which one it is, where the file's key does not.
_MEMBERS = {
    "frames": ("frame", "file_path"),
    "scenes": ("scene", ""),
    "bev_classes": ("class", "name"),
    "cameras": ("camera", ""),
}


def _can_be_a_file(name: str) -> str:
    if "\0" in name or any(len(part.encode()) > LONGEST_NAME for part in PurePath(name).parts):
        raise ValueError("no file can have this name")
    return name


def _is_one_folder(name: str) -> str:
    if PurePath(name).name != name:
        raise ValueError("it must be the name of a folder")
    return name


def _is_box(corners: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """One sentence for all that a box can lack; its numbers must be finite in single precision, too."""
    try:
        low, high = torch.tensor(check(corners), dtype=torch.float32)
        if low.shape == (3,) and bool((low.isfinite() & high.isfinite() & (high > low)).all()):
            return corners
    except (ValueError, TypeError, RuntimeError):
        pass
    raise ValueError("it must be [[x, y, z], [x, y, z]], minimum before maximum, in metres")


Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Pixels = Annotated[float, Field(ge=1, le=1e6)]  # some tools write sizes as 64.0
FileName = Annotated[str, Field(min_length=1), AfterValidator(_can_be_a_file)]
FolderName = Annotated[FileName, AfterValidator(_is_one_folder)]
Box = Annotated[list[list[float]], WrapValidator(_is_box)]
Point = Annotated[list[Finite], Field(min_length=3, max_length=3)]


class Checked(BaseModel):
    """Values are of the kind that is asked for, never converted; keys that are not known do not matter."""

    model_config = ConfigDict(extra="ignore", strict=True)


class BevClassEntry(Checked):
    """A class of semantic maps: `nfldm_ns.scenes.collection.BevClass` as files have it."""

    id: Annotated[int, Field(ge=0, le=255)]
    name: str
    color: Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)]


class _Place(Checked):
    map: str
    origin: Point


class _Splits(Checked):
    train: list[FolderName] | None = None
    val: list[FolderName] | None = None
    test: list[FolderName] | None = None


class CollectionFile(Checked):
    """`collection.json`; of optional keys `null` is as good as absent."""

    name: str
    licence: str
    aabb: Box
    near: float
    far: float
    image_size: Annotated[list[Annotated[int, Field(le=10**6)]], Field(min_length=2, max_length=2)]
    splits: _Splits
    scenes: dict[str, _Place] | None = None
    bev_classes: list[BevClassEntry] | None = None
    made_by: dict[str, Any] | None = None


class _Intrinsics(Checked):
    """What stands at the top for all frames, or in a frame; what the numbers mean is checked by `read_transforms`."""

    fl_x: float | None = None
    fl_y: float | None = None
    cx: float | None = None
    cy: float | None = None
    w: Pixels | None = None
    h: Pixels | None = None


class _SceneFrame(_Intrinsics):
    file_path: FileName
    transform_matrix: list[list[float]]
    depth_file_path: FileName | None = None
    mask_path: FileName | None = None


class SceneFile(_Intrinsics):
    """`transforms.json` of a collection's scene; a capture's may say more (`nfldm_ns.collect.formats.nerfstudio`)."""

    frames: list[_SceneFrame]
    train_filenames: list[str] | None = None
    val_filenames: list[str] | None = None
    test_filenames: list[str] | None = None


Schema = TypeVar("Schema", bound=BaseModel)


def validated(schema: type[Schema], content: Any, path: Path) -> Schema:
    """The content of a JSON file as its schema says.

    Raises:
        UserInputError: naming the file, the key, and the frame, scene or class it is of.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise UserInputError(f"{_problem(path, content, error)}: see docs/data.md for the format.") from None


def validated_json(schema: type[Schema], content: Any, path: Path, remedy: str) -> Schema:
    """The same where lists stand for tuples.

    Args:
        remedy: what to do, to end the sentence with.
    """
    try:
        return schema.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise UserInputError(f"{_problem(path, content, error)}: {remedy}.") from None


def shown(value: Any) -> str:
    """A value in a sentence."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _problem(path: Path, content: Any, error: ValidationError) -> str:
    """The first thing that is wrong."""
    first = error.errors()[0]
    where, owner = list(first["loc"]), ""
    if len(where) > 1 and where[0] in _MEMBERS:
        owner = _owner(content, str(where[0]), where[1])
        where = where[2:]
    key = ".".join(part for part in where if isinstance(part, str)) or "content"
    if first["type"] == "missing" and isinstance(first["loc"][-1], str):
        return f"{path} lacks {key if owner else repr(key)}{owner}"
    message = "too few values" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ")
    message = f"{message[0].lower()}{message[1:]}"
    if first["type"].endswith("_type"):
        message = f"a wrong kind: {message}"
    return f"{key}{owner} in {path} is {shown(first['input'])} ({message})"


def _owner(content: Any, members: str, which: int | str) -> str:
    """Whose key it is: of the frame, scene or class of a name or number."""
    kind, name_key = _MEMBERS[members]
    if isinstance(which, int):
        member = content[members][which]
        name = member.get(name_key) if isinstance(member, dict) else None
        if not (isinstance(name, str) and name):
            return f" of {kind} {which}"
        which = name
    return f" of the {kind} {which}"
