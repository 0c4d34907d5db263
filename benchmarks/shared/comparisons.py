"""What the comparisons of variants share: their options, and results that are made once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.writing import require_writable, write_json

V = TypeVar("V")


@dataclass(kw_only=True)
class VariantOptions:
    """Which variants are trained and compared."""

    output_dir: Path
    """folder for one JSON per variant"""
    group: str
    """which variants: one of GROUPS"""
    variants: tuple[str, ...] = ()
    """of the group; by default all"""
    base: str = "tiny"
    """preset that they change"""
    seeds: tuple[int, ...] = (0,)
    """trainings of each variant"""
    threads: int = 2
    """CPU threads"""

    def begin(self, groups: Mapping[str, Mapping[str, V]], presets: Iterable[str]) -> dict[str, V]:
        """Checks what was chosen, and makes the folder.

        Returns:
            the variants to compare, by name.

        Raises:
            UserInputError: if there is no such group, variant or preset, or nothing to do.
        """
        require_choice("group", self.group, groups)
        group = groups[self.group]
        for name in self.variants:
            require_choice("variant", name, group)
        require_choice("preset", self.base, presets)
        if not self.seeds:
            raise UserInputError("--seeds is empty: give at least one.")
        use_threads(self.threads)
        require_writable(self.output_dir)
        return {name: variant for name, variant in group.items() if name in (self.variants or group)}

    def result(self, variant: str, seed: int) -> Path:
        """Where the result of a variant lies."""
        words = variant.replace("/", " ").replace("+", " ").replace(",", " ").split()
        return self.output_dir / f"{'-'.join([self.group, *words])}-seed{seed}.json"


def require_choice(kind: str, name: str, choices: Iterable[str]) -> None:
    """Raises `UserInputError` unless `name` is one of the choices."""
    choices = list(choices)
    if name not in choices:
        raise UserInputError(f"There is no {kind} {name}: choose one of {', '.join(choices)}.")


def use_threads(count: int) -> None:
    """Sets the CPU threads of torch; raises `UserInputError` for less than one."""
    if count < 1:
        raise UserInputError(f"--threads is {count}: give at least 1.")
    torch.set_num_threads(count)


def stored(path: Path, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What lies at `path`, or what `make()` gives, which is written there with the settings.

    Raises:
        UserInputError: if the file was made with other settings.
    """
    settings = as_json(settings)
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["settings"] != settings:
            raise UserInputError(f"{path} was made with other settings: choose another --output-dir or delete it.")
        return found
    write_json(path, {"settings": settings, **make()})
    return json.loads(path.read_text(encoding="utf-8"))


def find_result(folder: Path, made_with: dict[str, Any]) -> dict[str, Any] | None:
    """What another group left that was made with the same settings."""
    made_with = as_json(made_with)
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("settings", None) == made_with:
            return found
    return None


def fingerprint(settings: dict[str, Any]) -> str:
    """Twelve hexadecimal digits that differ where settings do."""
    return hashlib.sha256(json.dumps(as_json(settings), sort_keys=True).encode()).hexdigest()[:12]


def as_json(value: Any) -> Any:
    """Settings as they come back from a file: paths as text, tuples as lists."""
    return json.loads(json.dumps(value, default=str))
