"""What a prior of a collection's images diffuses: pixels, or features of a pretrained network."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from nfldm_ns.autoencoder.perceptual import PERCEPTUAL_CHANNELS, PerceptualNetwork
from nfldm_ns.pretrained.weights import load_lpips
from nfldm_ns.refine.prior import resize_square

Space = Literal["pixels", "features"]
REDUCTION = 4  # pixels per place of the feature space, along each side
MEAN_COLOURS = 3  # the first channels of all spaces
COMPONENTS = (3, 16, 48)  # principal components of the levels of VGG16, finest first
FITTED_AT_ONCE = 16
EVERY_NTH_PLACE = 7  # of the activations that components are found from


class PixelSpace(nn.Module):
    """Square images in [0, 1] as pixels in [-1, 1].

    Args:
        image_size: side of the images.
    """

    channels = MEAN_COLOURS

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels size size"]:
        return 2 * resize_square(images.float(), self.image_size) - 1

    def preview(self, samples: Float[Tensor, "batch channels size size"]) -> Float[Tensor, "batch 3 size size"]:
        """What a sample looks like, in [0, 1]."""
        return ((samples + 1) / 2).clamp(0, 1)

    def fit(self, images: UInt8[Tensor, "images 3 image_size image_size"]) -> None:
        """Nothing is to be learned."""


class FeatureSpace(nn.Module):
    """Square images in [0, 1] as normalised features, a quarter of their side wide.

    Mean colours, and the principal components of the first three levels of the network of LPIPS; finer levels become
    channels. What makes an image sharp or blurred shows here in many places at once, and a small model on a small grid
    learns it (as discriminators of such features do: Sauer et al. 2021, Projected GANs). Components, means and standard
    deviations are those of the images it was fitted to.

    Args:
        image_size: side of the images, a multiple of 4.
    """

    mean: Tensor
    std: Tensor
    channels = MEAN_COLOURS + sum(count * 16 // 4**level for level, count in enumerate(COMPONENTS))

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.network = PerceptualNetwork(load_lpips("vgg")).requires_grad_(False).eval()
        for level, count in enumerate(COMPONENTS):
            self.register_buffer(f"centre_{level}", torch.zeros(PERCEPTUAL_CHANNELS[level]))
            self.register_buffer(f"components_{level}", torch.zeros(count, PERCEPTUAL_CHANNELS[level]))
        self.register_buffer("mean", torch.zeros(self.channels))
        self.register_buffer("std", torch.ones(self.channels))

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels size size"]:
        raw = self._raw(resize_square(images.float(), self.image_size).clamp(0, 1))
        return (raw - self.mean[:, None, None]) / self.std[:, None, None]

    def preview(self, samples: Float[Tensor, "batch channels size size"]) -> Float[Tensor, "batch 3 size size"]:
        """The mean colours of a sample, in [0, 1]."""
        return (samples[:, :MEAN_COLOURS] * self.std[:3, None, None] + self.mean[:3, None, None]).clamp(0, 1)

    @torch.no_grad()
    def fit(self, images: UInt8[Tensor, "images 3 image_size image_size"]) -> None:
        """Finds components and statistics."""
        device = self.mean.device
        parts = [part.to(device).float() / 255 for part in images.split(FITTED_AT_ONCE)]
        found = [[level.movedim(1, -1).flatten(0, 2)[::EVERY_NTH_PLACE] for level in self._levels(p)] for p in parts]
        for level, activations in enumerate(zip(*found, strict=True)):
            rows = torch.cat(activations).double()
            centre = rows.mean(0)
            getattr(self, f"centre_{level}").copy_(centre)
            getattr(self, f"components_{level}").copy_(principal_components(rows - centre, COMPONENTS[level])[1])
        raw = torch.cat([self._raw(part) for part in parts])
        self.mean.copy_(raw.mean((0, 2, 3)))
        self.std.copy_(raw.std((0, 2, 3)).clamp(min=1e-6))

    def statistics(self) -> dict[str, Tensor]:
        """What was fitted: everything but the network."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("network.")}

    def _levels(self, images: Float[Tensor, "batch 3 size size"]) -> list[Tensor]:
        return self.network.features(2 * images - 1, len(COMPONENTS))

    def _raw(self, images: Float[Tensor, "batch 3 image_size image_size"]) -> Float[Tensor, "batch channels size size"]:
        parts = [F.avg_pool2d(images, REDUCTION)]
        for level, activations in enumerate(self._levels(images)):
            centred = activations - getattr(self, f"centre_{level}")[:, None, None]
            projected = torch.einsum("bchw,kc->bkhw", centred, getattr(self, f"components_{level}"))
            parts.append(F.pixel_unshuffle(projected, REDUCTION // 2**level))
        return torch.cat(parts, dim=1)


def principal_components(
    centred: Float[Tensor, "rows dim"], count: int
) -> tuple[Float[Tensor, " count"], Float[Tensor, "count dim"]]:
    """The largest sums of squares along orthogonal directions, and these directions, the largest first.

    The largest element of each direction is positive: signs are a solver's, and must not differ between runs.
    """
    squares, vectors = torch.linalg.eigh(centred.T @ centred)
    directions = vectors.T.flip(0)[:count]
    signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    return squares.flip(0)[:count], directions * signs


def make_space(name: Space, image_size: int) -> PixelSpace | FeatureSpace:
    """A space by its name.

    Raises:
        UserInputError: if the network of the features is not on this machine.
    """
    return PixelSpace(image_size) if name == "pixels" else FeatureSpace(image_size)


def space_shape(name: Space, image_size: int) -> tuple[int, int]:
    """Channels and side of samples."""
    if name == "pixels":
        return PixelSpace.channels, image_size
    return FeatureSpace.channels, image_size // REDUCTION
