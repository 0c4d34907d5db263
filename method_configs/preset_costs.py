"""What a training step of each preset costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import vgg16

from nfldm_ns.autoencoder.background import BACKGROUND_MOMENTS
from nfldm_ns.autoencoder.losses import StageOneLossConfig, make_discriminator
from nfldm_ns.autoencoder.perceptual import PERCEPTUAL_CHANNELS
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.diffusion.denoisers import CoarseDenoiser, FineDenoiser, GlobalDenoiser
from nfldm_ns.diffusion.training import Denoiser, Stage
from nfldm_ns.diffusion.trajectory import CAMERA_DIM
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder
from nfldm_ns.method_configs.latent_presets import DIFFUSION_PRESETS, LATENT_PRESETS
from nfldm_ns.method_configs.presets import SCENE_AUTOENCODER, SceneAutoencoderPreset
from nfldm_ns.metrics.network_cost import NetworkCost, network_cost


@dataclass(frozen=True)
class PresetCost:
    """One network of a preset, its sizes in words, and the cost of a step with `batch_size` scenes."""

    stage: str
    preset: str
    sizes: str
    batch_size: int
    cost: NetworkCost


def preset_costs() -> Iterator[PresetCost]:
    """All networks of all presets, stage by stage."""
    for name, preset in SCENE_AUTOENCODER.items():
        voxels = (1 + preset.network["feature_channels"], *preset.network["grid_shape"])
        sizes = f"{preset.num_source_views} views of {preset.image_size} px, V {_times(voxels)}"
        yield PresetCost("1", name, sizes, preset.sampling["scenes_per_batch"], scene_autoencoder_cost(preset))
    for name in LATENT_PRESETS:
        model, batch_size = _latent_autoencoder(name), LATENT_PRESETS[name].training.schedule.batch_size
        sizes = f"c {_times(model.coarse_shape)}, f {_times(model.fine_shape)}, g {model.config.global_dim}"
        yield PresetCost("2", name, sizes, batch_size, latent_autoencoder_cost(model, batch_size))
    for name in DIFFUSION_PRESETS:
        yield from _denoiser_costs(name)


def scene_autoencoder_cost(preset: SceneAutoencoderPreset) -> NetworkCost:
    """Image encoder, image decoder, the perceptual network and the discriminator, once all of them take part."""
    scenes, targets, size = preset.sampling["scenes_per_batch"], preset.sampling["num_target_views"], preset.image_size
    with torch.device("meta"):
        model = SceneAutoencoder(**preset.network, image_size=(size, size))
        stride, channels = model.config.feature_stride, model.config.feature_channels
        sources = torch.empty(scenes * preset.num_source_views, 5, size, size)
        features = torch.empty(scenes * targets, channels, size // stride, size // stride, requires_grad=True)
        opacity = torch.empty(scenes * targets, 1, size // stride, size // stride)
        rendered = torch.empty(_watched_views(preset), 3, size, size, requires_grad=True)
        perceptual = vgg16(weights=None).features.requires_grad_(False)
        for layer in perceptual:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
    return (
        network_cost(model.encoder, lambda: torch.cat(model.encoder(sources), dim=1))
        + network_cost(model.decoder, lambda: model.decoder(features, opacity))
        + network_cost(perceptual, lambda: perceptual(rendered))
        + network_cost(perceptual, lambda: perceptual(rendered), backward=False)  # the real images
        + discriminator_cost(preset)
    )


def discriminator_cost(preset: SceneAutoencoderPreset) -> NetworkCost:
    """The discriminator's share: rendered images for the renderer's gradient, rendered and real ones for its own.

    The gradient penalty is left out: it comes every so many steps only.
    """
    loss, batch, size = StageOneLossConfig(**preset.loss), _watched_views(preset), preset.image_size
    with torch.device("meta"):
        discriminator = make_discriminator(loss, (size, size))
    if discriminator is None:
        return NetworkCost()

    def judge(**options: Any) -> Tensor:
        with torch.device("meta"):
            images = torch.empty(batch, 3, size, size, **options)
            shapes = [(batch, PERCEPTUAL_CHANNELS[i], size >> i, size >> i) for i in loss.adversarial_levels]
            features = [torch.empty(shape, **options) for shape in shapes]
        logits = discriminator(images if loss.discriminator == "stylegan2" else features)
        return logits if isinstance(logits, Tensor) else torch.cat([level.flatten() for level in logits])

    own = network_cost(discriminator, lambda: torch.stack([judge(), judge()]))
    return own + network_cost(discriminator.requires_grad_(False), lambda: judge(requires_grad=True))


def _watched_views(preset: SceneAutoencoderPreset) -> int:
    """Views that the perceptual network and the discriminator see in a step."""
    views = StageOneLossConfig(**preset.loss).lpips_views or preset.sampling["num_target_views"]
    return preset.sampling["scenes_per_batch"] * views


def _latent_autoencoder(name: str) -> LatentAutoencoder:
    network = SCENE_AUTOENCODER[name].network
    shared = ("grid_shape", "feature_channels", "background_channels")  # with the same defaults
    sizes = {key: network[key] for key in shared if key in network}
    with torch.device("meta"):
        return LatentAutoencoder(**{**LATENT_PRESETS[name].model, **sizes})


def latent_autoencoder_cost(model: LatentAutoencoder, batch_size: int) -> NetworkCost:
    """The encoders of g, c and f, the background's way through g, and the decoder."""
    z, y, x = model.grid_shape
    with torch.device("meta"):
        voxels = torch.empty(batch_size, (1 + model.feature_channels) * z, y, x)
        g = torch.empty(batch_size, model.config.global_dim, requires_grad=True)
        c = torch.empty(batch_size, model.config.coarse_channels * model.config.coarse_height, *model.coarse_shape[2:])
        f = torch.empty(batch_size, *model.fine_shape)
        background = torch.empty(batch_size, model.background_channels, BACKGROUND_MOMENTS)
    encoders = (model.global_encoder, model.coarse_encoder, model.fine_encoder)
    costs = [network_cost(encoder, partial(encoder, voxels)) for encoder in encoders if encoder is not None]
    path = model.background_path
    costs.append(network_cost(path, lambda: path.decode(path.encode(background))))
    return sum(costs, network_cost(model.decoder, lambda: model.decoder(g, c, f)))


