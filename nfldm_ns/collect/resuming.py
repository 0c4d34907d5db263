"""Collections that are made scene by scene, and go on where they were interrupted."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
