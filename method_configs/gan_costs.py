"""What a training step of each baseline costs, by preset."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from nfldm_ns.autoencoder.background import BACKGROUND_MOMENTS
from nfldm_ns.autoencoder.perceptual import Features, PerceptualNetwork
from nfldm_ns.autoencoder.renderers import ProjectionRenderer, SceneRenderer
from nfldm_ns.baselines.assembly import make_critic, make_networks, shown_size
from nfldm_ns.baselines.cameras import CameraBank, PoseDecoder
from nfldm_ns.baselines.critics import ProjectedCritic
from nfldm_ns.baselines.options import METHODS, BaselineOptions, MethodName
from nfldm_ns.diffusion.denoisers import GlobalDenoiser
from nfldm_ns.method_configs.gan_presets import GAN_PRESETS, GanPreset
from nfldm_ns.method_configs.preset_costs import PresetCost
from nfldm_ns.metrics.network_cost import NetworkCost, network_cost
from nfldm_ns.pretrained.weights import untrained_lpips

UNIT_BOX = ((-1.0, -1.0, -1.0), (1.0, 1.0, 1.0))  # no cost depends on the box


def gan_costs() -> Iterator[PresetCost]:
    """All baselines at all their presets; the diffusion model of an auto-decoder's latents has a row of its own."""
    for method, options in METHODS.items():
        for name, preset in GAN_PRESETS.items():
            (side, _), sizes = _shown(preset, options), preset.sizes.scene
            channels = 3 if options.rendering == "colours" else sizes["feature_channels"]
            voxels = "x".join(map(str, (1 + channels, *sizes["grid_shape"])))
            shown = f"{preset.training.views_per_scene} views of {side} px, V {voxels}"
            batch_size = preset.training.schedule.batch_size
            yield PresetCost(f"baseline {method}", name, shown, batch_size, baseline_cost(preset, method))
    for method, options in METHODS.items():
        if options.objective == "autodecoder":
            for name, preset in GAN_PRESETS.items():
                batch_size = preset.training.prior_schedule.batch_size
                words = f"latents of {_code_dim(preset, options)}"
                yield PresetCost(f"baseline {method} prior", name, words, batch_size, latent_prior_cost(preset, method))


def baseline_cost(preset: GanPreset, method: MethodName) -> NetworkCost:
    """Generator of V, networks of the renderer and of the cameras, the perceptual network and the discriminator.

    An auto-decoder's latents, whose number is that of the scenes, are left out.
    """
    options = METHODS[method]
    size = preset.image_size
    with torch.device("meta"):
        generator, renderer = make_networks(options, preset.sizes, UNIT_BOX, image_size=(size, size))
        latents = torch.empty(preset.training.schedule.batch_size, generator.latent_dim)

    def voxels() -> Tensor:
        grid = generator(latents)
        return torch.cat([part.flatten(1) for part in (grid.density, grid.features, grid.background)], dim=1)

    cost = network_cost(generator, voxels) + _renderer_cost(preset, options, renderer) + _pose_cost(preset, options)
    return cost + judging_cost(preset, options)


def latent_prior_cost(preset: GanPreset, method: MethodName) -> NetworkCost:
    """The diffusion model of GAUDI's latents."""
    dim, batch_size = _code_dim(preset, METHODS[method]), preset.training.prior_schedule.batch_size
    with torch.device("meta"):
        prior = GlobalDenoiser(global_dim=dim, num_cameras=0, **preset.sizes.prior)
        inputs = torch.empty(batch_size, *prior.sample_shape), torch.empty(batch_size, dtype=torch.long)
    return network_cost(prior, partial(nn.Module.__call__, prior, *inputs))


def _code_dim(preset: GanPreset, options: BaselineOptions) -> int:
    with torch.device("meta"):
        poses = PoseDecoder(**preset.sizes.pose)
    return preset.sizes.generators[options.generator]["latent_dim"] + poses.latent_dim


def _shown(preset: GanPreset, options: BaselineOptions) -> tuple[int, int]:
    return shown_size(options, preset.image_size, preset.image_size)


def _images(preset: GanPreset) -> int:
    return preset.training.schedule.batch_size * preset.training.views_per_scene


