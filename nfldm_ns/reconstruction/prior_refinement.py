"""What no image shows of a reconstructed place, refined by a prior of images that observes those that there are.

As in ReconFusion (Wu et al. 2024), whose prior sees the observed views from each pose: there it trains a radiance
field, here it changes the voxels of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nerfstudio.cameras.cameras import Cameras

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.scene_files import GeneratedScene, renderer_of
from nfldm_ns.plugin.refine import refine_grid
from nfldm_ns.refine.distillation import DistillationConfig
from nfldm_ns.refine.prior import ImagePrior
from nfldm_ns.refine.refiner import Refiner
from nfldm_ns.refine.settings import RefinementConfig
from nfldm_ns.scenes.views import Views
from nfldm_ns.scenes.voxel_grid import VoxelGrid


def observed_refinement() -> RefinementConfig:
    """ReconFusion's objective, from much noise to little, by what a prior that observes says without guidance."""
    asked = DistillationConfig(
        objective="multistep", guidance="none", max_time=0.6, time_annealing="decreasing", sample_every=4
    )
    return RefinementConfig(distillation=asked)


@dataclass(frozen=True)
class PriorRefinement:
    """How voxels are refined by a prior.

    Attributes:
        prior: one that observes views is told the given images; others what they are told of any scene.
        optimizers: of density, features and background, as in `RefineTrainerConfig`.
        steps: of the refinement.
        config: what is wanted.
    """

    prior: ImagePrior
    optimizers: Mapping[str, Any]
    steps: int = 40
    config: RefinementConfig = field(default_factory=observed_refinement)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserInputError(f"--prior-steps is {self.steps}: give at least 1.")


def refine_by_prior(
    autoencoder: SceneAutoencoder,
    grid: VoxelGrid,
    views: Views,
    cameras: Cameras,
    refinement: PriorRefinement,
    seed: int,
) -> VoxelGrid:
    """V of an answer, refined.

    Args:
        autoencoder: stage 1, which renders.
        views: the given images, `[1, N]`.
        cameras: of the answer, `[M]`; others are drawn around them.
    """
    device = grid.device
    scene = GeneratedScene(grid, renderer_of(autoencoder).to(device), cameras)
    refiner = Refiner(scene, refinement.prior, refinement.config, seed, device, observed=views)
    return refine_grid(scene, refiner, refinement.optimizers, refinement.steps, seed)
