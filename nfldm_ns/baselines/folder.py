"""Where the pipeline of a baseline is; nothing heavy is imported to know it."""

from __future__ import annotations

from pathlib import Path

from nfldm_ns.scenes.collection import read_json

PIPELINE_FOLDER = "pipeline"
PIPELINE_CLASS = "BaselinePipeline"
INDEX = "model_index.json"


def baseline_folder(folder: Path | str) -> Path | None:
    """The folder of a baseline's pipeline, from it or from the run that made it; None for anything else."""
    for path in (Path(folder), Path(folder) / PIPELINE_FOLDER):
        index = read_json(path / INDEX) if (path / INDEX).is_file() else None
        if isinstance(index, dict) and index.get("_class_name") == PIPELINE_CLASS:
            return path
    return None
