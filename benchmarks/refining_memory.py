"""Memory and time of refining at the paper's sizes, before anything large is downloaded or trained.

    python benchmarks/refining_memory.py --output-dir OUT [--views-per-step 1] [--precision bf16]

Refines voxels of the preset `paper` for a few steps, exactly as `ns-train nfldm-refine` would, with a prior of the
sizes of Stable unCLIP 2.1 (the paper's choice: `stabilityai/stable-diffusion-2-1-unclip`): its U-Net, auto-encoder and
both CLIP encoders. All weights are random, which changes pictures and neither memory nor time. Embeddings are random,
too, but the encoders stay loaded, as they do in a real run. Prints and leaves `refining_memory.json`: peak memory
(of the GPU; without one of the whole process), seconds per step and parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.scene_files import GeneratedScene, renderer_of
from nfldm_ns.method_configs.presets import SCENE_AUTOENCODER
from nfldm_ns.method_configs.refine import refine_trainer_config
from nfldm_ns.plugin.refine import refine_grid
from nfldm_ns.refine.distillation import DistillationConfig, Guidance
from nfldm_ns.refine.hub_priors import UnclipPrior
from nfldm_ns.refine.loading import DTYPES
from nfldm_ns.refine.prior import Condition
from nfldm_ns.refine.refiner import Refiner
from nfldm_ns.refine.settings import Precision, RefinementConfig
from nfldm_ns.refine.views import ViewSamplingConfig
from nfldm_ns.reports.report import Table
from nfldm_ns.reports.resources import ResourceMeter, device_info
from nfldm_ns.scenes.views import make_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.scenes.writing import require_writable, write_json
from shared.comparisons import use_threads
from shared.running import run
from shared.sampled_views import work_device

TOKENS, EMBEDDING, WORD_DIM = 77, 1024, 1024
BOX = ((-20.0, -20.0, -2.0), (20.0, 20.0, 8.0))
CHANGES = ("density", "features", "background")


@dataclass
class Options:
    """Measure a few steps of refining at the paper's sizes."""

    output_dir: Path
    """folder for the JSON"""
    views_per_step: int = 1
    """renders that a step learns from"""
    guidance: Guidance = "negative"
    """with any but none the U-Net sees every view twice"""
    precision: Precision = "bf16"
    """of the U-Net and the CLIP encoders"""
    steps: int = 2
    """measured together; their time is a mean"""
    threads: int = 2
    """CPU threads"""


class RandomlyConditioned(Refiner):
    """Needs no images of what is wanted: the prior's embeddings are random."""

    def _wanted(self) -> Condition:
        return self.prior.unconditional()


def unclip_networks() -> dict[str, nn.Module]:
    """Networks of the sizes of Stable unCLIP 2.1, by their names in its pipeline."""
    unet = UNet2DConditionModel(
        sample_size=96,
        cross_attention_dim=WORD_DIM,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * EMBEDDING,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=768,
    )
    sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    vision = CLIPVisionConfig(patch_size=14, projection_dim=EMBEDDING, **sizes)
    sizes = {"hidden_size": WORD_DIM, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
    encoders = {
        "image_encoder": CLIPVisionModelWithProjection(vision),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**sizes)),
    }
    return {"unet": unet, "vae": vae, **encoders}


class UnclipOfRandomWeights(UnclipPrior):
    """Networks of Stable unCLIP's sizes, and random embeddings."""

    def __init__(self, dtype: torch.dtype) -> None:
        networks = unclip_networks()
        scheduler = DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")
        super().__init__(SimpleNamespace(**networks, scheduler=scheduler, components=networks), dtype)

    def condition(self, images: Tensor | None = None, text: str | None = None) -> Condition:
        return self._random(1 if images is None else len(images))

    def unconditional(self) -> Condition:
        return self._random(1)

    def _random(self, count: int) -> Condition:
        return {
            "class_labels": torch.randn(count, 2 * EMBEDDING, device=self.device),
            "encoder_hidden_states": torch.randn(count, TOKENS, WORD_DIM, device=self.device),
        }


def paper_scene() -> GeneratedScene:
    """Random voxels of the preset `paper`: a floor, and nothing above it."""
    preset = SCENE_AUTOENCODER["paper"]
    side = preset.image_size
    autoencoder = SceneAutoencoder(aabb=BOX, far=60.0, image_size=(side, side), **preset.network)
    shape = tuple(preset.network["grid_shape"])
    density = torch.zeros(1, 1, *shape)
    density[:, :, : shape[0] // 8] = 10.0
    features = torch.randn(1, preset.network["feature_channels"], *shape)
    background = torch.randn(1, autoencoder.config.background_channels, 4)
    forwards = torch.tensor([[[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0]]])
    cameras = make_cameras(forwards, side / 2, side / 2, side / 2, side / 2, side, side)
    grid = VoxelGrid(density, features, torch.tensor(BOX), background)
    return GeneratedScene(grid, renderer_of(autoencoder), cameras)


def measure(options: Options) -> dict[str, Any]:
    """Peak memory, seconds per step, and millions of parameters."""
    prior = UnclipOfRandomWeights(DTYPES[options.precision])
    config = RefinementConfig(
        prior="random weights",
        precision=options.precision,
        distillation=DistillationConfig(guidance=options.guidance, max_time=0.98),
        views=ViewSamplingConfig(views_per_step=options.views_per_step),
    )
    device, scene = work_device(), paper_scene()
    with ResourceMeter() as meter:
        refiner = RandomlyConditioned(scene, prior, config, device=device)
        begun = meter.use.seconds
        moved = replace(scene, grid=scene.grid.to(device), renderer=refiner.start_renderer)
        optimizers = refine_trainer_config().optimizers
        refine_grid(moved, refiner, {name: optimizers[name] for name in CHANGES}, options.steps)
    use = meter.use.as_dict()
    networks = {"U-Net": prior.unet, "auto-encoder": prior.vae, "image encoder": prior.image_encoder}
    networks |= {"text encoder": prior.text_encoder, "renderer": scene.renderer}
    return {
        "precision": options.precision,
        "guidance": options.guidance,
        "views_per_step": options.views_per_step,
        "peak_gib": use.get("peak_gpu_gib", use["peak_rss_gib"]),
        "seconds_per_step": (meter.use.seconds - begun) / options.steps,
        "millions_of_parameters": {n: sum(p.numel() for p in m.parameters()) / 1e6 for n, m in networks.items()},
        "device": device_info(),
    }


def main(options: Options) -> None:
    use_threads(options.threads)
    if min(options.views_per_step, options.steps) < 1:
        raise UserInputError("--views-per-step and --steps must be at least 1: give larger numbers.")
    require_writable(options.output_dir)
    found = measure(options)
    write_json(options.output_dir / "refining_memory.json", found)
    keys = ("precision", "guidance", "views_per_step", "peak_gib", "seconds_per_step")
    caption = "Refining at the paper's sizes with a prior of Stable unCLIP's."
    print(
        Table(
            [key.replace("_", " ") for key in keys], [[found[k] for k in keys]], caption, digits=(0, 0, 0, 2, 1)
        ).markdown()
    )


if __name__ == "__main__":
    run(main, Options, __doc__)
