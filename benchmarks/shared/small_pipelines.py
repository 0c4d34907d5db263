"""Pipelines of diffusers' own classes, small enough to be learned from a collection on a CPU, and what they learn.

They stand in for pretrained ones where no model hub can be reached: `nfldm-refine` loads them by the same code. All
share an auto-encoder of images and its latents; denoisers predict the noise, as theirs do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.choice import evenly
from nfldm_ns.refine.images import read_square_images
from nfldm_ns.refine.observed_views import middle_squares
from nfldm_ns.refine.view_prior import POSE_NUMBERS, PoseProjection, relative_poses
from nfldm_ns.refine.view_prompts import prompts_by_direction, view_directions
from nfldm_ns.scenes.collection import SceneCollection, read_transforms
from nfldm_ns.training.draws import BatchShare, ItemDraws

SIZE, REDUCTION, LATENT_CHANNELS = 64, 4, 4
WIDTH, TOKENS, NEIGHBOURS = 128, 24, 4
AUTOENCODER_CHANNELS, UNET_CHANNELS = (16, 32, 64), (48, 96, 96)
KL_MULT, LPIPS_MULT, DROPPED = 1e-6, 0.5, 0.1
GREY, DARK, BRIGHT = 0.06, 0.28, 0.5  # chroma below which a colour has no name; brightness
HUES = ("red", "brown", "green", "blue")
ROOM = "a room"
WORDS = ("a", "room", "dark", "bright", "grey", "sks", *HUES, "front", "side", "back", "overhead", "view", ",")


# What is learned


@dataclass
class Photos:
    """Images of a collection, with words and poses.

    Attributes:
        images: `[N, 3, S, S]`, 8 bits.
        words: of each, without where it looks.
        directions: which of `view_prompts.DIRECTIONS` each looks in; the first image of a place looks to its front.
        poses: `camera_to_worlds`.
        near: `[N, NEIGHBOURS]`, the images of the same place that look most nearly the same way, without itself.
    """

    images: UInt8[Tensor, "images 3 size size"]
    words: list[str]
    directions: Int[Tensor, " images"]
    poses: Float[Tensor, "images 3 4"]
    near: Int[Tensor, "images neighbours"]

    @staticmethod
    def read(collection: SceneCollection, split: str, places: int) -> Photos:
        """Those of some places, evenly chosen."""
        images, directions, poses, near = [], [], [], []
        for name in evenly(list(collection.split(split)), places):
            folder = collection.scene_dir(name)
            transforms = read_transforms(folder)
            names = list(dict.fromkeys([*transforms.source_names, *transforms.target_names]))
            cameras = middle_squares(transforms.cameras(names, collection.image_size))
            first, backs = sum(map(len, images)), cameras.camera_to_worlds[:, :, 2]
            alike = (backs @ backs.T).fill_diagonal_(-torch.inf)
            images.append(read_square_images([folder / name for name in names], SIZE))
            directions.append(view_directions(cameras, -backs[0]))
            poses.append(cameras.camera_to_worlds)
            near.append(first + alike.topk(NEIGHBOURS).indices)
        pictures = torch.cat(images)
        words = [describe(picture.float() / 255) for picture in pictures]
        return Photos(pictures, words, torch.cat(directions), torch.cat(poses), torch.cat(near))


def describe(image: Float[Tensor, "3 height width"]) -> str:
    """A room of the image's mean brightness and colour."""
    colour = image.mean((1, 2))
    brightness, chroma = float(colour.mean()), float(colour.max() - colour.min())
    light = "dark " if brightness < DARK else "bright " if brightness > BRIGHT else ""
    red, green, blue = colour.tolist()
    if chroma < GREY:
        hue = "grey"
    elif max(red, green, blue) == red:
        hue = "brown" if green > (red + blue) / 2 else "red"
    else:
        hue = "green" if green > blue else "blue"
    return f"a {light}{hue} room"


# Networks


def make_autoencoder() -> AutoencoderKL:
    """Images of 64 x 64 to latents of 16 x 16."""
    levels = len(AUTOENCODER_CHANNELS)
    return AutoencoderKL(
        block_out_channels=AUTOENCODER_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
    )


