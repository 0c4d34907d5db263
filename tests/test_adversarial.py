"""The adversarial loss, and the features it shares with the perceptual distance."""

import math

import pytest
import torch

from nfldm_ns.autoencoder.discriminator import ProjectedDiscriminator, discriminator_loss, generator_loss
from nfldm_ns.autoencoder.perceptual import PERCEPTUAL_CHANNELS, PerceptualNetwork
from nfldm_ns.pretrained.weights import load_lpips
from tests.pretrained import require_weights

CHANNELS = (4, 6)


def random_features(seed: int, shift: float = 0.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(3, channels, 8 // 2**i, 8 // 2**i, generator=generator)
        + shift * torch.arange(channels)[:, None, None]
        for i, channels in enumerate(CHANNELS)
    ]


@pytest.fixture
def discriminator() -> ProjectedDiscriminator:
    torch.manual_seed(0)
    return ProjectedDiscriminator(CHANNELS, width=8)


def test_losses_of_a_discriminator_that_cannot_tell(discriminator):
    for head in discriminator.heads:
        torch.nn.init.zeros_(head[-1].weight)
        torch.nn.init.zeros_(head[-1].bias)
    rendered, real = random_features(0), random_features(1)
    assert generator_loss(discriminator, rendered).item() == pytest.approx(math.log(2))
    assert discriminator_loss(discriminator, rendered, real).item() == pytest.approx(2 * math.log(2))


def test_losses_are_the_non_saturating_ones(discriminator):
    rendered, real = random_features(0), random_features(1)
    fake, true = ([logits.double() for logits in discriminator(features)] for features in (rendered, real))
    generator = sum(torch.log1p(torch.exp(-logits)).mean() for logits in fake) / 2
    judge = generator_loss(discriminator, rendered)
    assert float(judge) == pytest.approx(float(generator), rel=1e-5)
    pairs = zip(fake, true, strict=True)
    expected = sum((torch.log1p(f.exp()).mean() + torch.log1p((-t).exp()).mean()) / 2 for f, t in pairs)
    assert float(discriminator_loss(discriminator, rendered, real)) == pytest.approx(float(expected), rel=1e-5)


def test_gradients_do_not_leak(discriminator):
    rendered = [level.requires_grad_() for level in random_features(0)]
    generator_loss(discriminator, rendered).backward()
    assert all(level.grad is not None and bool(level.grad.any()) for level in rendered)
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    for level in rendered:
        level.grad = None
    discriminator_loss(discriminator, rendered, random_features(1)).backward()
    assert all(level.grad is None for level in rendered)
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_scale_of_features_tells_nothing(discriminator):
    features = random_features(0)
    louder = [7 * level for level in features]
    for a, b in zip(discriminator(features), discriminator(louder), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_it_learns_to_tell_in_a_few_steps(discriminator):
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        loss = discriminator_loss(discriminator, random_features(2 * step), random_features(2 * step + 1, shift=0.5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_distance_of_features_is_lpips():
    require_weights("lpips-vgg")
    metric = load_lpips("vgg")
    network = PerceptualNetwork(metric)
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1 for _ in range(2))
    with torch.inference_mode():
        features = [network.features(images) for images in (first, second)]
        assert tuple(level.shape[1] for level in features[0]) == network.channels == PERCEPTUAL_CHANNELS
        torch.testing.assert_close(network.distance(*features), metric(first, second).flatten())
