"""Finds priors among pipelines of diffusers, in folders and on the hub.

A new kind is a class in a file of its own, and a line in `PRIORS`.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionImageVariationPipeline,
    StableDiffusionPipeline,
    StableUnCLIPImg2ImgPipeline,
)
from diffusers.utils import is_peft_available
from safetensors import SafetensorError

from nfldm_ns.errors import UserInputError
from nfldm_ns.refine.hub_priors import HubPrior, ImageVariationPrior, TextPrior, UnclipPrior
from nfldm_ns.refine.view_prior import ViewPipeline, ViewPrior

UNCHECKED = {"safety_checker": None, "requires_safety_checker": False}
# By the class that model_index.json names: who loads it, how, and what it becomes.
PRIORS: dict[str, tuple[Any, dict[str, Any], type[HubPrior]]] = {
    "StableUnCLIPImg2ImgPipeline": (StableUnCLIPImg2ImgPipeline, {}, UnclipPrior),
    "StableDiffusionImageVariationPipeline": (StableDiffusionImageVariationPipeline, UNCHECKED, ImageVariationPrior),
    "StableDiffusionPipeline": (StableDiffusionPipeline, UNCHECKED, TextPrior),
    "Zero1to3StableDiffusionPipeline": (ViewPipeline, {}, ViewPrior),
}


def load_hub_prior(
    name: str, dtype: torch.dtype = torch.float32, lora: str | None = None, lora_scale: float = 1.0
) -> HubPrior:
    """A prior from a folder or a hub id, safetensors only, on the CPU.

    Args:
        name: as `DiffusionPipeline.from_pretrained` takes it.
        lora: a file, folder or hub id of LoRA weights for it, as DreamBooth trains them.
        lora_scale: how much of them is added.

    Raises:
        UserInputError: if it cannot be reached or read, or is of a class we have no use for; and see `add_lora`.
    """
    try:
        kind = dict(DiffusionPipeline.load_config(name)).get("_class_name")
        if kind not in PRIORS:
            raise UserInputError(f"{name} is a {kind}, which is no prior: choose a {', a '.join(PRIORS)}.")
        loader, options, prior = PRIORS[kind]
        pipeline = loader.from_pretrained(name, use_safetensors=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserInputError(
            f"The prior {name} cannot be loaded ({_reason(error)}): give the folder of a diffusers pipeline with "
            "safetensors, or a hub id on a machine that reaches the hub."
        ) from None
    if lora is not None:
        add_lora(pipeline, lora, lora_scale)
    return prior(pipeline, dtype)


def add_lora(pipeline: Any, lora: str, scale: float = 1.0) -> None:
    """Adds LoRA weights to a pipeline's own, W + scale B A (Hu et al. 2022), by diffusers and peft.

    Raises:
        UserInputError: if the pipeline takes none, peft is not installed, or they cannot be loaded.
    """
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserInputError(f"A {type(pipeline).__name__} takes no LoRA weights: leave out --lora.")
    if not is_peft_available():
        raise UserInputError("LoRA weights are loaded by peft, which is not installed: 'pip install peft'.")
    try:
        pipeline.load_lora_weights(lora, use_safetensors=True)
        if not pipeline.get_active_adapters():
            raise ValueError("nothing in it is of this model")
        pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()
    except (OSError, ValueError, LookupError, RuntimeError, SafetensorError) as error:
        raise UserInputError(
            f"The LoRA weights {lora} cannot be loaded ({_reason(error)}): give a safetensors file, its folder, or a "
            "hub id, of weights that were trained for this prior."
        ) from None


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error) else type(error).__name__
