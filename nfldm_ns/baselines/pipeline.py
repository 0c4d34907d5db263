"""A trained baseline as a pipeline of diffusers: latents to scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.autoencoder.checkpoints import WEIGHTS, read_weights
from nfldm_ns.autoencoder.model_configs import build_model, read_scheduler
from nfldm_ns.autoencoder.renderers import SceneRenderer
from nfldm_ns.baselines.cameras import CameraModel
from nfldm_ns.baselines.folder import INDEX, baseline_folder
from nfldm_ns.baselines.registry import COMPONENT_CLASSES
from nfldm_ns.baselines.scene_generator import SceneGenerator
from nfldm_ns.diffusion.call_checks import check_count, check_generator
from nfldm_ns.diffusion.denoisers import GlobalDenoiser
from nfldm_ns.diffusion.pipeline import NUM_STEPS, Generators, Steps
from nfldm_ns.diffusion.solver import sample_latents
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import BevClass, read_json
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.training.identity import model_hash

UNUSED = [None, None]  # as diffusers writes a component that a pipeline does without


@dataclass
class BaselineLatents:
    """Latents of a batch of scenes.

    Attributes:
        scene: `[B, D]`, what V is made of.
        pose: `[B, P]`, what its cameras are made of.
    """

    scene: Float[Tensor, "batch dim"]
    pose: Float[Tensor, "batch pose_dim"]

    def to(self, *args, **kwargs) -> BaselineLatents:
        """Moves or converts both as `Tensor.to` does."""
        return BaselineLatents(self.scene.to(*args, **kwargs), self.pose.to(*args, **kwargs))

    def state_dict(self) -> dict[str, Tensor]:
        """Both by name, contiguous, for safetensors."""
        return {"scene": self.scene.contiguous(), "pose": self.pose.contiguous()}


@dataclass
class BaselinePipelineOutput(BaseOutput):
    """Generated scenes.

    Attributes:
        grids: voxels of all scenes.
        latents: that they are made of.
        cameras: batch shape `[B, N]`.
    """

    grids: VoxelGrid
    latents: BaselineLatents
    cameras: Cameras


class BaselinePipeline(DiffusionPipeline):
    """Samples scenes of a baseline (docs/baselines.md).

    Args:
        scene_autoencoder: renders the scenes; it has no encoder.
        generator: latents of scenes to voxels.
        cameras: latents of cameras to cameras.
        prior: a diffusion model of both latents; None where they are standard normal, as those of GANs.
        scheduler: of the prior.
    """

    _optional_components: ClassVar[list[str]] = ["prior", "scheduler"]
    bev_size: ClassVar[None] = None
    bev_classes: ClassVar[tuple[BevClass, ...]] = ()

    def __init__(
        self,
        scene_autoencoder: SceneRenderer,
        generator: SceneGenerator,
        cameras: CameraModel,
        prior: GlobalDenoiser | None = None,
        scheduler: DPMSolverMultistepScheduler | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            scene_autoencoder=scene_autoencoder, generator=generator, cameras=cameras, prior=prior, scheduler=scheduler
        )

    @property
    def default_steps(self) -> int:
        """Denoising steps where none are asked for: 30, or 1 without a diffusion model."""
        return 1 if self.prior is None else NUM_STEPS

    @property
    def latent_dims(self) -> list[int]:
        """Sizes of the latents of scenes and cameras."""
        return [self.generator.latent_dim, int(self.cameras.latent_dim)]

    @torch.no_grad()
    def __call__(
        self,
        num_scenes: int = 1,
        generator: Generators = None,
        num_inference_steps: Steps | None = None,
        return_dict: bool = True,
    ) -> BaselinePipelineOutput:
        """Samples `num_scenes` scenes.

        Args:
            generator: one for all, or one per scene; with one per scene a scene does not depend on the others.
            num_inference_steps: of the diffusion model, one number; None for `default_steps`.
            return_dict: False gives a tuple of the output's attributes.

        Raises:
            ValueError: for arguments that make no sense.
        """
        check_count("num_scenes", num_scenes)
        check_generator(generator, num_scenes)
        given = self.default_steps if num_inference_steps is None else num_inference_steps
        if isinstance(given, Sequence):
            raise ValueError(f"num_inference_steps are {given}, but a baseline diffuses one latent: give one number")
        steps = check_count("num_inference_steps", given)
        if self.prior is None and steps != 1:
            raise ValueError(f"num_inference_steps is {steps}, but a GAN makes scenes in one step")
        several = generator if generator is None or isinstance(generator, torch.Generator) else list(generator)
        latents = randn_tensor((num_scenes, sum(self.latent_dims)), generator=several, device=self._execution_device)
        if self.prior is not None:
            latents = self.prior.code.inverse(sample_latents(self.prior, self.scheduler, latents, steps))
        scene, pose = latents.split(self.latent_dims, dim=1)
        grids = self.generator(scene)
        if not bool(grids.density.isfinite().all() and grids.features.isfinite().all()):
            raise ValueError("the voxels are not finite, so the training diverged")
        self.maybe_free_model_hooks()
        output = BaselinePipelineOutput(grids=grids, latents=BaselineLatents(scene, pose), cameras=self.cameras(pose))
        return output if return_dict else tuple(output.values())  # type: ignore[return-value]

    def require_guidance(self, guidance_scale: float, with_map: bool = False) -> None:
        """Raises `ValueError` for anything but 1: nothing is conditioned."""
        if guidance_scale != 1:
            raise ValueError(f"a baseline has no condition that guidance_scale {guidance_scale} could strengthen")

    def provenance(self) -> dict[str, Any]:
        """What tells its scenes from those of others."""
        names = ("generator", "prior")
        hashes = {name: None if (part := getattr(self, name)) is None else model_hash(part) for name in names}
        return {**hashes, "scheduler": None if self.scheduler is None else type(self.scheduler).__name__}


def load_baseline(folder: Path | str) -> BaselinePipeline:
    """Reads a trained baseline and checks it.

    Args:
        folder: of a `BaselinePipeline`, or of the run that made it.

    Raises:
        UserInputError: if a component is missing, truncated, or does not fit the others.
    """
    found = baseline_folder(folder)
    if found is None:
        raise UserInputError(f"{folder} is no trained baseline: give the output folder of 'nfldm-train-gan'.")
    folder = found
    components: dict[str, Any] = {name: _component(folder / name, kinds) for name, kinds in COMPONENT_CLASSES.items()}
    components |= {"prior": None, "scheduler": None}
    if read_json(folder / INDEX).get("prior", UNUSED) != UNUSED:
        components["prior"] = _component(folder / "prior", (GlobalDenoiser,))
        components["scheduler"] = read_scheduler(
            DPMSolverMultistepScheduler, folder / "scheduler" / "scheduler_config.json"
        )
    check_agreement(components, folder)
    return BaselinePipeline(**components)


def _component(folder: Path, classes: Sequence[type]) -> Any:
    """A component of one of some classes whose weights are exactly those its configuration asks for."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserInputError(f"{folder.parent} lacks component {folder.name}: restore it or train again.")
    config = read_json(path)
    name = config.get("_class_name") if isinstance(config, dict) else None
    cls = next((cls for cls in classes if cls.__name__ == name), classes[0])
    return build_model(cls, config, path, read_weights(folder / WEIGHTS), folder / WEIGHTS)


def check_agreement(components: dict[str, Any], where: Path | str) -> None:
    """Raises `UserInputError` unless the components were made for each other, as far as shapes tell."""
    generator, renderer, cameras, prior = (
        components[name] for name in ("generator", "scene_autoencoder", "cameras", "prior")
    )
    made = generator.config
    facts = [
        ("grid shape", tuple(made.grid_shape), renderer.grid_shape),
        ("number of channels", made.feature_channels, renderer.feature_channels),
        ("number of background channels", made.background_channels, renderer.background_shape[0]),
        ("box", generator.box.tolist(), renderer.aabb.tolist()),
    ]
    if prior is not None:
        facts.append(("size of latents", generator.latent_dim + cameras.latent_dim, prior.sample_shape[0]))
    for what, value, expected in facts:
        if value != expected:
            raise UserInputError(
                f"In {where} the {what} of generator is {value}, but that of the other components is {expected}: use "
                "components of one training."
            )
