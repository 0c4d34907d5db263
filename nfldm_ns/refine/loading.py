"""Finds a prior by name."""

from __future__ import annotations

import torch

from nfldm_ns.errors import UserInputError
from nfldm_ns.models import resolve_model, shipped_models
from nfldm_ns.refine.domain_prior import DESCRIPTION, load_domain_prior
from nfldm_ns.refine.prior import ImagePrior
from nfldm_ns.refine.settings import Precision

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_prior(
    name: str, precision: Precision = "fp32", lora: str | None = None, lora_scale: float = 1.0
) -> ImagePrior:
    """A prior on the CPU, frozen.

    Args:
        name: the folder of a prior of `nfldm-train-prior` or of its run, the name of one that comes with this package,
            the folder of a diffusers pipeline, or a hub id (`owner/name`).
        precision: of the denoisers of diffusers pipelines; in-domain priors are small and stay in single precision.
        lora, lora_scale: weights for diffusers pipelines, see `load_hub_prior`.

    Raises:
        UserInputError: if there is none, or it cannot be used.
    """
    path = resolve_model(name)
    if any((folder / DESCRIPTION).is_file() for folder in (path, path / "prior")):
        if lora is not None:
            raise UserInputError(
                f"{path} is an in-domain prior, which takes no LoRA weights: leave out --lora, or personalise it with "
                "'nfldm-train-prior --personalise'."
            )
        return load_domain_prior(path)
    if path.exists() and not (path / "model_index.json").is_file():
        raise UserInputError(
            f"{path} holds no prior: give the output folder of 'nfldm-train-prior', the name of one that comes with "
            f"this package ({', '.join(shipped_models(DESCRIPTION))}), or the folder of a diffusers pipeline."
        )
    from nfldm_ns.refine.hub_loading import load_hub_prior

    return load_hub_prior(name, DTYPES[precision], lora, lora_scale)