def make_unet(in_channels: int = LATENT_CHANNELS) -> UNet2DConditionModel:
    """Of latents; attends to tokens on the two finer levels."""
    return UNet2DConditionModel(
        sample_size=SIZE // REDUCTION,
        in_channels=in_channels,
        out_channels=LATENT_CHANNELS,
        block_out_channels=UNET_CHANNELS,
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's."""
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return DDIMScheduler(**noise, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def make_text(folder: Path) -> dict[str, Any]:
    """A tokenizer that joins the letters of `WORDS` into few tokens, and an encoder of these.

    Args:
        folder: where the tokenizer's files are left.
    """
    letters = sorted({letter for word in WORDS for letter in word})
    merges, pieces = [], []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        for i in range(1, len(parts)):
            merges.append(("".join(parts[:i]), parts[i]))
            pieces.append("".join(merges[-1]))
    merges, pieces = list(dict.fromkeys(merges)), list(dict.fromkeys(pieces))
    known = [*letters, *(f"{letter}</w>" for letter in letters), *pieces, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(known)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in merges) + "\n")
    ends = {"bos_token_id": len(known) - 2, "eos_token_id": len(known) - 1, "pad_token_id": len(known) - 1}
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPTextConfig(vocab_size=len(known), max_position_embeddings=TOKENS, **sizes, **ends)
    return {
        "tokenizer": CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS),
        "text_encoder": CLIPTextModel(config),
    }


class ImageAutoencoder(nn.Module):
    """An auto-encoder's way from images to images."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [-1, 1] through latents with this noise, and the KL divergence of each latent."""
        posterior = self.vae.encode(images).latent_dist
        return self.vae.decode(posterior.mean + posterior.std * noise).sample, posterior.kl()


class WordDenoiser(nn.Module):
    """A U-Net and the encoder of the words that it is told."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: Tensor, timestep: Tensor, tokens: Int[Tensor, "batch tokens"]) -> Tensor:
        return self.unet(noisy, timestep, encoder_hidden_states=self.text_encoder(tokens)[0]).sample


class ViewDenoiser(nn.Module):
    """Zero-1-to-3: a U-Net that sees a reference's latents, and the embedding and relative pose of it as a token."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = make_unet(2 * LATENT_CHANNELS)
        self.image_encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                image_size=SIZE,
                patch_size=8,
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                projection_dim=WIDTH,
            )
        )
        self.cc_projection = PoseProjection(WIDTH + POSE_NUMBERS, WIDTH)
        self._begin_from(unet)

    def _begin_from(self, unet: UNet2DConditionModel) -> None:
        """Takes on a trained U-Net's weights; the reference's have no say yet."""
        weights = {name: value.clone() for name, value in unet.state_dict().items()}
        known = weights["conv_in.weight"]
        weights["conv_in.weight"] = torch.cat([known, torch.zeros_like(known)], dim=1)
        self.unet.load_state_dict(weights)

    def forward(self, noisy: Tensor, timestep: Tensor, pixels: Tensor, told: dict[str, Tensor]) -> Tensor:
        """Args: pixels: of the reference, as the image processor leaves them."""
        known = told["known"]
        embedding = self.image_encoder(pixels).image_embeds
        token = self.cc_projection(torch.cat([embedding, told["pose"]], dim=1)) * known
        seen = torch.cat([noisy, told["reference"] * known[:, :, None, None]], dim=1)
        return self.unet(seen, timestep, encoder_hidden_states=token[:, None]).sample


# Losses: functions of a pass's number, as `nfldm_ns.training.loop.train` takes them


def autoencoder_losses(
    wrapped: nn.Module, photos: Photos, share: BatchShare, perceptual: PerceptualNetwork
) -> Callable[[int], dict[str, Tensor]]:
    """Absolute difference, LPIPS, and a little of the KL divergence."""
    side = photos.images.shape[-1] // REDUCTION

    def losses(number: int) -> dict[str, Tensor]:
        images = photos.images[share.items(len(photos.images), number)].float() / 127.5 - 1
        noise = share.draws(number).normal(torch.empty(len(images), LATENT_CHANNELS, side, side))
        shown, divergence = wrapped(images, noise)
        seen = perceptual.distance(perceptual.features(shown.float()), perceptual.features(images))
        return {
            "image_loss": (shown - images).abs().mean(),
            "lpips_loss": LPIPS_MULT * seen.mean(),
            "kl_loss": KL_MULT * divergence.mean(),
        }

    return losses


