"""The discriminator of pixels, its gradient penalty, and the augmentation of what it sees."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nfldm_ns.autoencoder.augmentation import augment, cut_out, recolor, translate
from nfldm_ns.autoencoder.discriminator import discriminator_loss, r1_penalty
from nfldm_ns.autoencoder.losses import StageOneLossConfig, make_discriminator, stage_one_losses
from nfldm_ns.autoencoder.renderer import FeatureMaps
from nfldm_ns.autoencoder.scene_autoencoder import RenderedViews
from nfldm_ns.autoencoder.stylegan2_discriminator import (
    EqualizedConv2d,
    EqualizedLinear,
    StyleGAN2Discriminator,
    append_minibatch_std,
    blur,
)
from nfldm_ns.errors import UserInputError
from nfldm_ns.method_configs.presets import SCENE_AUTOENCODER
from nfldm_ns.method_configs.scene_ae import discriminator_optimizer, scene_autoencoder_config
from nfldm_ns.scenes.views import Views
from tests.small_models import random_grid
from tests.synthetic import surround_cameras

SMALL = {"discriminator_channel_base": 256, "discriminator_channel_max": 16}
CONFIG = StageOneLossConfig(
    lpips_mult=0, adversarial_mult=0.1, discriminator="stylegan2", r1_gamma=2.0, r1_every=4, **SMALL
)


def random_images(batch: int = 4, size: tuple[int, int] = (16, 16), seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def small_discriminator(size: tuple[int, int] = (16, 16)) -> StyleGAN2Discriminator:
    return StyleGAN2Discriminator(size, channel_base=256, channel_max=16)


class LinearDiscriminator(nn.Module):
    """D(x) = w . x"""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, 16))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images * self.weight).sum(dim=(1, 2, 3))[:, None]


# The network


@pytest.mark.parametrize("size", [(4, 4), (32, 32), (64, 64), (96, 96), (128, 128), (64, 96), (90, 50), (5, 37)])
def test_one_logit_per_image_of_any_size(size):
    discriminator = small_discriminator(size)
    for batch in (1, 3):
        logits = discriminator(random_images(batch, size))
        assert logits.shape == (batch, 1)
        assert bool(logits.isfinite().all())


def test_widths_follow_the_size_of_the_maps():
    discriminator = StyleGAN2Discriminator((64, 64), channel_base=512, channel_max=32)
    assert discriminator.from_rgb.weight.shape[0] == 8
    assert [block.conv2.weight.shape[0] for block in discriminator.blocks] == [16, 32, 32, 32]


@torch.no_grad()
def test_layers_keep_the_variance_whatever_their_width():
    x = torch.randn(64, 48, 9, 9)
    for layer in (EqualizedConv2d(48, 64, 3), EqualizedConv2d(48, 64, 1)):
        assert float(layer(x).std()) == pytest.approx(1.0, rel=0.1)
    assert float(EqualizedLinear(500, 300)(torch.randn(64, 500)).std()) == pytest.approx(1.0, rel=0.1)
    for width in (16, 256):
        discriminator = StyleGAN2Discriminator((32, 32), channel_base=32 * width, channel_max=width)
        logits = discriminator(torch.randn(32, 3, 32, 32))
        assert 0.1 < float(logits.square().mean().sqrt()) < 10


def test_layers_equal_plain_ones_with_scaled_weights():
    x = torch.randn(2, 5, 8, 8)
    layer, plain = EqualizedConv2d(5, 7, 3, padding=1), nn.Conv2d(5, 7, 3, padding=1)
    plain.load_state_dict({"weight": layer.weight / math.sqrt(45), "bias": layer.bias})
    torch.testing.assert_close(layer(x), plain(x))


def test_adam_moves_all_layers_at_one_relative_speed():
    """Relative to their size, the weights that are used change alike, whatever the fan-in."""
    changes = []
    for width in (4, 400):
        layer = EqualizedLinear(width, 50)
        used = layer.weight.detach() * layer.scale
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        layer(torch.randn(8, width)).square().sum().backward()
        optimizer.step()
        changes.append(float((layer.weight.detach() * layer.scale - used).norm() / used.norm()))
    assert changes[0] == pytest.approx(changes[1], rel=0.2)


def test_blur_keeps_constants_and_removes_the_finest_stripes():
    ones = torch.ones(1, 2, 12, 12)
    torch.testing.assert_close(blur(ones, padding=2)[..., 3:-3, 3:-3], torch.ones(1, 2, 7, 7))
    assert blur(ones, padding=1, stride=2).shape == (1, 2, 6, 6)
    stripes = torch.tensor([1.0, -1.0]).repeat(6).expand(1, 2, 12, 12)
    assert float(blur(stripes, padding=1, stride=2)[..., 1:-1, 1:-1].abs().max()) < 1e-6


def test_minibatch_std_of_equal_images_is_zero():
    image = torch.randn(1, 5, 4, 4)
    for batch in (1, 2, 6):
        equal = append_minibatch_std(image.expand(batch, -1, -1, -1))
        torch.testing.assert_close(equal[:, :5], image.expand(batch, -1, -1, -1))
        assert float(equal[:, 5].abs().max()) < 1.1e-4


@pytest.mark.parametrize(("batch", "size"), [(2, 2), (3, 3), (4, 4), (5, 1), (6, 3), (8, 4)])
def test_minibatch_std_is_the_deviation_within_groups(batch, size):
    images = torch.randn(batch, 5, 4, 4)
    appended = append_minibatch_std(images)[:, 5]
    for i in range(batch):
        members = images[i % (batch // size) :: batch // size]
        assert len(members) == size
        expected = (members.var(dim=0, unbiased=False) + 1e-8).sqrt().mean()
        torch.testing.assert_close(appended[i], expected.expand(4, 4))


def test_it_learns_to_tell_in_a_few_steps():
    """Smooth from sharp images of the same colours."""
    discriminator = small_discriminator()
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.0, 0.99))
    losses = []
    for step in range(40):
        real, fake = random_images(8, seed=2 * step), blur(random_images(8, (17, 17), 2 * step + 1), padding=1)
        loss = discriminator_loss(discriminator, fake, real)
        if step % 4 == 0:
            loss = loss + 4 * r1_penalty(discriminator, real, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(discriminator_loss(discriminator, fake, real).item())
    assert losses[-1] < 0.5 * losses[0]


# R1


def test_r1_of_a_linear_discriminator():
    discriminator = LinearDiscriminator()
    penalty = r1_penalty(discriminator, random_images(), gamma=3.0)
    torch.testing.assert_close(penalty, 1.5 * discriminator.weight.square().sum())
    penalty.backward()
    torch.testing.assert_close(discriminator.weight.grad, 3.0 * discriminator.weight)


def test_r1_is_the_slope_of_the_logits():
    """Central differences in double precision."""
    discriminator = small_discriminator().double()
    image = random_images(1).double()
    direction = torch.randn_like(image)
    image.requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(image).sum(), image)
    ends = [discriminator(image + 1e-6 * sign * direction) for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), slope.squeeze(), rtol=1e-4, atol=1e-8)
    expected = 0.5 * gradient.square().sum()
    torch.testing.assert_close(r1_penalty(discriminator, image, 1.0), expected)
    with torch.no_grad():
        torch.testing.assert_close(r1_penalty(discriminator, image, 1.0), expected)


# Losses of a training step


def rendering(seed: int = 0) -> tuple[RenderedViews, Views]:
    """Two scenes of two views of 16 x 16 pixels, and images that a renderer could have made of them."""
    generator = torch.Generator().manual_seed(seed)
    target = Views.stack(
        [Views(surround_cameras(2, 16, generator), torch.rand(2, 3, 16, 16, generator=generator)) for _ in range(2)]
    )
    rgb = torch.rand(2, 2, 3, 16, 16, generator=generator).requires_grad_()
    flat = torch.zeros(2, 2, 1, 16, 16)
    maps = FeatureMaps(torch.zeros(2, 2, 4, 16, 16), flat, flat, flat, torch.zeros(2, 2, 3, 16, 16))
    return RenderedViews(rgb, flat, flat, maps), target


def losses_of(config: StageOneLossConfig, discriminator: nn.Module, rendered, target, step: int):
    torch.manual_seed(step)
    return stage_one_losses(config, rendered, target, random_grid(), None, discriminator, step)


@pytest.mark.parametrize("policies", [(), ("color", "translation", "cutout")])
def test_one_backward_pass_and_no_gradient_leaks(policies):
    config = replace(CONFIG, rgb_mult=0.0, augment=policies)
    discriminator = make_discriminator(config, (16, 16))
    rendered, target = rendering()
    parameters = list(discriminator.parameters())
    target.images.requires_grad_()

    def gradients(*names: str) -> list[torch.Tensor | None]:
        losses = losses_of(config, discriminator, rendered, target, step=4)
        assert set(losses) == {"rgb_loss", "adversarial_loss", "discriminator_loss", "r1_loss"}
        total = sum(losses[name] for name in names)
        return torch.autograd.grad(total, [rendered.rgb, target.images, *parameters], allow_unused=True)

    of_renderer = gradients("adversarial_loss")
    assert bool(of_renderer[0].any())
    assert all(gradient is None for gradient in of_renderer[1:])
    of_discriminator = gradients("discriminator_loss", "r1_loss")
    assert of_discriminator[:2] == (None, None)
    assert all(gradient is not None and bool(gradient.any()) for gradient in of_discriminator[2:])
    together = gradients("adversarial_loss", "discriminator_loss", "r1_loss")
    assert torch.equal(together[0], of_renderer[0])
    assert all(torch.equal(a, b) for a, b in zip(together[2:], of_discriminator[2:], strict=True))


def test_lazy_penalty_comes_on_its_steps_and_is_the_penalty_on_average():
    discriminator = LinearDiscriminator()
    rendered, target = rendering()
    values = [losses_of(CONFIG, discriminator, rendered, target, step).get("r1_loss") for step in range(8)]
    due = [step for step, value in enumerate(values) if value is not None]
    assert due == [0, 4]
    whole = CONFIG.r1_gamma / 2 * discriminator.weight.square().sum()
    torch.testing.assert_close(sum(values[step] for step in due) / 8, whole)
    none = replace(CONFIG, r1_gamma=0.0)
    assert "r1_loss" not in losses_of(none, discriminator, rendered, target, 0)


def test_pixels_need_no_perceptual_network():
    assert not CONFIG.needs_perceptual_network
    assert replace(CONFIG, lpips_mult=1.0).needs_perceptual_network
    projected = StageOneLossConfig(lpips_mult=0, adversarial_mult=0.1)
    assert projected.needs_perceptual_network
    with pytest.raises(ValueError, match="no perceptual network"):
        losses_of(projected, make_discriminator(projected, (16, 16)), *rendering(), step=0)


class _Step(nn.Module):
    """A training step whose losses are computed inside `forward`, as a distributed model does."""

    def __init__(self) -> None:
        super().__init__()
        self.discriminator = make_discriminator(CONFIG, (16, 16))
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, step: int) -> torch.Tensor:
        rendered, target = rendering()
        rendered.rgb = self.gain * rendered.rgb
        return sum(losses_of(CONFIG, self.discriminator, rendered, target, step).values())


def test_distributed_steps_have_the_same_gradients(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        step = _Step()
        wrapped = DistributedDataParallel(step, find_unused_parameters=True)
        for number in (3, 4):  # without and with the penalty
            gradients = []
            for model in (step, wrapped):
                model.zero_grad()
                model(number).backward()
                gradients.append([parameter.grad.clone() for parameter in step.parameters()])
            assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))
    finally:
        torch.distributed.destroy_process_group()


# Augmentation


POLICIES = ("color", "translation", "cutout")


@pytest.mark.parametrize("policies", [(), *((policy,) for policy in POLICIES), POLICIES])
def test_augmented_images_keep_shape_and_gradients(policies):
    images = random_images(4, (16, 24)).requires_grad_()
    changed = augment(images, policies)
    assert changed.shape == images.shape
    assert torch.equal(changed, images) == (not policies)
    (gradient,) = torch.autograd.grad(changed.square().sum(), images)
    assert all(bool(of_image.any()) for of_image in gradient)


def test_every_image_and_every_call_has_its_own_draw():
    images = random_images(1).expand(2, -1, -1, -1)
    for policy in POLICIES:
        torch.manual_seed(3)
        real, rendered = augment(images, (policy,)), augment(images, (policy,))
        assert not torch.equal(real[0], real[1])
        assert not torch.equal(real, rendered)
        torch.manual_seed(3)
        assert torch.equal(augment(images, (policy,)), real)


def test_all_channels_of_an_image_move_and_vanish_together():
    grey = random_images(4)[:, :1].expand(-1, 3, -1, -1)
    changed = augment(grey, POLICIES)
    torch.testing.assert_close(changed, changed[:, :1].expand(-1, 3, -1, -1))


def test_translation():
    images = random_images(3)
    assert torch.equal(translate(images, torch.zeros(3, 2, dtype=torch.long)), images)
    moved = translate(images, torch.tensor([[2, -3], [0, 0], [-1, 4]]))
    assert torch.equal(moved[0, :, 2:, :-3], images[0, :, :-2, 3:])
    assert not moved[0, :, :2].any()
    assert not moved[0, :, :, -3:].any()
    assert torch.equal(moved[1], images[1])
    assert torch.equal(moved[2, :, :-1, 4:], images[2, :, 1:, :-4])


def test_cutout_takes_a_rectangle():
    ones = torch.ones(2, 3, 16, 16)
    cut = cut_out(ones, torch.tensor([[8, 8], [0, 15]]), (8, 4))
    assert not cut[0, :, 4:12, 6:10].any()
    assert cut[0].sum() == 3 * (256 - 32)
    assert cut[1].sum() == 3 * (256 - 4 * 3), "at the border only what lies inside"


def test_colours_change_as_said():
    images, one = random_images(), torch.ones(4)
    torch.testing.assert_close(recolor(images, 0 * one, one, one), images)
    torch.testing.assert_close(recolor(images, 0.3 * one, one, one), images + 0.3)
    grey = images.mean(dim=1, keepdim=True).expand_as(images)
    torch.testing.assert_close(recolor(images, 0 * one, 0 * one, one), grey)
    contrast = recolor(images, 0 * one, one, 0.5 * one)
    torch.testing.assert_close(contrast.mean(dim=(1, 2, 3)), images.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(contrast.std(dim=(1, 2, 3)), 0.5 * images.std(dim=(1, 2, 3)))


def test_unknown_augmentation():
    with pytest.raises(ValueError, match="mirror"):
        augment(random_images(), ("mirror",))


# Settings


def test_no_discriminator_unless_asked_for():
    assert make_discriminator(replace(CONFIG, adversarial_mult=0.0), (16, 16)) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"discriminator": "projected"}, "acts on pixels"),
        ({"discriminator": "projected", "r1_gamma": 0.0, "augment": ("color",)}, "acts on pixels"),
        ({"r1_gamma": -1.0}, "r1_gamma is -1.0"),
        ({"r1_every": 0}, "r1_every 0"),
        ({"discriminator_channel_base": 8}, "no channels"),
    ],
)
def test_settings_that_do_not_fit(changes, said):
    with pytest.raises(UserInputError, match=said):
        make_discriminator(replace(CONFIG, **changes), (16, 16))


def test_images_that_are_too_small():
    with pytest.raises(UserInputError, match="at least 4 x 4 pixels, not 3 x 16"):
        make_discriminator(CONFIG, (3, 16))


def test_presets_choose_the_kind_of_discriminator_and_its_optimiser():
    kinds = {name: preset.loss.get("discriminator", "projected") for name, preset in SCENE_AUTOENCODER.items()}
    assert {name for name, kind in kinds.items() if kind == "stylegan2"} == {
        "base",
        "paper",
        "streets",
        "streets-paper",
    }
    small = {"tiny", "small", "rooms", "rooms128", "streets-tiny"}
    assert {name for name, kind in kinds.items() if kind == "projected"} == small
    for name, preset in SCENE_AUTOENCODER.items():
        group = scene_autoencoder_config(name, preset).optimizers["discriminator"]["optimizer"]
        assert group == discriminator_optimizer(StageOneLossConfig(**preset.loss), preset.discriminator_learning_rate)
    lazy = discriminator_optimizer(CONFIG, 1e-3)
    assert (lazy.lr, lazy.weight_decay) == (pytest.approx(0.8e-3), 0)
    assert lazy.betas == (0, pytest.approx(0.99**0.8))
    assert discriminator_optimizer(replace(CONFIG, r1_gamma=0.0), 1e-3).betas == (0, 0.99)
