"""Latent diffusion models of diffusers as priors: Stable unCLIP, image variations and text of Stable Diffusion."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from jaxtyping import Float
from torch import Tensor

from nfldm_ns.errors import UserInputError
from nfldm_ns.refine.prior import Condition, ImagePrior, resize_square

EMBEDDING_NOISE_SEED = 0


class HubPrior(ImagePrior):
    """What all latent diffusion pipelines have in common: a U-Net on the latents of a variational auto-encoder.

    Args:
        pipeline: a loaded pipeline; its networks become this module's.
        dtype: of the U-Net and of the encoders of conditions; the auto-encoder of images, through which gradients
            flow, stays in single precision.

    Raises:
        UserInputError: if the U-Net wants more than a noisy latent (inpainting models, for example).

    Attributes:
        samples_seen: how many latents the U-Net sees beside each other.
    """

    samples_seen = 1

    def __init__(self, pipeline: Any, dtype: torch.dtype = torch.float32) -> None:
        unet, vae = pipeline.unet, pipeline.vae
        if unet.config.in_channels != self.samples_seen * vae.config.latent_channels:
            raise UserInputError(
                f"The U-Net of this {type(pipeline).__name__} takes {unet.config.in_channels} channels, but latents "
                f"have {vae.config.latent_channels}, of which a {type(self).__name__} sees {self.samples_seen}: choose "
                "another model."
            )
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        super().__init__(
            unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1),
            scheduler.alphas_cumprod,
            scheduler.config.prediction_type,
        )
        self.unet, self.vae = in_dtype(unet, dtype), in_dtype(vae, torch.float32)
        self.pipeline = pipeline  # no module: it holds the same networks, tokenizer and image processor
        for name in ("image_encoder", "text_encoder"):
            if isinstance(network := pipeline.components.get(name), torch.nn.Module):
                setattr(self, name, in_dtype(network, dtype))
        self.eval().requires_grad_(False)

    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels h w"]:
        """The means of the latents, in the units of the U-Net."""
        scaled = 2 * resize_square(images.float(), self.image_size) - 1
        return self.vae.encode(scaled).latent_dist.mean * self.vae.config.scaling_factor

    def decode(self, encoded: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch 3 size size"]:
        return (self.vae.decode(encoded.float() / self.vae.config.scaling_factor).sample + 1) / 2

    def denoise(self, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        dtype = self.unet.dtype
        condition = {name: values.to(dtype) for name, values in condition.items()}
        return self.unet(noisy.to(dtype), timestep, **condition).sample

    @torch.no_grad()
    def embed_images(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """CLIP embeddings by the pipeline's own encoder and image processor."""
        pixels = images.detach().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        inputs = self.pipeline.feature_extractor(images=list(np.asarray(pixels)), return_tensors="pt").pixel_values
        encoder = self.pipeline.image_encoder
        return encoder(inputs.to(encoder.device, encoder.dtype)).image_embeds

    @torch.no_grad()
    def embed_text(self, text: str) -> Float[Tensor, "1 tokens dim"]:
        """Embeddings of words by the pipeline's own encoder."""
        return self.pipeline.encode_prompt(text, self.device, 1, do_classifier_free_guidance=False)[0]


def in_dtype(network: Any, dtype: torch.dtype) -> Any:
    """A network in a precision; left alone if it has it, because diffusers warns of any cast."""
    return network if network.dtype == dtype else network.to(dtype)


class ImageVariationPrior(HubPrior):
    """Stable Diffusion conditioned on a CLIP image embedding in the place of text."""

    def condition(self, images: Tensor | None = None, text: str | None = None) -> Condition:
        if text is not None:
            raise UserInputError("This prior is conditioned on images only: give an image or a folder as style.")
        assert images is not None
        return {"encoder_hidden_states": self.embed_images(images)[:, None]}

    def unconditional(self) -> Condition:
        width = self.unet.config.cross_attention_dim
        return {"encoder_hidden_states": torch.zeros(1, 1, width, device=self.device)}


class UnclipPrior(HubPrior):
    """Stable unCLIP: conditioned on a noised CLIP image embedding, and on text beside it."""

    def condition(self, images: Tensor | None = None, text: str | None = None) -> Condition:
        if images is None:
            raise UserInputError(
                "Stable unCLIP is conditioned on images, also where a text says the style: name clean images with "
                "--clean-images."
            )
        embeddings = self.embed_images(images)
        generator = torch.Generator().manual_seed(EMBEDDING_NOISE_SEED)
        noise = torch.randn(embeddings.shape, generator=generator).to(embeddings)
        labels = self.pipeline.noise_image_embeddings(embeddings, noise_level=0, noise=noise)
        words = self.embed_text(text or "")
        return {"class_labels": labels, "encoder_hidden_states": words.expand(len(images), -1, -1)}

    def unconditional(self) -> Condition:
        width = self.unet.config.projection_class_embeddings_input_dim
        labels = torch.zeros(1, width, device=self.device)
        return {"class_labels": labels, "encoder_hidden_states": self.embed_text("")}


class TextPrior(HubPrior):
    """Stable Diffusion conditioned on text."""

    def condition(self, images: Tensor | None = None, text: str | None = None) -> Condition:
        if images is not None or text is None:
            raise UserInputError(
                "This prior is conditioned on text only: give a text as style, and no --clean-images or negative "
                "guidance."
            )
        return {"encoder_hidden_states": self.embed_text(text)}

    def unconditional(self) -> Condition:
        return {"encoder_hidden_states": self.embed_text("")}
