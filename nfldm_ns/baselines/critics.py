"""What tells rendered from real images: each looks at images, and beside them at rendered colours if it is to."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.autoencoder.augmentation import augment
from nfldm_ns.autoencoder.discriminator import (
    ProjectedDiscriminator,
    Seen,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.stylegan2_discriminator import StyleGAN2Discriminator

R1_EVERY = 16
R1_STRENGTH = 0.0002  # times pixels per image of a batch (Karras et al. 2020)

Images = Float[Tensor, "batch 3 height width"]


class Critic(nn.Module):
    """A discriminator and what it looks at."""

    discriminator: nn.Module

    @abstractmethod
    def seen(self, images: Images, raw: Images | None) -> Seen:
        """What the discriminator is given of images in [-1, 1].

        Args:
            raw: the colours before the image decoder, of the same size; None without dual discrimination.
        """

    def forward(
        self, rendered: Images, real: Images, raw: tuple[Images, Images] | None, number: int
    ) -> dict[str, Float[Tensor, ""]]:
        """Losses by name, of images in [-1, 1]; those of the renderer and of the discriminator do not mix.

        Args:
            raw: of rendered and of real images, with dual discrimination.
            number: of the pass, for what is not done in every one.
        """
        fake = self.seen(rendered, None if raw is None else raw[0])
        true = self.seen(real, None if raw is None else raw[1])
        losses = {
            "adversarial_loss": generator_loss(self.discriminator, fake),
            "discriminator_loss": discriminator_loss(self.discriminator, fake, true),
        }
        return {**losses, **self.penalty(true, number)}

    def penalty(self, real: Seen, number: int) -> dict[str, Float[Tensor, ""]]:
        """Further losses of the discriminator."""
        return {}


class ProjectedCritic(Critic):
    """Looks at features of the frozen network of LPIPS (`ProjectedDiscriminator`), of images moved and cut at random.

    Args:
        perceptual: this network; it is no part of the module, for it is not trained or saved.
        levels: of its features, 0 the finest.
        dual: whether it also sees raw colours: their features beside those of the image.
    """

    def __init__(self, perceptual: PerceptualNetwork, levels: Sequence[int], dual: bool = False) -> None:
        super().__init__()
        self._perceptual = (perceptual,)
        self.levels = tuple(levels)
        self.discriminator = ProjectedDiscriminator([perceptual.channels[level] * (1 + dual) for level in levels])

    def seen(self, images: Images, raw: Images | None) -> Seen:
        parts = [self._features(part) for part in changed(images, raw).split(3, dim=1)]
        return [torch.cat(levels, dim=1) for levels in zip(*parts, strict=True)]

    def _features(self, images: Images) -> list[Tensor]:
        features = self._perceptual[0].features(images, max(self.levels) + 1)
        return [features[level] for level in self.levels]


class StyleGAN2Critic(Critic):
    """Looks at pixels, moved and cut at random (DiffAugment), with a lazy R1 penalty.

    Args:
        image_size: (height, width) of the images.
        dual: whether it also sees raw colours, as three further channels: EG3D's way.
        widths: `channel_base` and `channel_max` of `StyleGAN2Discriminator`.
    """

    def __init__(self, image_size: tuple[int, int], dual: bool = False, **widths: int) -> None:
        super().__init__()
        self.discriminator = StyleGAN2Discriminator(image_size, in_channels=6 if dual else 3, **widths)

    def seen(self, images: Images, raw: Images | None) -> Seen:
        return changed(images, raw)

    def penalty(self, real: Seen, number: int) -> dict[str, Float[Tensor, ""]]:
        if number % R1_EVERY:
            return {}
        assert isinstance(real, Tensor)
        gamma = R1_STRENGTH * real.shape[-1] * real.shape[-2] / len(real)
        return {"r1_loss": R1_EVERY * r1_penalty(self.discriminator, real, gamma)}


def changed(images: Images, raw: Images | None) -> Float[Tensor, "batch channels height width"]:
    """Images, and raw colours as further channels, moved and cut at random, both alike (DiffAugment).

    A critic whose network has strides sees pixels on a lattice, on which the renderer would draw what it likes.
    """
    both = images if raw is None else torch.cat([images, raw], dim=1)
    return augment(both, ("translation", "cutout"))


def low_resolution(images: Images, rows: int, columns: int) -> Images:
    """Images with the detail of `rows` x `columns` rays alone, at their own size: what raw colours are held against."""
    small = F.interpolate(images, size=(rows, columns), mode="bilinear", align_corners=False, antialias=True)
    return enlarged(small, images.shape[-2:])


def enlarged(images: Images, size: Sequence[int]) -> Images:
    """Images at another, larger size."""
    return F.interpolate(images, size=tuple(size), mode="bilinear", align_corners=False)