def _renderer_cost(preset: GanPreset, options: BaselineOptions, renderer: SceneRenderer) -> NetworkCost:
    """The background's network, the image decoder, and the projection along rays where there is one."""
    batch, views = preset.training.schedule.batch_size, preset.training.views_per_scene
    config = renderer.config
    rows, columns = (side // config.feature_stride for side in _shown(preset, options))
    with torch.device("meta"):
        directions = torch.empty(batch, views, 3, rows, columns)
        code = torch.empty(batch, config.background_channels, BACKGROUND_MOMENTS, requires_grad=True)
        features = torch.empty(batch * views, config.feature_channels, rows, columns, requires_grad=True)
        opacity = torch.empty(batch * views, 1, rows, columns)
        rays = torch.empty(features[:, 0].numel(), config.num_samples * (1 + config.feature_channels))
    cost = network_cost(renderer.background, lambda: renderer.background(directions, code))
    if options.rendering != "colours":
        cost += network_cost(renderer.decoder, lambda: renderer.decoder(features, opacity))
    if isinstance(renderer, ProjectionRenderer):
        cost += network_cost(renderer.projection, lambda: renderer.projection(rays.requires_grad_()))
    return cost


def _pose_cost(preset: GanPreset, options: BaselineOptions) -> NetworkCost:
    """What learns where cameras are."""
    batch = preset.training.schedule.batch_size
    with torch.device("meta"):
        if options.objective == "autodecoder":
            poses = PoseDecoder(**preset.sizes.pose)
            latents = torch.empty(batch, poses.latent_dim)
            return network_cost(poses, lambda: poses.trajectory(latents))
        if options.learned_cameras:
            residual = CameraBank(learned=True).residual
            cameras = torch.empty(_images(preset), 6)
            return network_cost(residual, lambda: residual(cameras))
    return NetworkCost()


def judging_cost(preset: GanPreset, options: BaselineOptions) -> NetworkCost:
    """The perceptual network, and the discriminator where there is one, on rendered and on real images."""
    size, perceptual = _shown(preset, options), _perceptual(preset)
    with torch.device("meta"):
        rendered = torch.empty(_images(preset), 3, *size, requires_grad=True)
        real = torch.empty(_images(preset), 3, *size)
    critic = make_critic(options, preset.sizes, perceptual, size) if options.objective == "adversarial" else None
    assert critic is None or isinstance(critic, ProjectedCritic), "no method has another one"
    count = None if critic is None else max(critic.levels) + 1

    def look(images: Tensor) -> Tensor:
        return torch.cat([level.flatten() for level in perceptual.features(images, count)])

    cost = network_cost(perceptual, lambda: look(rendered)) + network_cost(perceptual, lambda: look(real), False)
    if options.dual:
        cost = cost + cost  # the colours before the image decoder as well
    return cost if critic is None else cost + _critic_cost(critic, perceptual, real, 2 if options.dual else 1)


def _critic_cost(critic: ProjectedCritic, perceptual: PerceptualNetwork, images: Tensor, pictures: int) -> NetworkCost:
    """The heads: rendered images for the generator's gradient, rendered and real ones for their own.

    Args:
        pictures: that each image is seen in: 2 with dual discrimination, else 1.
    """
    features = perceptual.features(images, max(critic.levels) + 1)
    levels = [features[level].repeat(1, pictures, 1, 1) for level in critic.levels]
    heads = critic.discriminator.to("meta")

    def judge(requires_grad: bool) -> Tensor:
        seen = [level.detach().clone().requires_grad_(requires_grad) for level in levels]
        return torch.cat([logits.flatten() for logits in heads(seen)])

    own = network_cost(heads, lambda: torch.stack([judge(False), judge(False)]))
    return own + network_cost(heads.requires_grad_(False), lambda: judge(True))


class _PerceptualLayers(PerceptualNetwork):
    """LPIPS's network without weights, on the `meta` device, which autocast does not know."""

    def features(self, images: Tensor, num_levels: int | None = None) -> Features:
        levels = [images]
        for level in range(num_levels or len(self.channels)):
            levels.append(getattr(self.metric.net, f"slice{level + 1}")(levels[-1]))
        return levels[1:]


def _perceptual(preset: GanPreset) -> PerceptualNetwork:
    metric = untrained_lpips(preset.training.perceptual)
    for layer in metric.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    return _PerceptualLayers(metric)
