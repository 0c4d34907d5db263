"""Where files are kept that can be made or fetched again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Our folder in the user's cache, `$XDG_CACHE_HOME` or `~/.cache`; whoever writes there makes it.

    Raises:
        RuntimeError: for a user without a home, where the variable is not set.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nfldm_ns"
