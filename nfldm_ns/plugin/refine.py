"""Refining a generated scene in nerfstudio: the method `nfldm-refine`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import tyro
import yaml
from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from nfldm_ns.autoencoder.refinement import density_logits
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.errors import UserInputError, exit_on_bad_input
from nfldm_ns.generated.scene_files import DESCRIPTION, GeneratedScene, load_generated_scene
from nfldm_ns.metrics.images import psnr
from nfldm_ns.models import PRIORS
from nfldm_ns.plugin.generated_run import write_generated_scene
from nfldm_ns.plugin.generated_scene import (
    GeneratedSceneModel,
    GeneratedSceneModelConfig,
    GeneratedScenePipeline,
    GeneratedScenePipelineConfig,
    present_folder,
)
from nfldm_ns.plugin.run_folder import MovableTrainerConfig
from nfldm_ns.plugin.scene_ae_trainer import (
    CheckedOptimizers,
    CosineScheduleConfig,
    WholeCheckpointTrainer,
    first_step,
)
from nfldm_ns.plugin.voxel_model import VoxelGridField
from nfldm_ns.refine.settings import RefinementConfig
from nfldm_ns.scenes.collection import BEV_FILE, read_json
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.scenes.writing import atomic_path

if TYPE_CHECKING:
    from nfldm_ns.refine.refiner import Refiner

MOST_BROKEN_STEPS = 10  # in a row
RESULT = "scene"


class RefinedField(VoxelGridField):
    """A scene's V and how it has changed.

    The parameters are changes: of the density before softplus, so that it never becomes negative, and of features and
    background in units of their standard deviations. All begin at 0, where V is the scene's (with at least 1e-4/m).
    """

    def __init__(self, grid: VoxelGrid) -> None:
        super().__init__(grid, trainable=False)
        self.density_change = nn.Parameter(torch.zeros_like(self.density))
        self.feature_change = nn.Parameter(torch.zeros_like(self.features))
        self.background_change = None if self.background is None else nn.Parameter(torch.zeros_like(self.background))

    def make_grid(self) -> VoxelGrid:
        raw = density_logits(self.density)
        features = self.features + _spread(self.features) * self.feature_change
        background: Tensor | None = self.background
        if background is not None and self.background_change is not None:
            background = background + _spread(background) * self.background_change
        return VoxelGrid(F.softplus(raw + self.density_change), features, self.aabb, background)

    def changes(self) -> dict[str, list[nn.Parameter]]:
        """The parameters by the name of their optimiser."""
        groups = {"density": [self.density_change], "features": [self.feature_change]}
        return groups if self.background_change is None else {**groups, "background": [self.background_change]}


def _spread(values: Tensor) -> Tensor:
    """The standard deviation of what is not 0; 1 if that is nothing."""
    used = values.detach()[values.detach() != 0]
    return used.std() if used.numel() > 1 else values.new_tensor(1.0)


# Steps, with and without nerfstudio's trainer


def step_losses(
    refiner: Refiner, grid: VoxelGrid, renderer: SceneAutoencoder, step: int, total_steps: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Losses and numbers of one step (`Refiner.losses`), which depend on seed, step and weights alone.

    (Objectives that keep views for several steps also depend on the weights of the first of these.)
    """
    number = int(np.random.SeedSequence((seed, step)).generate_state(1)[0])
    generator = torch.Generator().manual_seed(number)
    return refiner.losses(grid, renderer, step / max(total_steps - 1, 1), generator, step)


def make_optimizers(
    optimizers: Mapping[str, Any], parameters: dict[str, list[nn.Parameter]], total_steps: int
) -> CheckedOptimizers:
    """Optimisers by their configurations, with schedules that end with the run."""
    groups = copy.deepcopy(dict(optimizers))
    for group in groups.values():
        if isinstance(group["scheduler"], CosineScheduleConfig) and group["scheduler"].max_steps is None:
            group["scheduler"].max_steps = total_steps
    return CheckedOptimizers(groups, parameters)


