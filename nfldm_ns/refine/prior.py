"""What score distillation asks of a 2D diffusion model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from nerfstudio.cameras.cameras import Cameras

    from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
    from nfldm_ns.refine.seen_maps import MapDescription
    from nfldm_ns.scenes.views import Views

Condition = Mapping[str, Tensor]
"""What a model is told of an image besides its noisy version: tensors by name, one row per image."""
ImageEmbedding = Callable[[Tensor], Tensor]
"""Images in [0, 1] to one row each."""


class ImagePrior(nn.Module, ABC):
    """A frozen diffusion model of images.

    Subclasses say how images become what is diffused (pixels or latents), how images or words become conditions, and
    what the network predicts. All of them look at square images.

    Args:
        image_size: side in pixels of the images it was trained on.
        alphas_cumprod: alpha_bar of each of its T timesteps, falling.
        prediction_type: "epsilon", "v_prediction" or "sample", as in diffusers.

    Raises:
        ValueError: for another prediction type.

    Attributes:
        maps: the semantic maps it knows; None for most. To one with maps, conditions may also say what the views see
            (`SceneMap.seen_by`), as `seen`.
        observes: whether conditions also say what was observed of the place from other poses (`observing`).
        observes_alone: whether that is all that it is conditioned on.
        stage1: what such a prior lifts observed views with, if anything.
    """

    alphas_cumprod: Tensor
    maps: MapDescription | None = None
    observes: bool = False
    observes_alone: bool = False

    def __init__(
        self, image_size: int, alphas_cumprod: Float[Tensor, " timesteps"], prediction_type: str = "epsilon"
    ) -> None:
        super().__init__()
        if prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"a prior predicts epsilon, v_prediction or sample, not {prediction_type!r}")
        self.image_size, self.prediction_type = image_size, prediction_type
        self.stage1: SceneAutoencoder | None = None
        self.register_buffer("alphas_cumprod", alphas_cumprod.float(), persistent=False)

    @property
    def num_timesteps(self) -> int:
        """T; timesteps are 0 (almost clean) to T - 1."""
        return len(self.alphas_cumprod)

    @property
    def device(self) -> torch.device:
        return self.alphas_cumprod.device

    @abstractmethod
    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels h w"]:
        """Square images in [0, 1], of any size, as the model diffuses them; differentiable."""

    def decode(self, encoded: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch 3 size size"] | None:
        """The images in [0, 1] that samples are of, not clamped; None where samples do not tell them."""
        return None

    @abstractmethod
    def condition(
        self, images: Float[Tensor, "batch 3 height width"] | None = None, text: str | None = None
    ) -> Condition:
        """The condition that stands for images in [0, 1] (one row each), for words (one row), or for both.

        Raises:
            UserInputError: if the model cannot be conditioned on that.
        """

    def render_condition(self, images: Float[Tensor, "batch 3 height width"]) -> Condition:
        """The condition that stands for renders in [0, 1], of which this is known; by default that of any images."""
        return self.condition(images)

    @abstractmethod
    def unconditional(self) -> Condition:
        """The condition, of one row, that says nothing."""

    def observing(self, views: Views) -> Callable[[Cameras], Condition]:
        """What a prior that `observes` is told besides, of square cameras `[1, N]`; zeros of it say nothing.

        Args:
            views: observed ones of the place, `[1, M]`.
        """
        raise NotImplementedError(f"a {type(self).__name__} observes nothing")

    @abstractmethod
    def denoise(
        self, noisy: Float[Tensor, "batch channels h w"], timestep: Int[Tensor, " batch"], condition: Condition
    ) -> Float[Tensor, "batch channels h w"]:
        """What the network predicts, by `prediction_type`."""

    def contrast(
        self,
        noisy: Float[Tensor, "batch channels h w"],
        timestep: Int[Tensor, " batch"],
        condition: Condition,
        opposite: Condition,
    ) -> Float[Tensor, "batch channels h w"] | None:
        """eps_hat(x | y) - eps_hat(x | y'), if the model knows it better than by denoising twice; else None."""
        return None

    def signal_and_noise(
        self, timestep: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch 1 1 1"], Float[Tensor, "batch 1 1 1"]]:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar): `x_t = signal x + noise eps`."""
        alpha = self.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        return alpha.sqrt(), (1 - alpha).sqrt()

    def predict_noise(
        self, noisy: Float[Tensor, "batch channels h w"], timestep: Int[Tensor, " batch"], condition: Condition
    ) -> Float[Tensor, "batch channels h w"]:
        """eps_hat, the noise that the model believes to be in `noisy`; float32."""
        predicted = self.denoise(noisy, timestep, condition).float()
        if self.prediction_type == "epsilon":
            return predicted
        signal, noise = self.signal_and_noise(timestep)
        if self.prediction_type == "v_prediction":
            return signal * predicted + noise * noisy
        return (noisy - signal * predicted) / noise

    def predict_both(
        self,
        noisy: Float[Tensor, "batch channels h w"],
        timestep: Int[Tensor, " batch"],
        condition: Condition,
        opposite: Condition,
    ) -> tuple[Float[Tensor, "batch channels h w"], Float[Tensor, "batch channels h w"]]:
        """eps_hat(x | y) and eps_hat(x | y'), in one pass of the network."""
        both = join([condition, opposite])
        towards, away = self.predict_noise(torch.cat([noisy, noisy]), torch.cat([timestep] * 2), both).chunk(2)
        return towards, away


def pick(condition: Condition, rows: Sequence[int] | Int[Tensor, " batch"]) -> Condition:
    """Some rows of a condition."""
    return {name: values[torch.as_tensor(rows, device=values.device)] for name, values in condition.items()}


def join(conditions: Sequence[Condition]) -> Condition:
    """Conditions of one model below each other."""
    return {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}


def repeat(condition: Condition, count: int) -> Condition:
    """A condition of one row for `count` images."""
    return {name: values.expand(count, *values.shape[1:]) for name, values in condition.items()}


def rows_of(condition: Condition) -> int:
    """How many images a condition is of; 1 of one that says nothing."""
    return len(next(iter(condition.values()))) if condition else 1


def resize_square(images: Float[Tensor, "batch 3 height width"], size: int) -> Float[Tensor, "batch 3 size size"]:
    """Images of another size; differentiable."""
    if images.shape[-2:] == (size, size):
        return images
    smaller = size < images.shape[-1]
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=smaller)
