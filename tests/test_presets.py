"""Presets of all stages and of baselines: what they cost, and that they can be built and stepped."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nfldm_ns.autoencoder.losses import StageOneLossConfig, make_discriminator, stage_one_losses
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.baselines.assembly import make_critic, make_objective
from nfldm_ns.baselines.cameras import PoseDecoder
from nfldm_ns.baselines.options import METHODS
from nfldm_ns.commands import presets
from nfldm_ns.method_configs.gan_costs import baseline_cost, gan_costs, judging_cost
from nfldm_ns.method_configs.gan_presets import GAN_PRESETS, GanPreset
from nfldm_ns.method_configs.latent_presets import DIFFUSION_PRESETS, LATENT_PRESETS, STREETS
from nfldm_ns.method_configs.preset_costs import discriminator_cost, preset_costs, scene_autoencoder_cost
from nfldm_ns.method_configs.presets import SCENE_AUTOENCODER
from nfldm_ns.metrics.network_cost import NetworkCost, network_cost
from nfldm_ns.pretrained.weights import untrained_lpips
from nfldm_ns.scenes.views import Views
from tests.small_baselines import SIZES, TRAINING, MeanLevels
from tests.synthetic import AABB, BoxRoom, surround_cameras


def test_cost_of_one_convolution():
    with torch.device("meta"):
        layer = nn.Conv2d(3, 8, 3, padding=1)
        images = torch.empty(4, 3, 10, 10)
    forward = 2 * 4 * 100 * 8 * 27
    cost = network_cost(layer, lambda: layer(images))
    assert cost.parameters == 8 * 27 + 8
    assert cost.flops == 2 * forward, "the images need no gradient"
    assert cost.activation_bytes == 4 * images.numel()
    assert cost.bytes == 16 * cost.parameters + cost.activation_bytes
    frozen = network_cost(layer.requires_grad_(False), lambda: layer(images), backward=False)
    assert frozen == NetworkCost(0, forward, 0)


def test_every_network_of_every_preset_is_counted():
    rows = list(preset_costs())
    assert set(SCENE_AUTOENCODER) >= set(LATENT_PRESETS) == set(DIFFUSION_PRESETS)
    assert len(rows) == len(SCENE_AUTOENCODER) + 4 * len(LATENT_PRESETS)
    assert len({(row.stage, row.preset) for row in rows}) == len(rows)
    assert all(min(row.cost.parameters, row.cost.flops, row.cost.activation_bytes) > 0 for row in rows)


def test_rooms128_has_the_rays_voxels_and_latents_of_rooms():
    small, large = (SCENE_AUTOENCODER[name] for name in ("rooms", "rooms128"))
    models = [
        SceneAutoencoder(**preset.network, image_size=(size, size), focal_length=size / 2)
        for preset, size in ((small, 64), (large, 128))
    ]
    generator = torch.Generator().manual_seed(0)
    cameras = [surround_cameras(1, size, generator) for size in (64, 128)]
    assert models[0]._ray_grid(cameras[0]) == models[1]._ray_grid(cameras[1]) == (32, 32)
    assert models[0].grid_shape == models[1].grid_shape
    assert models[1].upsampling == 2 and models[0].upsampling == 1
    assert models[1].encoder.stride == models[0].encoder.stride
    assert LATENT_PRESETS["rooms128"] is LATENT_PRESETS["rooms"]
    assert DIFFUSION_PRESETS["rooms128"] is DIFFUSION_PRESETS["rooms"]


@pytest.mark.parametrize("name", ["tiny", "base"])
def test_parameters_are_those_of_the_model(name):
    preset = SCENE_AUTOENCODER[name]
    model = SceneAutoencoder(**preset.network)
    discriminator = make_discriminator(StageOneLossConfig(**preset.loss), (preset.image_size, preset.image_size))
    networks = [model.encoder, model.decoder, discriminator]
    count = sum(parameter.numel() for network in networks for parameter in network.parameters())
    assert scene_autoencoder_cost(preset).parameters == count


def test_a_step_without_discriminator_costs_less():
    preset = SCENE_AUTOENCODER["tiny"]
    without = replace(preset, loss={**preset.loss, "adversarial_mult": 0})
    assert discriminator_cost(without) == NetworkCost()
    assert scene_autoencoder_cost(without) + discriminator_cost(preset) == scene_autoencoder_cost(preset)
    heads = make_discriminator(StageOneLossConfig(**preset.loss), (64, 64)).heads
    forward = 0
    for head, side in zip(heads, (32, 16), strict=True):
        weights = [layer.weight.numel() for layer in head if isinstance(layer, nn.Conv2d)]
        forward += 2 * 2 * side**2 * sum(weights)  # two views
    first = sum(2 * 2 * side**2 * head[0].weight.numel() for head, side in zip(heads, (32, 16), strict=True))
    # The renderer: forward and gradients of inputs; the discriminator, twice: forward and gradients of inputs (not of
    # the features) and of weights.
    assert discriminator_cost(preset).flops == 2 * forward + 2 * (3 * forward - first)


def test_every_baseline_at_every_preset_is_counted():
    rows = list(gan_costs())
    stages = {f"baseline {method}" for method in METHODS} | {"baseline gaudi prior"}
    assert {(row.stage, row.preset) for row in rows} == {(stage, name) for stage in stages for name in GAN_PRESETS}
    assert len(rows) == len(stages) * len(GAN_PRESETS)
    assert all(min(row.cost.parameters, row.cost.flops, row.cost.activation_bytes) > 0 for row in rows)
    sizes = {(row.stage, row.preset): row.sizes for row in rows}
    assert sizes["baseline gsn", "base"] == "2 views of 128 px, V 33x16x64x64"
    assert sizes["baseline graf", "rooms"] == "2 views of 32 px, V 4x16x48x48"


@pytest.mark.parametrize("method", list(METHODS))
def test_parameters_of_a_baseline_are_those_that_are_trained(method, box_room_collection):
    objective = make_objective(box_room_collection, METHODS[method], SIZES, MeanLevels())
    trained = sum(parameter.numel() for parameter in objective.parameters())
    if method == "gaudi":
        trained -= objective.latents.weight.numel()
        assert SIZES.pose["latent_dim"] + SIZES.generators["voxels"]["latent_dim"] == objective.latents.embedding_dim
    if (critic := getattr(objective, "critic", None)) is not None:  # LPIPS's network has other channels
        real, sizes = PerceptualNetwork(untrained_lpips("alex")), (32, 32)
        trained -= sum(parameter.numel() for parameter in critic.parameters())
        trained += sum(p.numel() for p in make_critic(METHODS[method], SIZES, real, sizes).parameters())
    pose = 0
    if method == "gaudi":  # the collection has another number of cameras
        pose = sum(p.numel() for p in PoseDecoder(**SIZES.pose).parameters())
        pose -= sum(p.numel() for p in objective.cameras.parameters())
    assert baseline_cost(GanPreset(SIZES, TRAINING, image_size=32), method).parameters == trained + pose


def test_a_critic_costs_its_passes_over_rendered_and_real_images():
    """And dual discrimination, which sees both images' features, twice the perceptual network's."""
    preset = GanPreset(SIZES, TRAINING, image_size=32)
    alone, dual = (judging_cost(preset, METHODS[method]) for method in ("gsn", "eg3d"))
    metric = untrained_lpips("alex").net
    images = torch.empty(4, 3, 32, 32, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        metric.slice2(metric.slice1(images))
    forward, weights = counter.get_total_flops(), dual.parameters - alone.parameters
    # Rendered images: forward and gradients of inputs; real ones: forward.
    heads = (alone.flops - 3 * forward, dual.flops - 6 * forward)
    assert 0 < heads[0] < heads[1] < 2 * heads[0]
    assert weights == 64 * (64 + 192), "first layers of heads see twice the channels"


def test_the_command_lists_them(capsys):
    presets.main([])
    said = capsys.readouterr().out
    names = ("tiny", "base", "paper", "3 fine", "c 4x8x32x32, f 4x128x128, g 128", "baseline eg3d", "G ops")
    for name in names:
        assert name in said
    assert "\N{HORIZONTAL ELLIPSIS}" not in said, "nothing is cut off"


def test_presets_of_streets_cover_the_papers_box_with_voxels_that_fit_their_latents():
    for name, base in STREETS.items():
        network = SCENE_AUTOENCODER[name].network
        z, y, x = network["grid_shape"]
        assert y == x and y % 4 == 0 and 0.6 <= 80 / y <= 1.7 and 0.5 <= 16 / z <= 1.4
        assert network["depth_spacing"] == "inverse" and SCENE_AUTOENCODER[name].num_source_views == 6
        assert LATENT_PRESETS[name] is LATENT_PRESETS[base] and DIFFUSION_PRESETS[name] is DIFFUSION_PRESETS[base]


def test_cameras_of_unequal_focal_lengths_have_the_rays_of_training():
    """Whichever comes first; beyond the trained ones the angle of a ray is kept."""
    network = {**SCENE_AUTOENCODER["tiny"].network, "grid_shape": (4, 8, 8)}
    model = SceneAutoencoder(**network, image_size=(64, 64), focal_length=30.0, max_focal_length=45.0)
    cameras = surround_cameras(4, 64, torch.Generator().manual_seed(0))

    def rays(*focal: float) -> tuple[int, int]:
        cameras.fx = torch.tensor(focal)[:, None]
        return model._ray_grid(cameras)

    for order in ((30.0, 45.0, 40.0, 40.0), (45.0, 40.0, 30.0, 40.0), (30.0,) * 4, (45.0,) * 4):
        assert rays(*order) == (32, 32)
    assert rays(90.0, 90.0, 90.0, 90.0) == (16, 16) and rays(15.0, 15.0, 15.0, 15.0) == (64, 64)


@pytest.mark.parametrize("name", ["rooms128", "base", "paper", "streets-tiny"])
def test_large_presets_take_a_step(name):
    """One scene with all its source views, one target view."""
    preset, generator = SCENE_AUTOENCODER[name], torch.Generator().manual_seed(0)
    size = preset.image_size
    torch.manual_seed(0)
    model = SceneAutoencoder(**preset.network, image_size=(size, size), focal_length=size / 2, aabb=AABB)
    room = BoxRoom.random(generator)
    counts = (preset.num_source_views, 1)
    source, target = (Views.stack([room.render(surround_cameras(n, size, generator))]) for n in counts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=preset.learning_rate)
    grid = model.encode(source)
    assert grid.shape == preset.network["grid_shape"]
    rendered = model.render(grid, target.cameras)
    assert rendered.rgb.shape == (1, 1, 3, size, size)
    losses = stage_one_losses(StageOneLossConfig(lpips_mult=0), rendered, target, grid, None)
    sum(losses.values()).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    before = model.encoder.out.weight.clone()
    optimizer.step()
    assert not torch.equal(before, model.encoder.out.weight)