def refine_grid(
    scene: GeneratedScene, refiner: Refiner, optimizers: Mapping[str, Any], steps: int, seed: int = 0
) -> VoxelGrid:
    """The voxels that `ns-train nfldm-refine` ends with, without its run: nothing is written or shown.

    Args:
        scene: on the refiner's device.
        refiner: of the scene.
        optimizers: of density, features and background, as in `RefineTrainerConfig`.
        steps: of the whole refinement.
        seed: of what its steps draw.

    Raises:
        FloatingPointError: if a step has no finite gradient.
    """
    field = RefinedField(scene.grid).to(scene.grid.device)
    groups = make_optimizers(optimizers, field.changes(), steps)
    scaler = GradScaler(enabled=False)
    for step in range(steps):
        groups.zero_grad_all()
        losses, _ = step_losses(refiner, field.grid(), scene.renderer, step, steps, seed)
        torch.stack(list(losses.values())).sum().backward()
        groups.optimizer_scaler_step_some(scaler, list(groups.parameters))
        for name in groups.parameters:
            groups.scheduler_step(name)
    with torch.no_grad():
        return field.grid()


@dataclass
class RefineModelConfig(GeneratedSceneModelConfig):
    """Configuration of `RefineModel`."""

    _target: type = field(default_factory=lambda: RefineModel)
    """target class to instantiate"""
    tune_decoder: bool = False
    """the image decoder learns, too; by default it is frozen"""


class RefineModel(GeneratedSceneModel):
    """A scene whose changes are the parameters."""

    config: RefineModelConfig
    field: RefinedField

    def populate_modules(self) -> None:
        super().populate_modules()
        self.field = RefinedField(self.field.grid())
        self.decoder.decoder.requires_grad_(self.config.tune_decoder)

    def get_param_groups(self) -> dict[str, list[nn.Parameter]]:
        groups = self.field.changes()
        if self.config.tune_decoder:
            groups["decoder"] = list(self.decoder.decoder.parameters())
        return groups


@dataclass
class RefinePipelineConfig(GeneratedScenePipelineConfig):
    """Configuration of `RefinePipeline`."""

    _target: type = field(default_factory=lambda: RefinePipeline)
    """target class to instantiate"""
    model: RefineModelConfig = field(default_factory=RefineModelConfig)
    """specifies the model config"""


