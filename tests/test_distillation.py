"""Score distillation against priors whose scores are known exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nfldm_ns.errors import UserInputError
from nfldm_ns.refine.distillation import DistillationConfig, distill, draw_timesteps, guided_noise
from nfldm_ns.refine.prior import Condition, ImagePrior, join, pick, repeat, resize_square
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from tests.small_models import random_grid, small_scene_autoencoder
from tests.synthetic import level_cameras

STD = 0.1


class GaussianPrior(ImagePrior):
    """Images are normally distributed around a mean that the condition is, so that eps_hat is known.

    x ~ N(mu, s^2) gives x_t ~ N(a mu, a^2 s^2 + sigma^2), whose score is -(x_t - a mu) / (a^2 s^2 + sigma^2), and
    eps_hat = -sigma score.
    """

    def __init__(self, size: int = 8, factor: float = 1.0, prediction_type: str = "epsilon") -> None:
        super().__init__(size, torch.linspace(0.999, 0.01, 100), prediction_type)
        self.factor = factor

    def encode(self, images: Tensor) -> Tensor:
        return self.factor * resize_square(images, self.image_size)

    def condition(self, images: Tensor | None = None, text: str | None = None) -> Condition:
        assert images is not None
        return {"mean": self.encode(images)}

    def unconditional(self) -> Condition:
        return {"mean": torch.zeros(1, 3, self.image_size, self.image_size)}

    def denoise(self, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        signal, sigma = self.signal_and_noise(timestep)
        noise = sigma * (noisy - signal * condition["mean"]) / (signal**2 * STD**2 + sigma**2)
        clean = (noisy - sigma * noise) / signal
        return {"epsilon": noise, "sample": clean, "v_prediction": signal * noise - sigma * clean}[self.prediction_type]


def images(*values: float, size: int = 8) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, size, size).clone()


PLAIN = DistillationConfig(guidance="none", min_time=0.4, max_time=0.6, time_annealing="decreasing")


@pytest.mark.parametrize("weighting", ["noise_variance", "uniform"])
def test_gradient_is_the_closed_form_in_the_mean_over_noise(weighting):
    """E[eps_hat - eps] = a sigma (x - mu) / (a^2 s^2 + sigma^2), times w."""
    prior, mean, x = GaussianPrior(), 0.3, 0.8
    config = DistillationConfig(guidance="none", weighting=weighting, max_time=0.5, time_annealing="decreasing")
    distilled = distill(
        prior, images(*[x] * 200), repeat(prior.condition(images(mean)), 200), None, config, 0.0, torch.Generator()
    )
    alpha = prior.alphas_cumprod[round(0.5 * 99)]
    signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
    expected = signal * sigma * (x - mean) / (signal**2 * STD**2 + sigma**2)
    expected = expected * sigma**2 if weighting == "noise_variance" else expected
    spread = distilled.gradient.std() / distilled.gradient.numel() ** 0.5
    assert float(distilled.gradient.mean()) == pytest.approx(float(expected), abs=4 * float(spread))
    assert float(spread) < 0.01 * float(expected)


def test_backward_pass_gives_the_gradient_through_the_encoder():
    """dx/dV of a latent prior includes its encoder: here a factor and the adjoint of averaging 2 x 2 pixels."""
    prior = GaussianPrior(4, factor=-2.5)
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    distilled = distill(prior, x, prior.condition(images(0.2, 0.4)), None, PLAIN, 0.0)
    distilled.loss.backward()
    by_hand = torch.autograd.grad(prior.encode(x), x, distilled.gradient / distilled.gradient.numel())[0]
    assert torch.allclose(x.grad, by_hand, atol=1e-8)
    assert distilled.loss.item() == pytest.approx(0.5 * float(distilled.gradient.square().mean()), rel=1e-4)


@pytest.mark.parametrize("objective", ["sds", "reconstruction"])
def test_images_are_pulled_to_the_mean_of_the_prior(objective):
    prior, x = GaussianPrior(), images(0.9, 0.1).requires_grad_()
    config = DistillationConfig(objective=objective, guidance="none", time_annealing="uniform", max_time=0.8)
    optimiser, generator = torch.optim.Adam([x], lr=0.02), torch.Generator().manual_seed(0)
    for _ in range(200):
        optimiser.zero_grad()
        distill(prior, x, prior.condition(images(0.3, 0.6)), None, config, 0.0, generator).loss.backward()
        optimiser.step()
    assert torch.allclose(x.mean((1, 2, 3)), torch.tensor([0.3, 0.6]), atol=0.02)


def test_negative_guidance_moves_the_mean_away_from_the_other_condition():
    """For equal variances the guided score is that of a Gaussian around gamma mu + (1 - gamma) mu'."""
    prior, noisy, timestep = GaussianPrior(), torch.randn(2, 3, 8, 8), torch.tensor([10, 70])
    wanted, unwanted = prior.condition(images(0.5, 0.6)), prior.condition(images(0.4, 0.9))
    guided = guided_noise(prior, noisy, timestep, wanted, unwanted, 3.0)
    shifted = {"mean": 3.0 * wanted["mean"] - 2.0 * unwanted["mean"]}
    assert torch.allclose(guided, prior.predict_noise(noisy, timestep, shifted), atol=1e-5)
    plain = guided_noise(prior, noisy, timestep, wanted, None, 3.0)
    assert torch.equal(plain, guided_noise(prior, noisy, timestep, wanted, unwanted, 1.0))