@dataclass
class Noise:
    """Latents with noise, and how well it is told from them."""

    latents: Float[Tensor, "images channels h w"]
    share: BatchShare

    def __post_init__(self) -> None:
        self.scheduler = DDPMScheduler.from_config(make_scheduler().config)

    def loss(self, draws: ItemDraws, items: Sequence[int], predict: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The mean square of what a prediction of (noisy, timestep) is off by; draws are those of the pass."""
        clean = self.latents[list(items)]
        timestep = (draws.uniform() * self.scheduler.config.num_train_timesteps).long()
        noise = draws.normal(clean)
        return F.mse_loss(predict(self.scheduler.add_noise(clean, noise, timestep), timestep).float(), noise)


def word_losses(
    wrapped: nn.Module,
    photos: Photos,
    noise: Noise,
    tokenizer: CLIPTokenizer,
    few: tuple[Sequence[int], str] = ((), ""),
) -> Callable[[int], dict[str, Tensor]]:
    """A room, or what `describe` says; half of them with where the view looks; some without a word.

    Args:
        few: numbers of images that every other item is of, and the words of these (DreamBooth).
    """

    def losses(number: int) -> dict[str, Tensor]:
        items = noise.share.items(len(photos.images), number)
        draws = noise.share.draws(number)
        plain, looking, silent = ((draws.uniform() < chance).tolist() for chance in (0.5, 0.5, DROPPED))
        own = [bool(few[0]) and i % 2 == 0 for i in range(len(items))]
        items = [few[0][item % len(few[0])] if mine else item for item, mine in zip(items, own, strict=True)]
        said = []
        for i, item in enumerate(items):
            words = few[1] if own[i] else ROOM if plain[i] else photos.words[item]
            if looking[i]:
                words = prompts_by_direction(words)[int(photos.directions[item])]
            said.append("" if silent[i] else words)
        tokens = tokenize(tokenizer, said)
        return {"denoising_loss": noise.loss(draws, items, lambda x, t: wrapped(x, t, tokens))}

    return losses


def view_losses(
    wrapped: nn.Module, photos: Photos, noise: Noise, references: Float[Tensor, "images channels h w"]
) -> Callable[[int], dict[str, Tensor]]:
    """Views told one that looks nearly the same way, and how it stands to them; some told nothing.

    Args:
        references: latents as the auto-encoder has them.
    """
    processor = make_processor()

    def losses(number: int) -> dict[str, Tensor]:
        items = noise.share.items(len(photos.images), number)
        draws = noise.share.draws(number)
        near = photos.near[items].gather(1, draws.integers(NEIGHBOURS)[:, None])[:, 0]
        told = {
            "pose": relative_poses(photos.poses[items], photos.poses[near]),
            "reference": references[near],
            "known": (draws.uniform() >= DROPPED).float()[:, None],
        }
        pixels = processor(images=list(photos.images[near]), return_tensors="pt").pixel_values
        return {"denoising_loss": noise.loss(draws, items, lambda x, t: wrapped(x, t, pixels, told))}

    return losses


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Int[Tensor, "batch tokens"]:
    """As Stable Diffusion's pipeline does it."""
    limits = {"padding": "max_length", "max_length": TOKENS, "truncation": True}
    return tokenizer(list(texts), return_tensors="pt", **limits).input_ids


def make_processor() -> CLIPImageProcessor:
    """Of images for the encoder of references."""
    size = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size)


@torch.no_grad()
def encode_images(
    vae: AutoencoderKL, images: UInt8[Tensor, "images 3 size size"], at_once: int = 64
) -> Float[Tensor, "images channels h w"]:
    """Means of latents, as the auto-encoder has them."""
    parts = [vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in images.split(at_once)]
    return torch.cat(parts)


# On disk


def save_text(folder: Path, vae: AutoencoderKL, unet: UNet2DConditionModel, text: dict[str, Any]) -> None:
    """As Stable Diffusion."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **text,
    )
    pipeline.save_pretrained(folder)


def save_views(folder: Path, vae: AutoencoderKL, denoiser: ViewDenoiser) -> None:
    """As Zero-1-to-3, component by component."""
    parts = {
        "unet": denoiser.unet,
        "vae": vae,
        "image_encoder": denoiser.image_encoder,
        "scheduler": make_scheduler(),
        "feature_extractor": make_processor(),
        "cc_projection": denoiser.cc_projection,
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Zero1to3StableDiffusionPipeline"}))
