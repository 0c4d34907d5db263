"""Collections that are made scene by scene, and go on where they were interrupted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import read_json
from nfldm_ns.scenes.writing import write_json

OPTIONS_FILE = "collecting.json"


def claim_folder(root: Path, options: Mapping[str, Any], file: str = OPTIONS_FILE) -> None:
    """Makes sure that scenes of two different runs never mix in one folder.

    Args:
        options: all that decides what a scene looks like, for JSON; how many there are may change.
        file: in the folder, where they are kept.

    Raises:
        UserInputError: if the folder was begun with other options, or holds something else.
    """
    path = root / file
    wanted = json.loads(json.dumps(options))
    if path.exists():
        begun = read_json(path)
        known = begun if isinstance(begun, dict) else {}
        changed = [key for key in wanted if known.get(key) != wanted[key]]
        if changed:
            raise UserInputError(
                f"{root} was begun with other options ({', '.join(changed)}): repeat those in {path} "
                "or choose another folder."
            )
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserInputError(f"{root} is not empty and was not begun by this command: choose another folder.")
    else:
        write_json(path, wanted)


def numbered_splits(fractions: Mapping[str, float]) -> Iterator[tuple[int, str]]:
    """Numbers of made-up worlds and what each is for, however many are asked for; the first of each kind come early.

    Args:
        fractions: share of the worlds by held-out split.
    """
    counts = dict.fromkeys(fractions, 0)
    number = 0
    while True:
        split = "train"
        for lag, (name, fraction) in enumerate(fractions.items()):
            if number > lag and counts[name] < math.ceil(fraction * (number - lag)):
                split = name
                counts[name] += 1
                break
        yield number, split
        number += 1
