"""What a baseline is: choices that go together, most of which can be combined."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from nfldm_ns.errors import UserInputError

GeneratorName = Literal["voxels", "triplane"]
RenderingName = Literal["features", "colours", "projection"]
CriticName = Literal["projected", "stylegan2"]
ObjectiveName = Literal["adversarial", "autodecoder"]
MethodName = Literal["gsn", "graf", "platonic-gan", "hologan", "campari", "eg3d", "gaudi"]


@dataclass(frozen=True)
class BaselineOptions:
    """The parts of a baseline."""

    generator: GeneratorName = "voxels"
    """What makes V of a latent: a floor plan of columns (GSN, GIRAFFE), or three planes (EG3D)."""
    rendering: RenderingName = "features"
    """What makes images of V: features and an image decoder, colours alone (PlatonicGAN, GRAF), or features whose depth
    a network collapses (HoloGAN)."""
    objective: ObjectiveName = "adversarial"
    """A GAN, or an auto-decoder with a diffusion model of its latents (GAUDI)."""
    critic: CriticName = "projected"
    """What tells rendered from real images: heads on features of LPIPS's network, or StyleGAN2's discriminator."""
    patches: bool = False
    """The discriminator sees parts of images at random scales, of half their sides' rays (GRAF)."""
    dual: bool = False
    """It also sees the rendered colours before the image decoder, enlarged beside the image (EG3D)."""
    camera_prior: Literal["collection", "level"] = "collection"
    """Where cameras are taken from: the training scenes, or a guess that knows none of them."""
    learned_cameras: bool = False
    """Cameras move: a network learns residuals of the prior's (CAMPARI)."""

    def check(self) -> None:
        """Raises `UserInputError` for choices that do not go together."""
        if self.dual and self.rendering == "colours":
            raise UserInputError(
                "Dual discrimination compares an image with the colours before its decoder, but --rendering colours "
                "has none: leave out --dual, or choose --rendering features."
            )
        usual = BaselineOptions()
        names = [field.name for field in fields(self) if field.name not in ("generator", "rendering", "objective")]
        given = [name for name in names if getattr(self, name) != getattr(usual, name)]
        if self.objective == "autodecoder" and given:
            raise UserInputError(
                f"An auto-decoder learns from whole images at their own cameras, so --{given[0].replace('_', '-')} "
                "says nothing there: leave it out, or choose another --method."
            )


METHODS: dict[MethodName, BaselineOptions] = {
    "gsn": BaselineOptions(),
    "graf": BaselineOptions(rendering="colours", patches=True),
    "platonic-gan": BaselineOptions(rendering="colours"),
    "hologan": BaselineOptions(rendering="projection"),
    "campari": BaselineOptions(camera_prior="level", learned_cameras=True),
    "eg3d": BaselineOptions(generator="triplane", dual=True),
    "gaudi": BaselineOptions(objective="autodecoder"),
}
"""What the baselines of the paper's tables choose, at our sizes; they are like these methods, not copies of them."""
