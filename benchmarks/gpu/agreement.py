"""Whether a GPU does what a CPU does: a few steps of each stage in bf16, then the same weights on both.

Trains all stages for a few steps on the device, the way `nfldm-demo --preset gpu` does, and runs the resulting
generator on both devices in single precision: every network by itself on the same inputs, and one scene sampled from
the same noise and rendered.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu.findings import Findings
from gpu.sizes import Sizes
from nfldm_ns.autoencoder.skipping import WEIGHT_BOUND
from nfldm_ns.demo.console import StageConsole
from nfldm_ns.demo.runner import run_stages
from nfldm_ns.demo.settings import DemoSettings
from nfldm_ns.demo.stages import Demo
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, load_pipeline, scene_generators
from nfldm_ns.method_configs.demo_presets import DEMO_PRESETS, MAZE_NAMES
from nfldm_ns.pretrained.weights import fetch_weights
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import SceneBatch, Views

TRAINED = ("collect", "stage1", "encode", "stage2", "stage3")
SCENES = 12
MODELS = "trained"
STEPS = 5  # of each network's training
STEPS_OF_SAMPLING = 10
REPEATS = 3  # of which the fastest counts
SEED = 0
NETWORK_TOLERANCE = 1e-3
"""Root mean square of the difference, relative to that of the CPU's result, of one network on the same inputs."""
SKIPPING_TOLERANCE = 20 * WEIGHT_BOUND
"""The same of a rendering that skips empty and hidden space, against the dense one of the CPU."""
SCENE_TOLERANCE = 5e-2
"""The same of a sampled scene, whose codes may flip where two are about as near."""


@dataclass
class Comparison:
    """One computation on both devices.

    Attributes:
        name: of it.
        error: relative root mean square of the difference.
        tolerance: what is allowed.
        cpu_s, gpu_s: seconds.
    """

    name: str
    error: float
    tolerance: float
    cpu_s: float
    gpu_s: float

    @property
    def agrees(self) -> bool:
        return self.error <= self.tolerance


def agree(findings: Findings, device: str, sizes: Sizes, settings: DemoSettings | None = None) -> None:
    """Trains all stages on the device and compares; what differs by more than is allowed is a failure.

    Args:
        settings: of the trainings; by default the preset gpu with few scenes and steps.
    """
    root = findings.folder / MODELS
    with findings.attempt("training"):
        train_few_steps(root, device, settings or few_scenes(DEMO_PRESETS["gpu"]))
    if "training" in findings.failures:
        return
    with findings.attempt("comparison"):
        pipeline = load_pipeline(root / "stage3" / "pipeline")
        pipeline.set_progress_bar_config(disable=True)
        collection = SceneCollection.open(root / "data")
        batch = collection.batch([collection.load_scene(collection.split("test")[0])])
        for found in compare(pipeline, batch, device, min(REPEATS, sizes.repeats)):
            findings.numbers[found.name] = {**asdict(found), "cpu_by_gpu": found.cpu_s / max(found.gpu_s, 1e-9)}
            said = f"differs from the CPU's result by {found.error:.1e}, more than the {found.tolerance:.0e} allowed."
            findings.require(found.name, found.agrees, f"The {device} result {said}")


def few_scenes(settings: DemoSettings) -> DemoSettings:
    """The same on a few places of two mazes."""
    collection = replace(settings.collection, num_scenes=SCENES, maps=MAZE_NAMES[59:61], test_maps=MAZE_NAMES[60:61])
    return replace(settings, collection=collection)


def train_few_steps(root: Path, device: str, settings: DemoSettings) -> None:
    """All stages up to the generator, on the same data as before, if there was a before."""
    fetch_weights("lpips-vgg")
    settings = settings.with_seed(SEED).on_device(device)
    settings = replace(
        settings,
        time_budget_s=None,
        scene_autoencoder_steps=STEPS,
        latent_training=_few_steps(settings.latent_training, STEPS),
        denoiser_training={name: _few_steps(t, STEPS) for name, t in settings.denoiser_training.items()},
    )
    stages = [s for s in Demo(root, settings, SEED, device).stages() if s.name in TRAINED]
    console = StageConsole([s.name for s in stages], [s.title for s in stages], {})
    run_stages(root, stages, console, redo="stage1")


def _few_steps(training: Any, steps: int) -> Any:
    return replace(training, schedule=replace(training.schedule, max_steps=steps, log_every=1))


# The same on both devices


@torch.no_grad()
def compare(pipeline: NFLDMPipeline, batch: SceneBatch, device: str, repeats: int = 1) -> list[Comparison]:
    """Every network of a generator on the CPU and on the device, in single precision without TF32, and a sampled scene.

    Args:
        pipeline: on the CPU.
        batch: scenes to encode and to render.
    """
    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    there = NFLDMPipeline(**{name: copy.deepcopy(part) for name, part in pipeline.components.items()}).to(device)
    there.set_progress_bar_config(disable=True)
    try:
        return [
            _compare(name, work, tolerance, pipeline, there, repeats)
            for name, work, tolerance in computations(pipeline, batch)
        ]
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed


Work = Callable[[NFLDMPipeline, str], Tensor]


def computations(pipeline: NFLDMPipeline, batch: SceneBatch) -> list[tuple[str, Work, float]]:
    """What is computed: its name, how, and how far its results may be apart.

    The inputs of each are what the CPU gave, so that no difference adds to another.
    """
    grid = pipeline.scene_autoencoder.encode(batch.source)
    latents = pipeline.latent_autoencoder.encode(grid)
    noise = pipeline.draw_noise(batch.source.shape[0], scene_generators(0, batch.source.shape[0]))
    code = pipeline.global_denoiser.code.inverse(noise[0])
    coarse = pipeline.latent_autoencoder.quantise_coarse(latents.coarse)
    timestep = torch.full((len(code),), 500)

    def render(p: NFLDMPipeline, device: str) -> Tensor:
        return p.scene_autoencoder.render(grid.to(device), batch.target.to(device).cameras, skipping=False).rgb

    def skipped(p: NFLDMPipeline, device: str) -> Tensor:
        cameras = batch.target.to(device).cameras
        return p.scene_autoencoder.render(grid.to(device), cameras, skipping=device != "cpu").rgb

    def psi_c(p: NFLDMPipeline, device: str) -> Tensor:
        return p.coarse_denoiser(noise[1].to(device), timestep.to(device), code.to(device))

    def psi_f(p: NFLDMPipeline, device: str) -> Tensor:
        return p.fine_denoiser(noise[2].to(device), timestep.to(device), code.to(device), coarse.to(device))

    def sampled_scene(p: NFLDMPipeline, device: str) -> Tensor:
        output = p(1, scene_generators(0, 1), num_inference_steps=STEPS_OF_SAMPLING)
        assert output.grids is not None
        return p.scene_autoencoder.render(output.grids, output.cameras).rgb

    return [
        ("stage 1: encode", lambda p, d: p.scene_autoencoder.encode(batch.source.to(d)).features, NETWORK_TOLERANCE),
        ("stage 1: render, all samples", render, NETWORK_TOLERANCE),
        ("stage 1: render, skipping", skipped, SKIPPING_TOLERANCE),
        ("stage 1: gradient", lambda p, d: _gradient(p, batch.to(d)), 10 * NETWORK_TOLERANCE),
        ("stage 2: encode", lambda p, d: p.latent_autoencoder.encode(grid.to(d)).coarse, NETWORK_TOLERANCE),
        ("stage 2: decode", lambda p, d: p.latent_autoencoder.decode(latents.to(d)).features, NETWORK_TOLERANCE),
        ("stage 3: psi_g", lambda p, d: p.global_denoiser(noise[0].to(d), timestep.to(d)), NETWORK_TOLERANCE),
        ("stage 3: psi_c", psi_c, NETWORK_TOLERANCE),
        ("stage 3: psi_f", psi_f, NETWORK_TOLERANCE),
        ("a scene, sampled and rendered", sampled_scene, SCENE_TOLERANCE),
    ]


def _gradient(pipeline: NFLDMPipeline, batch: SceneBatch) -> Tensor:
    """Of the error of colours, as a training step has it, by the weights of the image encoder's last layer."""
    model, target = pipeline.scene_autoencoder, batch.target
    weight = model.encoder.out.weight.requires_grad_()
    with torch.enable_grad():
        error = _colour_error(model.render(model.encode(batch.source), target.cameras).rgb, target)
        return torch.autograd.grad(error, weight)[0]


def _colour_error(rgb: Tensor, target: Views) -> Tensor:
    return (rgb - target.images).square().mean()


def _compare(
    name: str, work: Work, tolerance: float, here: NFLDMPipeline, there: NFLDMPipeline, repeats: int
) -> Comparison:
    device = there.device.type
    expected, cpu_s = timed(lambda: work(here, "cpu"), "cpu", repeats)
    found, gpu_s = timed(lambda: work(there, device), device, repeats)
    return Comparison(name, relative_error(found.cpu(), expected), tolerance, cpu_s, gpu_s)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative to that of what is expected; infinite where it is not finite."""
    if not bool(found.isfinite().all()):
        return float("inf")
    scale = expected.double().square().mean().sqrt().clamp(min=1e-12)
    return float((found.double() - expected.double()).square().mean().sqrt() / scale)


def timed(work: Callable[[], Tensor], device: str, repeats: int) -> tuple[Tensor, float]:
    """A result, and the seconds of the fastest of some runs after a first, in which a GPU picks its kernels."""
    result, seconds = work(), float("inf")
    for _ in range(repeats):
        _wait(device)
        begun = time.perf_counter()
        result = work()
        _wait(device)
        seconds = min(seconds, time.perf_counter() - begun)
    return result, seconds


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
