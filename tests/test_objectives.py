"""Objectives of refining: the registry, and ReconFusion's samples that are kept for some steps."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from nfldm_ns.errors import UserInputError
from nfldm_ns.refine.distillation import DistillationConfig, draw_timesteps
from nfldm_ns.refine.objectives import OBJECTIVES, MultistepReconstruction
from nfldm_ns.refine.prior import Condition
from nfldm_ns.refine.refiner import Refiner
from nfldm_ns.refine.settings import RefinementConfig
from tests.pretrained import require_weights
from tests.test_distillation import STD, GaussianPrior, images
from tests.test_refine import changes, config_for, folders, room_grid, room_scene, train  # noqa: F401 (a fixture)

CONFIG = DistillationConfig(
    objective="multistep",
    guidance="none",
    min_time=0.4,
    max_time=0.6,
    time_annealing="decreasing",
    reconstruction_steps=1,
    sample_every=3,
    sample_lpips_mult=0.0,
)


class Decoding(GaussianPrior):
    """Its samples are images; counts how often it is asked."""

    asked = 0

    def decode(self, encoded: Tensor) -> Tensor | None:
        return encoded / self.factor

    def denoise(self, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        self.asked += 1
        return super().denoise(noisy, timestep, condition)


def test_every_objective_that_can_be_asked_for_is_there():
    assert set(get_args(get_type_hints(DistillationConfig)["objective"])) == set(OBJECTIVES)


@pytest.mark.parametrize("kind", [Decoding, GaussianPrior])
def test_the_loss_is_the_weighted_distance_to_the_posterior_mean(kind):
    """One step of DDIM of a Gaussian prior ends at E[x_0 | x_t] = mu + a s^2 (x_t - a mu) / (a^2 s^2 + sigma^2)."""
    prior, x, mean = kind(), torch.rand(2, 3, 8, 8).requires_grad_(), images(0.3, 0.6)
    objective = MultistepReconstruction(prior, CONFIG)
    found = objective(x, {"mean": mean}, None, 0.5, torch.Generator().manual_seed(3), True)
    timestep = draw_timesteps(CONFIG, 100, 2, 0.5)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    signal, sigma = prior.signal_and_noise(timestep)
    noisy = signal * x.detach() + sigma * noise
    expected = mean + signal * STD**2 * (noisy - signal * mean) / (signal**2 * STD**2 + sigma**2)
    expected = expected.clamp(0, 1) if kind is Decoding else expected
    by_hand = (sigma.square() * (x.detach() - expected).abs()).mean()
    assert float(found.loss.detach()) == pytest.approx(float(by_hand), rel=1e-4)
    found.loss.backward()
    assert torch.allclose(x.grad, sigma.square() * (x.detach() - expected).sign() / x.numel(), atol=1e-7)


def test_lpips_counts_where_samples_are_images():
    require_weights("lpips-vgg")
    prior, x, mean = Decoding(32), torch.rand(1, 3, 32, 32).requires_grad_(), images(0.3, size=32)
    losses = []
    for mult in (0.0, 1.0, 2.0):
        objective = MultistepReconstruction(prior, replace(CONFIG, sample_lpips_mult=mult))
        losses.append(objective(x, {"mean": mean}, None, 0.5, torch.Generator().manual_seed(3), True).loss)
    plain, once, twice = (float(loss.detach()) for loss in losses)
    assert once > plain and twice - once == pytest.approx(once - plain, rel=1e-3)
    losses[1].backward()
    assert x.grad.isfinite().all() and float(x.grad.abs().sum()) > 0


def test_samples_and_views_are_kept_for_some_steps():
    prior = Decoding(16)
    config = RefinementConfig(prior="x", style="words", distillation=CONFIG)
    prior.condition = lambda images=None, text=None: {"mean": torch.full((1, 3, 16, 16), 0.5)}
    refiner = Refiner(room_scene(), prior, config)
    asked, cameras = [], []
    for step in range(8):
        refiner.losses(room_grid(), room_scene().renderer, 0.5, torch.Generator().manual_seed(step), step)
        asked.append(prior.asked)
        cameras.append(refiner._drawn.cameras.camera_to_worlds)
    assert asked == [1, 2, 2, 2, 3, 3, 3, 4], "anew in 0, and in those after multiples of three"
    assert torch.equal(cameras[1], cameras[3]) and not torch.equal(cameras[3], cameras[4])


def test_renders_without_a_finite_sample_take_no_part():
    class Broken(Decoding):
        def denoise(self, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
            return torch.where(condition["mean"] < 0, torch.nan, super().denoise(noisy, timestep, condition))

    x = images(0.5, 0.5).requires_grad_()
    objective = MultistepReconstruction(Broken(), CONFIG)
    found = objective(x, {"mean": images(0.2, -1.0)}, None, 0.5, torch.Generator(), True)
    found.loss.backward()
    assert found.skipped == 1 and (x.grad[1] == 0).all() and (x.grad[0] != 0).any()
    nothing = objective(x, {"mean": images(-1.0, -1.0)}, None, 0.5, torch.Generator(), True)
    assert nothing.skipped == 2 and float(nothing.loss.detach()) == 0


def test_times_widen_from_the_most_noise_to_their_range():
    config = DistillationConfig(min_time=0.2, max_time=0.7, time_annealing="widening")
    first, half, last = (draw_timesteps(config, 1001, 2000, share, torch.Generator()) for share in (0.0, 0.5, 1.0))
    assert (first == 700).all() and int(half.max()) == 700 and 450 <= int(half.min()) < 455
    assert 200 <= int(last.min()) < 205 and float(last.float().mean()) == pytest.approx(450, abs=10)


def test_a_resumed_run_keeps_to_the_same_samples(folders, tmp_path):  # noqa: F811
    """Through a latent prior, whose samples are decoded."""
    require_weights("lpips-vgg")
    asked = DistillationConfig(objective="multistep", guidance="none", reconstruction_steps=2, sample_every=2)
    whole = train(config_for(folders, tmp_path / "whole", 5, distillation=asked))
    config = config_for(folders, tmp_path / "again", 2, distillation=asked)
    config.load_dir, config.load_step = whole.checkpoint_dir, 2
    resumed = changes(train(config))
    assert all(torch.equal(value, changes(whole)[name]) for name, value in resumed.items())
    assert any(bool((value != 0).any()) for value in resumed.values())


def test_samples_that_outlive_a_checkpoint_are_refused(folders, tmp_path, capfd):  # noqa: F811
    asked = DistillationConfig(objective="multistep", guidance="none", sample_every=3)
    with pytest.raises(SystemExit) as ending:
        train(config_for(folders, tmp_path / "outputs", 1, distillation=asked))
    assert ending.value.code == 2 and "do not divide" in capfd.readouterr().err.replace("\n", " ")
    with pytest.raises(UserInputError, match="--sample-every"):
        replace(asked, sample_every=0).check()