class RefinePipeline(GeneratedScenePipeline):
    """Shows a scene and, given a `Refiner`, how it could be better. Without one it shows, renders and evaluates."""

    config: RefinePipelineConfig
    model: RefineModel  # type: ignore[assignment]

    def refine_with(self, refiner: Refiner, seed: int, total_steps: int) -> None:
        """What the training steps follow; a step depends on the seed, its number and the weights alone."""
        self._refiner = (refiner, seed, total_steps)  # a tuple keeps the prior out of our checkpoints

    def get_train_loss_dict(self, step: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Losses of a few views, drawn at random; `FloatingPointError` if the prior says nothing finite."""
        refiner, seed, total_steps = self._refiner
        losses, metrics = step_losses(refiner, self.model.shown_grid(), self.model.renderer(), step, total_steps, seed)
        return {}, losses, metrics

    @exit_on_bad_input()
    def get_eval_image_metrics_and_images(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """A view of the scene as it began, beside the same view now, and their PSNR (dB)."""
        camera, batch = self.datamanager.next_eval_image(step)
        with torch.no_grad(), self.model.as_trained():
            now = self.model.get_outputs_for_camera(camera)["rgb"]
        before = batch["image"].to(now)
        metrics = {"psnr_to_start": float(psnr(now.movedim(-1, -3), before.movedim(-1, -3)))}
        return {**metrics, "num_rays": before[..., 0].numel()}, {"before_and_now": torch.cat([before, now], dim=1)}


@dataclass
class RefineTrainerConfig(MovableTrainerConfig):
    """Configuration of `RefineTrainer`."""

    _target: type = field(default_factory=lambda: RefineTrainer)
    """target class to instantiate"""
    max_num_iterations: int = 40
    """steps of this run; after --load-dir so many further ones: give what is left of the planned steps"""
    refinement: tyro.conf.OmitArgPrefixes[RefinementConfig] = field(default_factory=RefinementConfig)
    """what the scene is refined to"""
    result: Path | None = None
    """folder of the refined scene; by default scene/ in the run's folder"""
    pipeline: RefinePipelineConfig = field(default_factory=RefinePipelineConfig)
    """pipeline configuration"""

    def scene_folder(self) -> Path:
        """The scene that is refined.

        Raises:
            UserInputError: if it is none.
        """
        folder = present_folder(self.pipeline.datamanager.data or self.data)
        if not (folder / DESCRIPTION).is_file():
            raise UserInputError(f"{folder} is no generated scene: make some with 'nfldm-sample'.")
        return folder

    def result_folder(self) -> Path:
        """Where the refined scene goes."""
        return self.result or self.get_base_dir() / RESULT

    @exit_on_bad_input()
    def save_config(self) -> None:
        """Looks at the options first; the file itself is written once scene and prior are there (`write_config`)."""
        scene = self.scene_folder()
        self._choose_prior(scene)
        self.refinement.check()
        distillation = self.refinement.distillation
        if distillation.objective == "multistep" and self.steps_per_save % distillation.sample_every:
            raise UserInputError(
                f"Samples are kept for {distillation.sample_every} steps, which do not divide the "
                f"{self.steps_per_save} steps from one checkpoint to the next, so a resumed run would differ: change "
                "--sample-every or --steps-per-save."
            )
        if self.machine.num_devices * self.machine.num_machines > 1:
            raise UserInputError("A scene is refined by one process: leave out --machine.num-devices.")
        if self.result is not None and self.result.resolve() == scene.resolve():
            raise UserInputError(
                f"{self.result} is the scene to be refined, which stays as it is: give another --result."
            )
        if self.result is not None and self.result.exists() and self.load_dir is None:
            raise UserInputError(f"{self.result} exists: give another --result, or go on with its run by --load-dir.")

    def _choose_prior(self, scene: Path) -> None:
        """Where none is named, the prior that comes with the generator of the scene."""
        if self.refinement.prior is not None:
            return
        description = read_json(scene / DESCRIPTION)
        provenance = description.get("provenance") if isinstance(description, dict) else None
        generator = provenance.get("pipeline") if isinstance(provenance, dict) else None
        if isinstance(generator, str) and generator in PRIORS:
            prior = self.refinement.prior = PRIORS[generator]
            CONSOLE.print(f"Refining with {prior}, the prior for scenes of {generator}; --prior names another.")

    def write_config(self) -> None:
        """Writes `config.yml` with absolute paths, so that it can be used from any folder."""
        saved = copy.deepcopy(self)
        saved.output_dir = self.output_dir.resolve()
        saved.data = saved.pipeline.datamanager.data = saved.pipeline.model.scene = self.scene_folder().resolve()
        saved.result = None if self.result is None else self.result.resolve()
        with atomic_path(self.get_base_dir() / "config.yml") as temporary:
            temporary.write_text(yaml.dump(saved), encoding="utf-8")


class RefineTrainer(WholeCheckpointTrainer):
    """Refines a scene; with every checkpoint the scene as it then is becomes a generated scene."""

    config: RefineTrainerConfig
    pipeline: RefinePipeline

    @exit_on_bad_input()
    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Loads scene and prior before anything is written."""
        from nfldm_ns.refine.loading import load_prior
        from nfldm_ns.refine.refiner import Refiner
        from nfldm_ns.refine.seen_maps import map_of_scene

        refinement, seed = self.config.refinement, self.config.machine.seed
        self._scene = load_generated_scene(self.config.scene_folder())
        assert refinement.prior is not None
        priors = [load_prior(refinement.prior, refinement.precision, refinement.lora, refinement.lora_scale)]
        if refinement.second_prior is not None:
            priors.append(load_prior(refinement.second_prior, refinement.precision))
        maps = next((prior.maps for prior in priors if prior.maps is not None), None)
        scene_map = map_of_scene(maps, self.config.scene_folder(), refinement.bev, self._scene.grid.aabb)
        refiner = Refiner(copy.deepcopy(self._scene), priors, refinement, seed, self.device, scene_map)
        super().setup(*args, **kwargs)
        self.pipeline.refine_with(refiner, seed, self.total_steps)
        self._broken_steps = 0

    @property
    def total_steps(self) -> int:
        """Of the run, before a resumption too."""
        return first_step(self.config) + self.config.max_num_iterations

    @exit_on_bad_input()
    def setup_optimizers(self) -> Optimizers:
        """Optimisers, with schedules that end with the run."""
        self.config.write_config()  # now, because the viewer needs the run's folder next
        return make_optimizers(self.config.optimizers, self.pipeline.get_param_groups(), self.total_steps)

    @exit_on_bad_input()
    def train_iteration(self, step: int) -> Any:
        """One step; leaves out those whose gradient is not finite, and ends the run when they do not cease."""
        try:
            result = super().train_iteration(step)
        except FloatingPointError as error:
            self._broken_steps += 1
            if self._broken_steps >= MOST_BROKEN_STEPS:
                reason = ", ".join(map(str, error.args))
                raise UserInputError(
                    f"{MOST_BROKEN_STEPS} steps up to {step} had no finite gradient ({reason}): "
                    "choose --precision fp32, smaller learning rates or another --max-time."
                ) from error
            self.optimizers.zero_grad_all()
            nothing = torch.zeros((), device=self.device)
            return nothing, {"distillation_loss": nothing}, {"skipped_steps_in_a_row": float(self._broken_steps)}
        self._broken_steps = 0
        return result

    @exit_on_bad_input()
    def save_checkpoint(self, step: int) -> None:
        """Writes a checkpoint and the scene, each whole or not at all."""
        super().save_checkpoint(step)
        scene = self._scene
        assert scene.cameras is not None
        with torch.no_grad():
            grid = self.pipeline.model.shown_grid().to("cpu")
        write_generated_scene(
            self.config.result_folder(),
            grid,
            self.pipeline.model.renderer(),
            scene.cameras,
            scene.latents,
            refined_provenance(scene.provenance, self.config, step + 1),
            attachments=self._attachments(),
        )

    def _attachments(self) -> dict[str, bytes]:
        """The map that the scene came with or was given."""
        path = self.config.refinement.bev or self.config.scene_folder() / BEV_FILE
        return {BEV_FILE: path.read_bytes()} if path.is_file() else {}


def refined_provenance(before: Mapping[str, Any], config: RefineTrainerConfig, steps: int) -> dict[str, Any]:
    """What a scene says of its making, and what was then done to it; its latents stay those of the sample."""
    refinement = config.refinement
    entry = {
        "command": "ns-train nfldm-refine",
        "scene": str(config.scene_folder()),
        "prior": refinement.prior,
        "style": refinement.style,
        "clean_images": None if refinement.clean_images is None else str(refinement.clean_images),
        "observed": refinement.observed,
        "bev": None if refinement.bev is None else str(refinement.bev),
        "strength": refinement.strength,
        "distillation": vars(refinement.distillation),
        "lora": refinement.lora,
        "lora_scale": refinement.lora_scale,
        "second": {
            name.removeprefix("second_"): str(value) if isinstance(value, Path) else value
            for name, value in vars(refinement).items()
            if name.startswith("second_") and refinement.second_prior is not None
        },
        "view_prompt_share": refinement.view_prompt_share,
        "views": vars(refinement.views),
        "shading": vars(refinement.shading),
        "regularisers": vars(refinement.regularisers),
        "decoder": "tuned" if config.pipeline.model.tune_decoder else "frozen",
        "steps": steps,
        "seed": config.machine.seed,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    return {**before, "refinements": [*before.get("refinements", []), entry]}
