"""Where everything of a demo lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nfldm_ns.demo.scene_training import run_folder
from nfldm_ns.demo.settings import METHOD


@dataclass(frozen=True)
class DemoFolder:
    """The folders of a demo.

    Attributes:
        root: of all.
        method: of stage 1 in nerfstudio.
    """

    root: Path
    method: str = METHOD

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def stage1(self) -> Path:
        return run_folder(self.root, self.method)

    @property
    def voxels(self) -> Path:
        return self.root / "voxels"

    @property
    def stage2(self) -> Path:
        return self.root / "stage2"

    @property
    def stage3(self) -> Path:
        return self.root / "stage3"

    @property
    def model(self) -> Path:
        """The generator in half precision, where there is one."""
        return self.root / "model"

    @property
    def generated(self) -> Path:
        return self.root / "generated"

    @property
    def shipped(self) -> Path:
        """Scenes of the model that comes with the package."""
        return self.root / "shipped"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation"

    @property
    def samples(self) -> Path:
        """Pictures of generated scenes, for the evaluation."""
        return self.evaluation / "samples"

    @property
    def logs(self) -> Path:
        return self.root / "logs"
