"""One part of the check, in this process: `python -m gpu MODULE:FUNCTION DEVICE JSON CHANGES`, see `gpu/running.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gpu.findings import Findings
from gpu.parts import do_work

if __name__ == "__main__":
    work, device, path, changes = sys.argv[1:]
    do_work(work, Findings(Path(path)), device, json.loads(changes))
