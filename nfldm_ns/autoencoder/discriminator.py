"""The adversarial loss on rendered images (the paper's stage 1), for discriminators of features and of pixels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from nfldm_ns.autoencoder.perceptual import Features

EPS = 1e-4
Seen = Features | Float[Tensor, "batch 3 height width"]
"""What a discriminator looks at: features by level, or images in [-1, 1]. It returns logits of one or more tensors."""


class ProjectedDiscriminator(nn.Module):
    """Tells real from rendered patches by the features of a frozen, pretrained network.

    A projected discriminator (Sauer et al., NeurIPS 2021, "Projected GANs Converge Faster"): only small heads are
    trained, one per level of features, so that it is of use after some ten steps, where one that starts from pixels
    needs thousands.

    Args:
        channels: of each level of features it looks at.
        width: of the heads.
    """

    def __init__(self, channels: Sequence[int], width: int = 64) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_head(count, width) for count in channels)

    def forward(self, features: Features) -> list[Float[Tensor, "batch 1 h w"]]:
        """Logits of patches, one map per level; positive means real."""
        # A norm, because the gradient of the root of a mean is not finite where all features are 0.
        scaled = [level / (level.norm(dim=1, keepdim=True) / level.shape[1] ** 0.5 + EPS) for level in features]
        return [head(level) for head, level in zip(self.heads, scaled, strict=True)]


def _head(in_channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, width, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 1, 1),
    )


def generator_loss(discriminator: nn.Module, rendered: Seen) -> Float[Tensor, ""]:
    """The non-saturating loss (Goodfellow et al. 2014): mean over levels and logits of `softplus(-D(rendered))`.

    Its gradients reach the renderer alone: the discriminator's parameters count as constants.
    """
    constants = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    return _mean(F.softplus(-logits) for logits in _each(functional_call(discriminator, constants, (rendered,))))


def discriminator_loss(discriminator: nn.Module, rendered: Seen, real: Seen) -> Float[Tensor, ""]:
    """Mean over levels and logits of `softplus(-D(real)) + softplus(D(rendered))`.

    Its gradients reach the discriminator alone.
    """
    judged = _each(discriminator(_detached(rendered))), _each(discriminator(_detached(real)))
    return _mean(F.softplus(logits) for logits in judged[0]) + _mean(F.softplus(-logits) for logits in judged[1])


def r1_penalty(
    discriminator: nn.Module, real: Float[Tensor, "batch 3 height width"], gamma: float
) -> Float[Tensor, ""]:
    """R1 (Mescheder et al., ICML 2018): `gamma / 2 * |grad_x D(x)|^2`, summed over pixels, mean over real images.

    Its gradients reach the discriminator alone.
    """
    with torch.enable_grad():  # validation computes losses without
        images = real.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return gamma / 2 * gradient.square().sum(dim=(1, 2, 3)).mean()


def _each(logits: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [logits] if isinstance(logits, Tensor) else logits


def _detached(seen: Seen) -> Seen:
    return seen.detach() if isinstance(seen, Tensor) else [level.detach() for level in seen]


def _mean(levels: Iterable[Tensor]) -> Float[Tensor, ""]:
    return torch.stack([level.mean() for level in levels]).mean()
