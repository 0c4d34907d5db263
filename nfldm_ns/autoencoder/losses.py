"""Losses of stage 1 (the paper's scene auto-encoder): perceptual reconstruction, adversarial and depth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.autoencoder.augmentation import AugmentPolicy, augment
from nfldm_ns.autoencoder.discriminator import (
    ProjectedDiscriminator,
    Seen,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)
from nfldm_ns.autoencoder.perceptual import PERCEPTUAL_CHANNELS, PerceptualNetwork
from nfldm_ns.autoencoder.renderer import FeatureMaps
from nfldm_ns.autoencoder.scene_autoencoder import RenderedViews, depth_errors, downsample_depth, measured_share
from nfldm_ns.autoencoder.stylegan2_discriminator import StyleGAN2Discriminator
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.views import Views, valid_cells
from nfldm_ns.scenes.voxel_grid import VoxelGrid


@dataclass
class StageOneLossConfig:
    """Weights of the losses.

    Attributes:
        lpips_mult: perceptual distance of rendered and real images (the paper's reconstruction loss).
        lpips_views: how many target views of each scene, drawn at random, the perceptual distance and the discriminator
            see in a step; None for all. The perceptual network costs more than everything else together; few views give
            the same gradient on average.
        adversarial_mult: of the loss that the discriminator gives rendered images; 0 trains without one.
        adversarial_start: first step with a discriminator: before, it would only learn that images are blurred.
        discriminator: "stylegan2" looks at pixels (the paper's), "projected" at features of the perceptual network: of
            use after some ten steps instead of thousands. Each wants its own optimiser, which the presets set.
        adversarial_levels: projected: levels of the perceptual network whose features it looks at, 0 the finest.
        discriminator_channel_base, discriminator_channel_max: stylegan2: its widths, see `StyleGAN2Discriminator`.
        r1_gamma: stylegan2: strength of the gradient penalty on real images, which it needs to stay stable; 0 leaves it
            out. Grows with the pixels and falls with the images per step (Karras et al. 2020, "Training GANs with
            Limited Data": 0.0002 * pixels / images).
        r1_every: in every so many steps the penalty is added, so many times as strong ("lazy").
        augment: stylegan2: what randomly changes real and rendered images before it sees them, see `augment`. Keeps it
            from learning a small collection by heart; of no use where it never sees an image twice.
        rgb_mult: mean absolute error of colours; steadies short trainings.
        depth_mult: error of expected depth, over known pixels.
        depth_norm: "l2" is the mean squared error in m^2 (the paper's), "l1" the mean absolute error in m, which edges
            dominate less.
        feature_mult: mean square of voxel features: keeps V simple for the later stages.
        opacity_mult: of `opacity_loss`, which keeps the sky out of the box.
        hidden_background_mult: of `hidden_background_loss`, which makes the background look like what hides it.
    """

    lpips_mult: float = 1.0
    lpips_views: int | None = None
    adversarial_mult: float = 0.0
    adversarial_start: int = 0
    discriminator: Literal["projected", "stylegan2"] = "projected"
    adversarial_levels: tuple[int, ...] = (1, 2)
    discriminator_channel_base: int = 16384
    discriminator_channel_max: int = 512
    r1_gamma: float = 0.0
    r1_every: int = 16
    augment: tuple[AugmentPolicy, ...] = ()
    rgb_mult: float = 1.0
    depth_mult: float = 0.02
    depth_norm: Literal["l1", "l2"] = "l2"
    feature_mult: float = 0.0
    opacity_mult: float = 0.0
    hidden_background_mult: float = 0.0

    @property
    def needs_perceptual_network(self) -> bool:
        """Whether a loss looks at its features."""
        return bool(self.lpips_mult or (self.adversarial_mult and self.discriminator == "projected"))


def make_discriminator(config: StageOneLossConfig, image_size: tuple[int, int]) -> nn.Module | None:
    """The discriminator of images of `image_size` (height, width); None if `adversarial_mult` is 0.

    Raises:
        UserInputError: if its settings do not fit together, or the images.
    """
    if not config.adversarial_mult:
        return None
    if config.discriminator == "projected":
        if config.r1_gamma or config.augment:
            raise UserInputError(
                "The projected discriminator sees features, but the loss's r1_gamma or augment acts on pixels: leave "
                "r1_gamma at 0 and augment empty, or choose the discriminator stylegan2."
            )
        return ProjectedDiscriminator([PERCEPTUAL_CHANNELS[level] for level in config.adversarial_levels])
    if config.r1_gamma < 0 or config.r1_every < 1:
        raise UserInputError(
            f"The loss's r1_gamma is {config.r1_gamma} and r1_every {config.r1_every}: give at least 0 and 1."
        )
    try:
        return StyleGAN2Discriminator(image_size, config.discriminator_channel_base, config.discriminator_channel_max)
    except ValueError as error:
        raise UserInputError(
            f"The stylegan2 discriminator cannot be made ({error}): change the loss's discriminator_channel_base and "
            "discriminator_channel_max, or use larger images."
        ) from error


def stage_one_losses(
    config: StageOneLossConfig,
    rendered: RenderedViews,
    target: Views,
    grid: VoxelGrid,
    perceptual: PerceptualNetwork | None,
    discriminator: nn.Module | None = None,
    step: int = 0,
) -> dict[str, Float[Tensor, ""]]:
    """Weighted losses by name. One backward pass of their sum trains auto-encoder and discriminator.

    Args:
        target: views of batch shape `[B, M]`; pixels of unknown depth never supervise depth, masked ones nothing.
        perceptual: needed for `lpips_mult` and the projected discriminator.
        discriminator: from `make_discriminator`; adds the adversarial loss and its own, whose gradients do not mix.
        step: of the training; says when the gradient penalty is due (`r1_loss`).
    """
    rendered = replace(rendered, rgb=target.covered(rendered.rgb))
    losses = {"rgb_loss": config.rgb_mult * F.l1_loss(rendered.rgb, target.images)}
    if config.lpips_mult or discriminator is not None:
        losses.update(_view_losses(config, rendered, target, perceptual, discriminator, step))
    if target.depths is not None:
        losses["depth_loss"] = config.depth_mult * depth_loss(rendered.maps, target, config.depth_norm)
    if config.feature_mult:
        losses["feature_loss"] = config.feature_mult * grid.features.square().mean()
    if config.opacity_mult:
        losses["opacity_loss"] = config.opacity_mult * opacity_loss(rendered.maps, target)
    if config.hidden_background_mult:
        losses["hidden_background_loss"] = config.hidden_background_mult * hidden_background_loss(rendered.maps)
    return losses


def _view_losses(
    config: StageOneLossConfig,
    rendered: RenderedViews,
    target: Views,
    perceptual: PerceptualNetwork | None,
    discriminator: nn.Module | None,
    step: int,
) -> dict[str, Float[Tensor, ""]]:
    """The losses that look at a few views only."""
    chosen = torch.randperm(target.shape[1])[: config.lpips_views]
    fake, real = (views[:, chosen].flatten(0, 1) * 2 - 1 for views in (rendered.rgb, target.images))
    losses = {}
    if config.lpips_mult or (discriminator is not None and config.discriminator == "projected"):
        if perceptual is None:
            raise ValueError("lpips_mult or a projected discriminator is set, but no perceptual network was given")
        features = [perceptual.features(images) for images in (fake, real)]
        if config.lpips_mult:
            losses["lpips_loss"] = config.lpips_mult * perceptual.distance(*features).mean()
    if discriminator is None:
        return losses
    if config.discriminator == "projected":
        seen = ([levels[level] for level in config.adversarial_levels] for levels in features)
        return {**losses, **_adversarial_losses(config, discriminator, *seen)}
    fake, real = (augment(images, config.augment) for images in (fake, real))
    losses.update(_adversarial_losses(config, discriminator, fake, real))
    if config.r1_gamma and step % config.r1_every == 0:
        losses["r1_loss"] = config.r1_every * r1_penalty(discriminator, real, config.r1_gamma)
    return losses


def _adversarial_losses(
    config: StageOneLossConfig, discriminator: nn.Module, rendered: Seen, real: Seen
) -> dict[str, Float[Tensor, ""]]:
    return {
        "adversarial_loss": config.adversarial_mult * generator_loss(discriminator, rendered),
        "discriminator_loss": discriminator_loss(discriminator, rendered, real),
    }


def depth_loss(maps: FeatureMaps, target: Views, norm: Literal["l1", "l2"] = "l2") -> Float[Tensor, ""]:
    """Mean squared (m^2) or absolute (m) error of expected depth at the rays' resolution, over known pixels.

    Each scene counts alike, with the mean over its known pixels (0 where none is known), so that the loss of a batch is
    the mean of the losses of its parts.
    """
    assert target.depths is not None
    error, known = depth_errors(maps, target.depths)
    if norm == "l2":
        error = error.square()
    scenes = (error * known).flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)
    return scenes.mean()


def opacity_loss(maps: FeatureMaps, target: Views) -> Float[Tensor, ""]:
    """Accumulation of the rays on which no surface was measured, as a mean over all rays; masked ones count nothing.

    A prior, no measurement: images look the same whether a sky is painted on the box's border or lies behind it, and
    of the two this prefers an empty box. The lack of a reading says the more the more of the view was measured, so a
    view's rays weigh as much as that share: next to nothing with depth at a few points, and nothing without depth.
    """
    if target.depths is None:
        return maps.accumulation.new_zeros(())
    size = maps.accumulation.shape[-2:]
    unmeasured = downsample_depth(target.depths, *size) == 0
    if target.masks is not None:
        unmeasured = unmeasured & valid_cells(target.masks, *size)
    return (measured_share(target) * unmeasured * maps.accumulation).mean()


def hidden_background_loss(maps: FeatureMaps) -> Float[Tensor, ""]:
    """Mean absolute difference of the background's features from what hides them, by the share that is hidden.

    Where surfaces fill the view, say below the horizon, images never teach the background anything, and it would show
    through the smallest hole of a sampled scene in a colour of chance. Only the background learns from this.
    """
    assert maps.background is not None
    difference = (maps.background - maps.features.detach()).abs()
    return (maps.accumulation.detach() * difference).mean()
