"""Trained models that come with this package; each folder has a model card, README.md."""

from __future__ import annotations

from pathlib import Path

GENERATOR = "vizdoom-rooms"
"""Name of the generator that is used where none is named."""
PRIOR = "vizdoom-prior"
"""Name of the prior that its scenes can be refined with."""
SCENE_AUTOENCODER = "vizdoom-stage1"
"""Name of a stage 1 with learned refinement, to encode with or to train on from."""
PRIORS = {GENERATOR: PRIOR}
"""Names of the priors that were made for the scenes of a generator, by its name."""


def resolve_model(name_or_folder: Path | str) -> Path:
    """What is given where there is such a folder, else the folder of the shipped model of that name, if any."""
    folder = Path(name_or_folder)
    shipped = Path(__file__).parent / folder
    is_name = len(folder.parts) == 1 and not folder.is_absolute()
    return shipped if is_name and not folder.exists() and shipped.is_dir() else folder


def shipped_models(containing: str = "README.md") -> list[str]:
    """Names of the models that are there, all or those with a certain file."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob(f"*/{containing}"))
