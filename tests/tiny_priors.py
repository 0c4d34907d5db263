"""Latent diffusion pipelines of the real classes with tiny random networks, saved to disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionImageVariationPipeline,
    StableDiffusionPipeline,
    StableUnCLIPImg2ImgPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from nfldm_ns.refine.view_prior import POSE_NUMBERS, PoseProjection

DIM, IMAGE_SIZE = 16, 32


def _unet(**changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=DIM,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **changes,
    )


def _vae() -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.18, **blocks)


def _image_encoder() -> CLIPVisionModelWithProjection:
    sizes = {"hidden_size": DIM, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(image_size=IMAGE_SIZE, patch_size=8, projection_dim=DIM, **sizes)
    return CLIPVisionModelWithProjection(config)


def _image_processor() -> CLIPImageProcessor:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)


def _text(folder: Path) -> dict[str, Any]:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=12)
    sizes = {"hidden_size": DIM, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    config = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=12, **sizes, **ends)
    return {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(config)}


def save_text_prior(folder: Path) -> None:
    """Stable Diffusion."""
    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=_vae(),
        unet=_unet(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **_text(folder.with_name(f"{folder.name}_words")),
    ).save_pretrained(folder)


def save_image_variation_prior(folder: Path) -> None:
    """Stable Diffusion image variations."""
    torch.manual_seed(0)
    StableDiffusionImageVariationPipeline(
        vae=_vae(),
        unet=_unet(),
        image_encoder=_image_encoder(),
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=_image_processor(),
        requires_safety_checker=False,
    ).save_pretrained(folder)


def save_unclip_prior(folder: Path) -> None:
    """Stable unCLIP, which predicts velocities as the real one does."""
    torch.manual_seed(0)
    StableUnCLIPImg2ImgPipeline(
        feature_extractor=_image_processor(),
        image_encoder=_image_encoder(),
        image_normalizer=StableUnCLIPImageNormalizer(DIM),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        unet=_unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * DIM),
        scheduler=DDIMScheduler(prediction_type="v_prediction"),
        vae=_vae(),
        **_text(folder.with_name(f"{folder.name}_words")),
    ).save_pretrained(folder)


def save_view_prior(folder: Path, pose_numbers: int = POSE_NUMBERS) -> None:
    """Zero-1-to-3, component by component, as its published folders are laid out."""
    torch.manual_seed(0)
    parts = {
        "unet": _unet(in_channels=8),
        "vae": _vae(),
        "image_encoder": _image_encoder(),
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        "feature_extractor": _image_processor(),
        "cc_projection": PoseProjection(DIM + pose_numbers, DIM),
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Zero1to3StableDiffusionPipeline"}))
