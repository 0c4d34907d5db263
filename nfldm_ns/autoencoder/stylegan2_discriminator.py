"""The paper's discriminator of rendered images: StyleGAN2's (Karras et al., CVPR 2020), which looks at pixels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

LAST_SIZE = 4  # pixels of the shorter side at which pooling ends
GROUP_SIZE = 4  # of the minibatch standard deviation
EPS = 1e-8


class StyleGAN2Discriminator(nn.Module):
    """Residual blocks that halve the image until its shorter side has at most four pixels, then one logit per image.

    Blocks are those of StyleGAN2: leaky ReLU, equalised learning rate, blurred downsampling, and the standard deviation
    over the minibatch as a further feature at the end.

    Args:
        image_size: (height, width), both at least 4; neither powers of two nor squares are needed.
        channel_base: channels at a shorter side of `s` pixels are `channel_base // s`, ...
        channel_max: ... at most so many.
        in_channels: of images; more than three where several are looked at together.

    Raises:
        ValueError: for smaller images, or sizes that leave a block without channels.
    """

    def __init__(
        self, image_size: tuple[int, int], channel_base: int = 16384, channel_max: int = 512, in_channels: int = 3
    ) -> None:
        super().__init__()
        height, width = image_size
        if min(height, width) < LAST_SIZE:
            raise ValueError(f"images must have at least {LAST_SIZE} x {LAST_SIZE} pixels, not {height} x {width}")
        if min(channel_base // min(height, width), channel_max) < 1:
            raise ValueError(f"a channel_base of {channel_base} leaves no channels for {height} x {width} pixels")
        self.image_size = (height, width)
        channels = min(channel_base // min(height, width), channel_max)
        self.from_rgb = EqualizedConv2d(in_channels, channels, 1)
        self.blocks = nn.ModuleList()
        while min(height, width) > LAST_SIZE:
            height, width, previous = height // 2, width // 2, channels
            channels = min(channel_base // min(height, width), channel_max)
            self.blocks.append(_Block(previous, channels))
        self.last = EqualizedConv2d(channels + 1, channels, 3, padding=1)
        self.hidden = EqualizedLinear(channels * height * width, channels)
        self.out = EqualizedLinear(channels, 1)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 1"]:
        """Logits of images in [-1, 1] of the size it was made for; positive means real."""
        x = _activate(self.from_rgb(images))
        for block in self.blocks:
            x = block(x)
        x = _activate(self.last(append_minibatch_std(x)))
        return self.out(_activate(self.hidden(x.flatten(1))))


class EqualizedConv2d(nn.Module):
    """A convolution with equalised learning rate (Karras et al. 2018): normal weights, scaled when used.

    The scale `1 / sqrt(fan in)` keeps the variance of the input, and makes Adam move all layers at one relative speed.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.scale = 1 / math.sqrt(in_channels * kernel_size**2)
        self.stride, self.padding = stride, padding

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch d i j"]:
        return F.conv2d(x, self.weight * self.scale, self.bias, self.stride, self.padding)


class EqualizedLinear(nn.Module):
    """The same for a linear layer."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.scale = 1 / math.sqrt(in_features)

    def forward(self, x: Float[Tensor, "batch c"]) -> Float[Tensor, "batch d"]:
        return F.linear(x, self.weight * self.scale, self.bias)


class _Block(nn.Module):
    """Two convolutions beside a linear path; both ways end at half the size, rounded down."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = EqualizedConv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = EqualizedConv2d(in_channels, out_channels, 3, stride=2)
        self.skip = EqualizedConv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch d i j"]:
        main = _activate(self.conv1(x))
        main = _activate(self.conv2(blur(main, padding=2)))
        return (main + self.skip(blur(x, padding=1, stride=2))) / math.sqrt(2)  # keeps the variance


def _activate(x: Tensor) -> Tensor:
    """Leaky ReLU, about as large as its input."""
    return math.sqrt(2) * F.leaky_relu(x, 0.2)


def blur(x: Float[Tensor, "batch c h w"], padding: int, stride: int = 1) -> Float[Tensor, "batch c i j"]:
    """Low-pass filter [1, 3, 3, 1] along both axes, against aliasing (Zhang 2019); zeros surround the image."""
    taps = x.new_tensor([1.0, 3.0, 3.0, 1.0]) / 8
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, kernel, stride=stride, padding=padding, groups=x.shape[1])


def append_minibatch_std(x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c+1 h w"]:
    """Appends the standard deviation over groups of images, averaged over channels and pixels, as one more channel.

    It tells the discriminator how varied a batch is (Karras et al. 2018). Groups have the largest size up to four that
    divides the batch and take every n-th image, so that views of one scene, which follow one another, are spread over
    groups. Images equal to the others of their group, and a group of one, get 0 (up to 1e-4, for the gradient's sake).
    """
    batch, channels, height, width = x.shape
    size = next(size for size in range(min(GROUP_SIZE, batch), 0, -1) if batch % size == 0)
    groups = x.reshape(size, batch // size, channels, height, width)
    spread = (groups.var(dim=0, unbiased=False) + EPS).sqrt().mean(dim=(1, 2, 3))
    return torch.cat([x, spread.repeat(size)[:, None, None, None].expand(-1, 1, height, width)], dim=1)
