"""A training step of each stage on random scenes: steps per second, memory, and share of what the device can do."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from stage1 import Step, random_views
from torch import Tensor, nn

from gpu.findings import Findings
from gpu.measuring import matrix_rate, measured_step
from gpu.sizes import Sizes
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.diffusion.latent_memory import LatentMemory
from nfldm_ns.diffusion.training import STAGES, DiffusionLosses, Stage, new_denoiser
from nfldm_ns.diffusion.trajectory import CAMERA_DIM
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder
from nfldm_ns.latents.training import LatentLosses, LatentTrainingConfig
from nfldm_ns.method_configs.latent_presets import DIFFUSION_PRESETS, LATENT_PRESETS
from nfldm_ns.method_configs.presets import SCENE_AUTOENCODER
from nfldm_ns.scenes.views import Views
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.training.compiling import compiled_model
from nfldm_ns.training.draws import ItemDraws
from nfldm_ns.training.loop import LossFunction, take_step
from nfldm_ns.training.schedule import Schedule, batch_share, new_accelerator

PRECISION = "bf16"  # as `nfldm-demo --preset gpu` trains


def train(findings: Findings, device: str, sizes: Sizes) -> None:
    """A step of every network of a preset, in bf16 and with the batch that the preset has (`measured_step`).

    Numbers by network: `stage 1`, `stage 2`, and the denoisers `global`, `coarse`, `fine`; `tflops_per_second` is what
    large matrices reach in bf16.
    """
    rate = 0.0
    with findings.attempt("matrix rate"):
        rate = matrix_rate(device, torch.bfloat16, sizes.matrix)
        findings.numbers["tflops_per_second"] = rate / 1e12
    for name, step in training_steps(device, sizes):
        with findings.attempt(name):
            findings.numbers[name] = measured_step(step(), device, rate or 1.0, sizes.repeats, sizes.budget_s)


def training_steps(device: str, sizes: Sizes) -> Iterator[tuple[str, Callable[[], Callable[[], Any]]]]:
    """Names of networks, and what makes a step of each."""
    yield "stage 1", lambda: stage1_step(device, sizes)
    yield "stage 2", lambda: latent_training(sizes).step
    for stage in STAGES:
        yield stage, lambda stage=stage: diffusion_training(stage, sizes).step


# Stage 1


def stage1_step(device: str, sizes: Sizes) -> Callable[[], Any]:
    """A step of stage 1 once its discriminator takes part; the perceptual network has random weights."""
    step = _stage1(device, sizes, PRECISION)
    return lambda: step.run(step.loss)


def stage1_losses(device: str, sizes: Sizes, precision: str) -> Callable[[], tuple[float, Tensor]]:
    """What gives the loss of stage 1 without its discriminator, and its gradient by all weights as one vector.

    A few steps in single precision come first, so that the weights are the same in both precisions.
    """
    step = _stage1(device, sizes, "fp32")
    for _ in range(sizes.warm_steps):
        step.run(step.loss)
    step.precision = precision

    def loss() -> tuple[float, Tensor]:
        step.model.zero_grad()
        total = torch.stack(list(step.losses(step.loss, adversarial=False).values())).sum()
        total.backward()
        return float(total.detach()), gradient(step.model)

    return loss


def _stage1(device: str, sizes: Sizes, precision: str) -> Step:
    perceptual = PerceptualNetwork(random_lpips(), torch.bfloat16 if precision == "bf16" else torch.float32)
    torch.manual_seed(0)
    return Step(sizes.preset, device, precision, perceptual, sizes.batch_size)


def gradient(model: nn.Module) -> Tensor:
    """By all weights, as one vector; the weights have none afterwards."""
    found = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def random_lpips() -> Any:
    """LPIPS of VGG16 with random weights: it needs no download, and takes as long."""
    import lpips

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # torchvision's renamed argument
        metric = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    metric.scaling_layer = lpips.ScalingLayer()
    metric.net.to_empty(device="cpu")
    metric.lins.to_empty(device="cpu")
    torch.manual_seed(0)
    metric.requires_grad_(False)
    for parameter in (*metric.net.parameters(), *metric.lins.parameters()):
        nn.init.kaiming_normal_(parameter) if parameter.ndim > 1 else nn.init.zeros_(parameter)
    for head in metric.lins.parameters():  # distances are positive
        head.abs_()
    for i, head in enumerate(metric.lins):  # the package registers each head under two names
        setattr(metric, f"lin{i}", head)
    return metric.eval()


# Stages 2 and 3


@dataclass
class Training:
    """A training of stage 2 or 3 on random scenes, as `nfldm_ns.training.loop` does it."""

    model: nn.Module
    wrapped: nn.Module
    compute_losses: LossFunction
    optimizer: AcceleratedOptimizer
    schedule: Schedule
    accelerator: Accelerator
    number: int = 0

    def step(self) -> list[dict[str, Tensor]]:
        """The next step."""
        self.number += 1
        return take_step(
            self.number - 1, self.wrapped, self.compute_losses, self.optimizer, self.schedule, self.accelerator
        )

    def loss(self, number: int) -> tuple[float, Tensor]:
        """The loss of a pass, and its gradient by all weights as one vector, without a step."""
        with self.accelerator.autocast():
            losses = self.compute_losses(number)
        total = torch.stack([value for name, value in losses.items() if not name.startswith("_")]).sum()
        self.model.zero_grad()
        total.backward()
        return float(total.detach()), gradient(self.model)


def _training(
    model: nn.Module, schedule: Schedule, make_losses: Callable[[nn.Module, Accelerator], LossFunction], sizes: Sizes
) -> Training:
    """A model with its losses, on the device of accelerate."""
    given = {} if sizes.batch_size is None else {"batch_size": sizes.batch_size}
    schedule = replace(schedule, report_to="none", **given)
    with tempfile.TemporaryDirectory() as folder:  # for trackers, of which there are none
        accelerator = new_accelerator(schedule, folder)
    model.to(accelerator.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    losses = make_losses(compiled_model(wrapped, schedule.compile_with), accelerator)
    return Training(model, wrapped, losses, prepared, schedule, accelerator)


class RandomScenes(LatentLosses):
    """The losses of stage 2 of one batch of random voxels and views."""

    scenes: tuple[VoxelGrid, Views]

    def batch(self, number: int) -> tuple[VoxelGrid, Views, ItemDraws]:
        grid, views = self.scenes
        return grid, views, self.share.draws(number, self.device)


def latent_training(sizes: Sizes, precision: str = PRECISION, backend: str | None = None) -> Training:
    """Of stage 2, with stage 1 to render by."""
    torch.manual_seed(0)
    preset = LATENT_PRESETS[sizes.preset]
    model = latent_autoencoder(sizes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    config = replace(preset.training, schedule=_in(preset.training.schedule, precision, backend))

    def make_losses(wrapped: nn.Module, accelerator: Accelerator) -> RandomScenes:
        stage1 = scene_autoencoder(sizes).to(accelerator.device).eval().requires_grad_(False)
        lpips = random_lpips().to(accelerator.device) if config.losses.lpips_mult else None
        batch = sizes.batch_size or config.schedule.batch_size
        grid = random_voxels(batch, stage1)
        views = random_views(batch, config.num_views, stage1.image_size[0])
        losses = RandomScenes(
            wrapped, model.voxel_code, stage1, _NOTHING, _NOTHING, _with_batch(config, batch), accelerator, lpips
        )
        losses.scenes = grid.to(accelerator.device), views.to(accelerator.device)
        return losses

    return _training(model, config.schedule, make_losses, sizes)


def diffusion_training(stage: Stage, sizes: Sizes, precision: str = PRECISION, backend: str | None = None) -> Training:
    """Of a denoiser, on random latents."""
    torch.manual_seed(0)
    preset = DIFFUSION_PRESETS[sizes.preset]
    config = preset.training[stage]
    config = replace(config, schedule=_in(config.schedule, precision, backend))
    batch = sizes.batch_size or config.schedule.batch_size
    config = replace(config, schedule=replace(config.schedule, batch_size=batch))
    latents = latent_autoencoder(sizes)
    memory = random_latents(batch, latents, SCENE_AUTOENCODER[sizes.preset].num_source_views)
    denoiser = new_denoiser(stage, preset.models[stage], memory, latents)

    def make_losses(wrapped: nn.Module, accelerator: Accelerator) -> DiffusionLosses:
        share = batch_share(config.schedule, accelerator)
        return DiffusionLosses(stage, wrapped, denoiser, memory, config, accelerator.device, share)

    return _training(denoiser, config.schedule, make_losses, sizes)


_NOTHING: Any = None  # in the place of scenes on disk


def _in(schedule: Schedule, precision: str, backend: str | None) -> Schedule:
    return replace(schedule, mixed_precision="bf16" if precision == "bf16" else "no", compile_with=backend)


def _with_batch(config: LatentTrainingConfig, batch: int) -> LatentTrainingConfig:
    return replace(config, schedule=replace(config.schedule, batch_size=batch))


def scene_autoencoder(sizes: Sizes) -> SceneAutoencoder:
    """Stage 1 of the preset, untrained."""
    preset = SCENE_AUTOENCODER[sizes.preset]
    side = preset.image_size
    return SceneAutoencoder(**preset.network, image_size=(side, side), focal_length=side / 1.25)


def latent_autoencoder(sizes: Sizes) -> LatentAutoencoder:
    """Stage 2 of the preset, untrained."""
    network = SCENE_AUTOENCODER[sizes.preset].network
    shared = {key: network[key] for key in ("grid_shape", "feature_channels", "background_channels") if key in network}
    return LatentAutoencoder(**{**LATENT_PRESETS[sizes.preset].model, **shared})


def random_voxels(batch: int, stage1: SceneAutoencoder) -> VoxelGrid:
    """Voxels of which a third are occupied, before a random background."""
    generator = torch.Generator().manual_seed(0)
    density = (3 * torch.randn(batch, 1, *stage1.grid_shape, generator=generator) - 1).clamp(min=0)
    features = torch.randn(batch, stage1.feature_channels, *stage1.grid_shape, generator=generator)
    background = torch.randn(batch, *stage1.background_shape, generator=generator)
    return VoxelGrid(density, features, stage1.aabb.cpu(), background)


def random_latents(count: int, latents: LatentAutoencoder, num_cameras: int) -> LatentMemory:
    """Latents of scenes of unit variance, none of them turned."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, 1, *shape, generator=generator)

    coarse = normal(*latents.coarse_shape).half()
    code = normal(latents.global_dim + CAMERA_DIM * num_cameras)
    fine = normal(*latents.fine_shape).half()
    return LatentMemory(code, coarse, coarse, fine, num_cameras, (51.2, 51.2, 32.0, 32.0), (64, 64))