def test_classifier_score_distillation_is_what_guidance_adds():
    """For Gaussians w (eps_hat(x | y) - eps_hat(x | y')) = w a sigma (mu' - mu) / (a^2 s^2 + sigma^2), for any x."""
    prior, times = GaussianPrior(), {"max_time": 0.5, "time_annealing": "decreasing"}
    wanted, unwanted = prior.condition(images(0.5, 0.6)), prior.condition(images(0.4, 0.9))
    config = DistillationConfig(objective="csd", guidance="negative", **times)
    x = torch.rand(2, 3, 8, 8)
    found = distill(prior, x, wanted, unwanted, config, 0.0).gradient
    alpha = prior.alphas_cumprod[round(0.5 * 99)]
    signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
    expected = sigma**2 * signal * sigma * (unwanted["mean"] - wanted["mean"]) / (signal**2 * STD**2 + sigma**2)
    assert torch.allclose(found, expected, atol=1e-5)
    # By much guidance, the paper's gradient becomes the same direction.
    much = DistillationConfig(guidance="negative", guidance_scale=1e5, **times)
    assert torch.allclose(distill(prior, x, wanted, unwanted, much, 0.0).gradient / 1e5, expected, atol=1e-4)
    with pytest.raises(UserInputError, match="compares two conditions"):
        DistillationConfig(objective="csd", guidance="none").check()


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_all_that_networks_predict_becomes_the_same_noise(prediction_type):
    noisy, timestep, condition = torch.randn(4, 3, 8, 8), torch.tensor([0, 10, 50, 99]), {"mean": images(*[0.4] * 4)}
    expected = GaussianPrior().predict_noise(noisy, timestep, condition)
    predicted = GaussianPrior(prediction_type=prediction_type).predict_noise(noisy, timestep, condition)
    assert torch.allclose(predicted, expected, atol=1e-4)
    with pytest.raises(ValueError, match="flow"):
        GaussianPrior(prediction_type="flow")


def test_renders_of_voxels_are_pulled_to_the_mean_of_the_prior():
    autoencoder, grid = small_scene_autoencoder().requires_grad_(False), random_grid(1)
    cameras = level_cameras(torch.zeros(4, 3), torch.arange(4.0), 16)[None, ...]
    prior = GaussianPrior(16)
    density, features = grid.density.clone().requires_grad_(), grid.features.clone().requires_grad_()

    def shown() -> Tensor:
        return autoencoder.render(VoxelGrid(density.clamp(min=0), features, grid.aabb, grid.background), cameras).rgb[0]

    start = shown().detach()
    condition = prior.condition(start + 0.1)
    optimiser, generator = torch.optim.Adam([density, features], lr=0.05), torch.Generator().manual_seed(0)
    for _ in range(60):
        optimiser.zero_grad()
        distill(prior, shown(), condition, None, PLAIN, 0.5, generator).loss.backward()
        optimiser.step()
    left = (shown().detach().mean((1, 2, 3)) - condition["mean"].mean((1, 2, 3))).abs()
    assert left.max() < 0.03  # from 0.1


def test_times_cover_their_range_or_fall_through_it():
    config = DistillationConfig(min_time=0.2, max_time=0.7, time_annealing="uniform")
    drawn = draw_timesteps(config, 1001, 2000, 0.0, torch.Generator())
    assert 200 <= int(drawn.min()) < 205 and 695 < int(drawn.max()) <= 700
    assert float(drawn.float().mean()) == pytest.approx(450, abs=10)
    config = DistillationConfig(min_time=0.2, max_time=0.7, time_annealing="decreasing")
    falling = [int(draw_timesteps(config, 1001, 1, progress)) for progress in (0.0, 0.25, 1.0, 1.5)]
    assert falling == [700, 450, 200, 200]


def test_images_without_a_finite_gradient_take_no_part():
    class Broken(GaussianPrior):
        def denoise(self, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
            return torch.where(condition["mean"] < 0, torch.nan, super().denoise(noisy, timestep, condition))

    prior, x = Broken(), images(0.5, 0.5, 0.5).requires_grad_()
    distilled = distill(prior, x, {"mean": images(0.2, -1.0, 0.2)}, None, PLAIN, 0.0)
    distilled.loss.backward()
    assert distilled.skipped == 1 and x.grad.isfinite().all() and float(distilled.loss.detach()) > 0
    assert (x.grad[1] == 0).all() and (x.grad[0] != 0).any() and (x.grad[2] != 0).any()


def test_the_same_generator_gives_the_same_loss():
    prior, x = GaussianPrior(), images(0.5)
    losses = [
        float(distill(prior, x, {"mean": images(0.2)}, None, PLAIN, 0.0, torch.Generator().manual_seed(seed)).loss)
        for seed in (3, 3, 4)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_conditions_are_picked_and_joined_by_rows():
    condition = {"a": torch.arange(3.0)[:, None]}
    assert pick(condition, [2, 0])["a"].flatten().tolist() == [2, 0]
    assert join([condition, pick(condition, [1])])["a"].flatten().tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize("values", [{"min_time": 0.5, "max_time": 0.4}, {"max_time": 1.2}])
def test_times_that_are_no_range_are_refused(values):
    with pytest.raises(UserInputError, match="no range"):
        DistillationConfig(**values).check()
