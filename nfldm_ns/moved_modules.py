"""Modules under the names that they had when older runs wrote them into their `config.yml`.

nfldm_ns 0.1.0 kept what concerns nerfstudio in the rooms of its stages. nerfstudio's `config.yml` names classes by
their modules, so runs of that time would not open any more; this finds those modules where they are now, no others.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "nfldm_ns.autoencoder.nerfstudio_datamanager": "nfldm_ns.plugin.scene_ae_datamanager",
    "nfldm_ns.autoencoder.nerfstudio_model": "nfldm_ns.plugin.scene_ae_model",
    "nfldm_ns.autoencoder.nerfstudio_pipeline": "nfldm_ns.plugin.scene_ae_pipeline",
    "nfldm_ns.autoencoder.nerfstudio_trainer": "nfldm_ns.plugin.scene_ae_trainer",
    "nfldm_ns.autoencoder.run_folder": "nfldm_ns.plugin.run_folder",
    "nfldm_ns.autoencoder.voxel_model": "nfldm_ns.plugin.voxel_model",
    "nfldm_ns.generated.nerfstudio_scene": "nfldm_ns.plugin.generated_scene",
    "nfldm_ns.refine.nerfstudio_refine": "nfldm_ns.plugin.refine",
}


class _MovedModule(Loader):
    """Gives a module that is there under another name."""

    def create_module(self, spec: ModuleSpec) -> None:
        """Leaves it to Python to make one, which is not kept."""

    def exec_module(self, module: ModuleType) -> None:
        """Puts the module that it is now in its place; Python hands out what lies there."""
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


class MovedModules(MetaPathFinder):
    """Finds modules by their former names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, _MovedModule()) if fullname in MOVED else None


def find_moved_modules() -> None:
    """Lets Python import modules by their former names, after all other ways."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