def _denoiser_costs(name: str) -> Iterator[PresetCost]:
    preset, latents = DIFFUSION_PRESETS[name], _latent_autoencoder(name)
    num_cameras = SCENE_AUTOENCODER[name].num_source_views
    code_dim = latents.config.global_dim + CAMERA_DIM * num_cameras
    with torch.device("meta"):
        psi_g = GlobalDenoiser(global_dim=latents.config.global_dim, num_cameras=num_cameras, **preset.models["global"])
        psi_c = CoarseDenoiser(latents.coarse_shape, code_dim, **preset.models["coarse"])
        psi_f = FineDenoiser(latents.fine_shape, latents.coarse_shape, code_dim=code_dim, **preset.models["fine"])
    denoisers: dict[Stage, Denoiser] = {"global": psi_g, "coarse": psi_c, "fine": psi_f}
    for stage, psi in denoisers.items():
        batch_size = preset.training[stage].schedule.batch_size
        with torch.device("meta"):
            inputs = [torch.empty(batch_size, *psi.sample_shape), torch.empty(batch_size, dtype=torch.long)]
            inputs += [torch.empty(batch_size, code_dim)] * (psi is not psi_g)
            inputs += [torch.empty(batch_size, *latents.coarse_shape)] * (psi is psi_f)
        cost = network_cost(psi, partial(nn.Module.__call__, psi, *inputs))
        yield PresetCost(f"3 {stage}", name, _times(psi.sample_shape), batch_size, cost)


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
