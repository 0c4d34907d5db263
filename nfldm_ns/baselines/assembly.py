"""Builds the parts of a baseline: sizes of a preset, choices of a user, the box and the cameras of a collection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.renderers import COLOUR_CHANNELS, RENDERERS, SceneRenderer
from nfldm_ns.baselines.adversarial import AdversarialObjective
from nfldm_ns.baselines.autodecoder import AutodecoderObjective
from nfldm_ns.baselines.cameras import (
    CameraBank,
    CameraModel,
    PoseDecoder,
    collection_intrinsics,
    collection_poses,
    level_poses,
)
from nfldm_ns.baselines.critics import Critic, ProjectedCritic, StyleGAN2Critic
from nfldm_ns.baselines.objective import Objective, SceneParts
from nfldm_ns.baselines.options import BaselineOptions, GeneratorName
from nfldm_ns.baselines.registry import GENERATORS
from nfldm_ns.baselines.scene_generator import SceneGenerator
from nfldm_ns.baselines.voxel_generator import Corner
from nfldm_ns.choice import evenly
from nfldm_ns.diffusion.trajectory import cameras_to_trajectory
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import make_cameras

MOST_POSES = 512  # scenes whose cameras are kept as examples

Box = tuple[Corner, Corner]


@dataclass(frozen=True)
class BaselineSizes:
    """Sizes of a baseline's networks.

    Attributes:
        scene: `grid_shape`, `feature_channels` and `background_channels` of V.
        generators: further arguments of each generator.
        renderer: further arguments of `SceneAutoencoder`, of its renderer alone.
        prior: arguments of the `GlobalDenoiser` over latents.
        pose: arguments of `PoseDecoder`.
        levels: of the perceptual network's features, which the projected critic sees.
        stylegan2: widths of `StyleGAN2Discriminator`.
    """

    scene: dict[str, Any]
    generators: dict[GeneratorName, dict[str, Any]]
    renderer: dict[str, Any]
    prior: dict[str, Any] = field(default_factory=dict)
    pose: dict[str, Any] = field(default_factory=dict)
    levels: tuple[int, ...] = (1, 2)
    stylegan2: dict[str, int] = field(default_factory=lambda: {"channel_base": 8192, "channel_max": 256})


def make_parts(collection: SceneCollection, options: BaselineOptions, sizes: BaselineSizes) -> SceneParts:
    """Untrained parts, of torch's own random numbers.

    Raises:
        UserInputError: if sizes do not go together.
    """
    width, height = collection.image_size
    (x0, y0, z0), (x1, y1, z1) = collection.aabb.tolist()
    domain = {
        "near": collection.near,
        "far": collection.far,
        "image_size": (height, width),
        "focal_length": collection_intrinsics(collection)[0],
    }
    try:
        generator, renderer = make_networks(options, sizes, ((x0, y0, z0), (x1, y1, z1)), **domain)
    except ValueError as error:
        raise UserInputError(f"The baseline cannot be built ({error}): choose another preset.") from None
    stride = 2 * renderer.config.feature_stride if options.patches else renderer.config.feature_stride
    if width % stride or height % stride:
        raise UserInputError(
            f"Images of {collection.root} have {width} x {height} pixels, which {stride} does not divide: choose "
            f"another preset{' or leave out --patches' if options.patches else ''}."
        )
    return SceneParts(generator, _make_cameras(collection, options, sizes), renderer)


def make_networks(
    options: BaselineOptions, sizes: BaselineSizes, aabb: Box, **domain: Any
) -> tuple[SceneGenerator, SceneRenderer]:
    """What makes V of a latent, and what makes images of V, untrained.

    Args:
        aabb: corners of the box in metres.
        domain: of `SceneAutoencoder`: depth range, image size, focal length.

    Raises:
        ValueError: if sizes do not go together.
    """
    scene, rays = {**sizes.scene, "aabb": aabb}, dict(sizes.renderer)
    if options.rendering == "colours":  # a ray per pixel, and no network to make pixels of
        scene["feature_channels"] = COLOUR_CHANNELS
        rays |= {"feature_stride": 1, "decoder_channels": (8,)}
    generator = GENERATORS[options.generator](**scene, **sizes.generators[options.generator])
    return generator, RENDERERS[options.rendering](**scene, **rays, **domain)


def shown_size(options: BaselineOptions, height: int, width: int) -> tuple[int, int]:
    """(height, width) of what is rendered in training: images, or GRAF's patches of half their sides."""
    return (height // 2, width // 2) if options.patches else (height, width)


def _make_cameras(collection: SceneCollection, options: BaselineOptions, sizes: BaselineSizes) -> CameraModel:
    width, height = collection.image_size
    low, high = (tuple(corner) for corner in collection.aabb.tolist())
    shared: dict[str, Any] = {
        "intrinsics": collection_intrinsics(collection),
        "image_size": (height, width),
        "aabb": (low, high),
    }
    ids = collection.split("train")
    if options.objective == "autodecoder":
        return PoseDecoder(num_cameras=collection_poses(collection, ids[:1]).shape[1], **shared, **sizes.pose)
    poses = collection_poses(collection, evenly(ids, min(MOST_POSES, len(ids))))
    if options.camera_prior == "level":
        sides = (collection.aabb[1] - collection.aabb[0]).tolist()
        poses = level_poses(MOST_POSES, poses.shape[1], sides, torch.Generator().manual_seed(0))
    bank = CameraBank(len(poses), poses.shape[1], **shared, learned=options.learned_cameras)
    bank.poses.copy_(poses)
    return bank


def make_objective(
    collection: SceneCollection,
    options: BaselineOptions,
    sizes: BaselineSizes,
    perceptual: PerceptualNetwork | None,
    patch_steps: int = 0,
) -> Objective:
    """A baseline that can be trained.

    Args:
        perceptual: the network of LPIPS; None where `needs_perceptual` says that none is looked at.
        patch_steps: of training, in which the smallest patches shrink, see `smallest_scale`.

    Raises:
        UserInputError: if choices or sizes do not go together.
    """
    options.check()
    parts = make_parts(collection, options, sizes)
    if options.objective == "autodecoder":
        assert perceptual is not None
        return AutodecoderObjective(parts, perceptual, _trajectories(collection))
    width, height = collection.image_size
    shown = shown_size(options, height, width)
    critic = make_critic(options, sizes, perceptual, shown)
    return AdversarialObjective(parts, critic, shown if options.patches else None, options.dual, patch_steps)


def needs_perceptual(options: BaselineOptions) -> bool:
    """Whether a baseline looks at features of LPIPS's network."""
    return options.objective == "autodecoder" or options.critic == "projected"


def make_critic(
    options: BaselineOptions, sizes: BaselineSizes, perceptual: PerceptualNetwork | None, shown: tuple[int, int]
) -> Critic:
    """What tells rendered from real images of `shown` (height, width).

    Args:
        perceptual: the network of LPIPS, for the projected critic.

    Raises:
        UserInputError: if sizes do not go together.
    """
    if options.critic == "projected":
        assert perceptual is not None
        return ProjectedCritic(perceptual, sizes.levels, options.dual)
    try:
        return StyleGAN2Critic(shown, options.dual, **sizes.stylegan2)
    except ValueError as error:
        raise UserInputError(f"The stylegan2 critic cannot be made ({error}): choose --critic projected.") from None


def _trajectories(collection: SceneCollection) -> torch.Tensor:
    width, height = collection.image_size
    poses = collection_poses(collection, collection.split("train"))
    return cameras_to_trajectory(make_cameras(poses, *collection_intrinsics(collection), height, width))
