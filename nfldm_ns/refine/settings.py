"""The options of refining a scene. Nothing heavy is imported here: nerfstudio reads them at every start."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from nfldm_ns.errors import UserInputError
from nfldm_ns.refine.distillation import DistillationConfig, Guidance
from nfldm_ns.refine.views import ViewSamplingConfig

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass
class RegulariserConfig:
    """What keeps a scene whole. All compare with the scene as it began; a weight of 0 leaves one out."""

    floaters_mult: float = 1.0
    """Opacity that appears in voxels that were empty."""
    depth_mult: float = 0.1
    """Mean absolute change of depth in metres, in the views of the step."""
    image_mult: float = 0.0
    """Mean absolute change of colours in the views of the step."""
    close_density_mult: float = 0.0
    """Mean squared change of the voxels' opacities."""
    close_features_mult: float = 0.0
    """Mean squared change of features, relative to their standard deviation."""


@dataclass
class ShadingConfig:
    """Renders lit by a lamp near the camera, as in DreamFusion (Poole et al. 2023)."""

    shaded_share: float = 0.0
    """Share of the views that the prior sees lit from a random place."""
    textureless_share: float = 0.0
    """Share of the views that it sees lit and without colours, so that only geometry answers."""
    ambient: float = 0.1
    """Light that comes from everywhere, in [0, 1]; the rest is the lamp's."""
    lamp_distance: float = 1.0
    """Standard deviation of the lamp's place around the camera, in metres along each axis."""

    def check(self) -> None:
        """Raises `UserInputError` for values that make no sense."""
        shares = (self.shaded_share, self.textureless_share)
        if min(shares) < 0 or sum(shares) > 1:
            raise UserInputError(
                f"Of all views {shares[0]:g} shaded and {shares[1]:g} textureless cannot be: give shares from 0 to 1 "
                "that are together at most 1."
            )
        if not 0 <= self.ambient <= 1 or not 0 < self.lamp_distance < float("inf"):
            raise UserInputError("--ambient lies from 0 to 1 and --lamp-distance above 0: change these options.")


@dataclass
class RefinementConfig:
    """What a scene is refined to, and how."""

    prior: str | None = None
    """The name of one that comes with this package, the folder of a prior of nfldm-train-prior or of a diffusers
    pipeline, or a hub id. By default the one that comes with the scene's generator, if that came with this package."""
    precision: Precision = "fp32"
    """Of the denoisers of diffusers pipelines."""
    lora: str | None = None
    """LoRA weights for a prior that is a diffusers pipeline (a safetensors file, its folder, or a hub id), such as
    DreamBooth trains; needs peft."""
    lora_scale: float = 1.0
    """How much of them is added to the prior's own weights."""
    style: str | None = None
    """An image, a folder of images, or (for priors that know text) words: what the scene shall look like."""
    view_prompt_share: float = 0.0
    """For words as style: share of the views whose words also say ", front view", side, back or overhead, by where the
    camera looks; the scene's first camera looks to the front (DreamFusion)."""
    clean_images: Path | None = None
    """Without a style: images the scene shall look like, as a folder or a scene collection. By default those that an
    in-domain prior was trained on."""
    bev: Path | None = None
    """A semantic map of the scene, in the colours of the collection, for priors that know maps. By default the scene's
    own (bev.png), if it has one."""
    observed: Literal["scene", "similar"] = "scene"
    """What priors that are conditioned on observed views are told. scene: views of the scene itself as it began.
    similar: clean views of that training place of the collection --clean-images whose voxels are most like the
    scene's, and embeddings of these."""
    negative_scenes: tuple[Path, ...] = ()
    """Further generated scenes whose images are examples of what to move away from, for negative guidance."""
    second_prior: str | None = None
    """A further prior, of any kind, whose loss is added (Magic123): one is told a view's pose, the other a style."""
    second_weight: float = 1.0
    """Of its loss; that of the first prior weighs 1."""
    second_style: str | None = None
    """As --style, for the second prior."""
    second_clean_images: Path | None = None
    """As --clean-images, for the second prior."""
    second_guidance: Guidance | None = None
    """As --guidance, for the second prior; by default the same."""
    second_guidance_scale: float | None = None
    """As --guidance-scale, for the second prior; by default the same."""
    strength: float = 1.0
    """How far the prior may change the scene, in (0, 1]: as in diffusers' image-to-image, the share of the noise range
    that is used."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """What is asked of the prior."""
    views: ViewSamplingConfig = field(default_factory=ViewSamplingConfig)
    """Where the scene is looked at."""
    shading: ShadingConfig = field(default_factory=ShadingConfig)
    """In which light."""
    regularisers: RegulariserConfig = field(default_factory=RegulariserConfig)
    """What keeps it whole."""

    def check(self) -> None:
        """Raises `UserInputError` for what cannot be, before anything is loaded."""
        if not self.prior:
            raise UserInputError(
                "No prior was given: name vizdoom-prior (for scenes of vizdoom-rooms), the folder of one made by "
                "'nfldm-train-prior', or a diffusers pipeline, with --prior."
            )
        if not 0 < self.strength <= 1:
            raise UserInputError(
                f"The strength must lie above 0 and not above 1, not {self.strength}: change --strength."
            )
        second = (self.second_style, self.second_clean_images, self.second_guidance, self.second_guidance_scale)
        if self.second_prior is None and any(value is not None for value in second):
            raise UserInputError("There is no second prior to be told anything: name it with --second-prior.")
        if not 0 < self.second_weight < float("inf"):
            raise UserInputError(f"--second-weight is {self.second_weight}: give a weight above 0.")
        if not 0 <= self.view_prompt_share <= 1:
            raise UserInputError(
                f"The share of view prompts must lie from 0 to 1, not {self.view_prompt_share}: change "
                "--view-prompt-share."
            )
        told = [told for told, _ in self.of_priors()]
        for config in told:
            config.distillation.check()
        if self.view_prompt_share and not any(config.says_words for config in told):
            raise UserInputError("Prompts by view want words: give a style in words, or leave out --view-prompt-share.")
        self.shading.check()
        self.views.check()

    def of_priors(self) -> list[tuple[RefinementConfig, float]]:
        """What is wanted of each prior, and its weight. Of two, those that are told words are told prompts by view."""
        if self.second_prior is None:
            return [(self, 1.0)]
        scale = self.second_guidance_scale
        distillation = replace(
            self.distillation,
            guidance=self.second_guidance or self.distillation.guidance,
            guidance_scale=self.distillation.guidance_scale if scale is None else scale,
        )
        second = replace(
            self,
            prior=self.second_prior,
            style=self.second_style,
            clean_images=self.second_clean_images,
            distillation=distillation,
            second_prior=None,
            second_style=None,
            second_clean_images=None,
            second_guidance=None,
            second_guidance_scale=None,
        )
        both = [told if told.says_words else replace(told, view_prompt_share=0.0) for told in (self, second)]
        return [(both[0], 1.0), (both[1], self.second_weight)]

    @property
    def says_words(self) -> bool:
        """Whether the style is words."""
        return self.style is not None and not Path(self.style).exists()

    def effective_distillation(self) -> DistillationConfig:
        """With the noise range that the strength leaves."""
        low, high = self.distillation.min_time, self.distillation.max_time
        return replace(self.distillation, max_time=low + self.strength * (high - low))
