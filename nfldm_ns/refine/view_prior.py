"""Diffusion models of novel views as priors: Zero-1-to-3 (Liu et al. 2023) in the layout of diffusers.

Its U-Net sees the latents of a reference view beside the noisy ones, and attends to one token: the CLIP embedding of
the reference and the pose of the wanted view relative to it, projected. Its cameras look at an object from around it. A
camera in a room looks out instead; what counts here is the direction that it looks in, as if it looked at its object.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, DDPMScheduler, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from nfldm_ns.errors import UserInputError
from nfldm_ns.refine.hub_priors import HubPrior, in_dtype
from nfldm_ns.refine.images import centre_square
from nfldm_ns.refine.prior import Condition, resize_square
from nfldm_ns.scenes.views import Views

POSE_NUMBERS = 4


def relative_poses(
    poses: Float[Tensor, "views 3 4"], references: Float[Tensor, "views 3 4"]
) -> Float[Tensor, "views 4"]:
    """Zero-1-to-3's (d polar, sin d azimuth, cos d azimuth, d radius) from reference cameras to others.

    Angles (radians) are those of the direction from what a camera looks at to the camera, the opposite of its optical
    axis; the radius is its distance from the origin in metres.
    """
    polar, azimuth, radius = _spherical(poses)
    from_polar, from_azimuth, from_radius = _spherical(references)
    turned = azimuth - from_azimuth
    return torch.stack([polar - from_polar, turned.sin(), turned.cos(), radius - from_radius], dim=-1)


def _spherical(poses: Float[Tensor, "views 3 4"]) -> tuple[Tensor, Tensor, Tensor]:
    back = poses[:, :, 2].float()
    polar = torch.acos((back[:, 2] / back.norm(dim=-1)).clamp(-1, 1))
    return polar, torch.atan2(back[:, 1], back[:, 0]), poses[:, :, 3].float().norm(dim=-1)


class PoseProjection(ModelMixin, ConfigMixin):
    """The linear layer of `cc_projection/`, from embedding and pose to the token.

    Args:
        in_channel: size of a CLIP embedding and a pose.
        out_channel: of the token.
    """

    @register_to_config
    def __init__(self, in_channel: int = 772, out_channel: int = 768) -> None:
        super().__init__()
        self.projection = nn.Linear(in_channel, out_channel)

    def forward(self, told: Float[Tensor, "batch in_channel"]) -> Float[Tensor, "batch out_channel"]:
        return self.projection(told)


@dataclass
class ViewPipeline:
    """The components of a Zero-1-to-3 pipeline, as `HubPrior` takes them."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDPMScheduler
    image_encoder: CLIPVisionModelWithProjection
    feature_extractor: CLIPImageProcessor
    cc_projection: PoseProjection

    @property
    def components(self) -> dict[str, Any]:
        return vars(self)

    @staticmethod
    def from_pretrained(name: str, **options: Any) -> ViewPipeline:
        """From a folder or hub id, one by one: diffusers has the pipeline's class among its community's only."""
        return ViewPipeline(
            UNet2DConditionModel.from_pretrained(name, subfolder="unet", **options),
            AutoencoderKL.from_pretrained(name, subfolder="vae", **options),
            DDPMScheduler.from_pretrained(name, subfolder="scheduler"),
            CLIPVisionModelWithProjection.from_pretrained(name, subfolder="image_encoder", **options),
            CLIPImageProcessor.from_pretrained(name, subfolder="feature_extractor"),
            PoseProjection.from_pretrained(name, subfolder="cc_projection", **options),
        )


class ViewPrior(HubPrior):
    """Conditioned on one observed view, the one that looks most nearly the same way, and the pose relative to it."""

    observes = True
    observes_alone = True
    samples_seen = 2

    def __init__(self, pipeline: ViewPipeline, dtype: torch.dtype = torch.float32) -> None:
        width = pipeline.image_encoder.config.projection_dim + POSE_NUMBERS
        found = pipeline.cc_projection.config.in_channel
        if found != width:
            raise UserInputError(
                f"The projection of this Zero-1-to-3 takes {found} numbers, but embeddings and poses are {width}: give "
                "another folder."
            )
        super().__init__(pipeline, dtype)
        self.cc_projection = in_dtype(pipeline.cc_projection, dtype).requires_grad_(False).eval()

    def condition(self, images: Tensor | None = None, text: str | None = None) -> Condition:
        """Nothing: all that it is told is observed."""
        if text is not None or images is not None:
            raise UserInputError(
                "This prior is conditioned on views of the place alone: leave out --style and --clean-images."
            )
        return {}

    def render_condition(self, images: Tensor) -> Condition:
        raise UserInputError(
            "This prior cannot be told what renders are like: choose --guidance classifier_free or none."
        )

    def unconditional(self) -> Condition:
        return {}

    @torch.no_grad()
    def observing(self, views: Views) -> Callable[[Cameras], Condition]:
        images = centre_square(views.images[0].to(self.device))
        embeddings = self.embed_images(images).float()
        scaled = 2 * resize_square(images.float(), self.image_size) - 1
        latents = self.vae.encode(scaled).latent_dist.mode()  # in units of the auto-encoder, as it was trained
        poses = views.cameras.camera_to_worlds[0].to(self.device)

        def told(cameras: Cameras) -> Condition:
            wanted = cameras.camera_to_worlds[0].to(self.device)
            nearest = (wanted[:, :, 2] @ poses[:, :, 2].T).argmax(1)
            return {
                "embedding": embeddings[nearest],
                "pose": relative_poses(wanted, poses[nearest]),
                "reference": latents[nearest],
                "known": torch.ones(len(wanted), 1, device=self.device),
            }

        return told

    def denoise(self, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        dtype, known = self.unet.dtype, condition["known"]
        told = torch.cat([condition["embedding"], condition["pose"]], dim=1)
        token = self.cc_projection(told.to(dtype)) * known.to(dtype)
        seen = torch.cat([noisy, condition["reference"] * known[:, :, None, None]], dim=1)
        return self.unet(seen.to(dtype), timestep, encoder_hidden_states=token[:, None]).sample
