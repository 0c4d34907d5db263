"""Codes that learn together with the denoiser (SSDNeRF's single stage)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nfldm_ns.autoencoder.scene_sampler import SceneCache
from nfldm_ns.commands import train_diffusion
from nfldm_ns.diffusion.joint_training import (
    CODES,
    CodeOptimiser,
    CodeTable,
    JointConfig,
    new_codes,
    prior_gradient,
    with_codes_of_run,
    with_own_codes,
)
from nfldm_ns.diffusion.latent_memory import encode_latents
from nfldm_ns.diffusion.rendering_loss import EstimateRendering
from nfldm_ns.diffusion.training import (
    DiffusionTrainingConfig,
    JointLosses,
    new_denoiser,
    save_pipeline,
    train_denoiser,
)
from nfldm_ns.errors import UserInputError
from nfldm_ns.training.draws import ItemDraws
from nfldm_ns.training.identity import model_hash
from nfldm_ns.training.schedule import Schedule
from tests.interruption import Interrupted, interrupt
from tests.small_models import DENOISER_SIZES, encoded_rooms, small_latent_autoencoder, small_scene_autoencoder

JOINT = JointConfig(num_scenes=2, num_views=1)
CONFIG = DiffusionTrainingConfig(
    schedule=Schedule(max_steps=6, batch_size=2, log_every=2, checkpoint_every=3), joint=JOINT
)


@pytest.fixture(scope="module")
def latent_autoencoder():
    return small_latent_autoencoder().requires_grad_(False)


@pytest.fixture(scope="module")
def renderer():
    return small_scene_autoencoder().requires_grad_(False)


@pytest.fixture(scope="module")
def store(tmp_path_factory, renderer):
    return encoded_rooms(tmp_path_factory.mktemp("scenes"), renderer)


@pytest.fixture(scope="module")
def memory(store, latent_autoencoder):
    return encode_latents(store, latent_autoencoder, store.splits["train"])


@pytest.fixture(scope="module")
def views(store):
    return SceneCache(store.load_collection(), 1.0), store.splits["train"]


@pytest.fixture
def trained(memory, latent_autoencoder, renderer, views):
    def train(stage, folder, config=CONFIG, known=memory, **others):
        given = {"scene_autoencoder": renderer, "views": views, "on_progress": lambda share, losses: None, **others}
        return train_denoiser(stage, known, latent_autoencoder, folder, DENOISER_SIZES[stage], config, **given)

    return train


class Constant(nn.Module):
    """Predicts the v of one estimate of x_0, whatever it sees, and counts how often it is asked."""

    def __init__(self, scheduler, estimate: torch.Tensor) -> None:
        super().__init__()
        self.scheduler, self.estimate, self.asked = scheduler, estimate, 0

    def forward(self, sample, timestep, **conditions):
        self.asked += 1
        alpha = self.scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        return (alpha.sqrt() * sample - self.estimate) / (1 - alpha).sqrt()


def joint_losses(stage, memory, latent_autoencoder, config, estimate=0.25, rendering=None):
    """Losses of a denoiser that always estimates the same, and what they move."""
    denoiser = new_denoiser(stage, DENOISER_SIZES[stage], memory, latent_autoencoder)
    own = with_own_codes(memory, stage)
    codes = new_codes(denoiser, own)
    optimiser = CodeOptimiser(denoiser, codes, own, config.joint)
    constant = Constant(None, torch.full(denoiser.sample_shape, estimate))
    losses = JointLosses(
        optimiser, stage, constant, denoiser, own, config, torch.device("cpu"), rendering=rendering or nothing
    )
    constant.scheduler = losses.scheduler
    return losses, codes, own


def nothing(values, *_):
    """A rendering that no code can change."""
    return 0.0 * values.sum()


# Closed forms


def test_a_step_of_a_code_is_adam_s_and_no_other_code_s():
    torch.manual_seed(0)
    codes = CodeTable(torch.randn(2, 3, 4, 5))
    before = codes.values.clone()
    one = before[1, 2].clone().requires_grad_()
    adam = torch.optim.Adam([one], lr=0.1)
    for _ in range(4):
        gradient = torch.randn(4, 5)
        one.grad = gradient.clone()
        adam.step()
        codes.step(1, 2, gradient, 0.1)
    torch.testing.assert_close(codes.values[1, 2], one.detach(), rtol=1e-5, atol=1e-6)
    assert codes.count.tolist() == [[0, 0, 0], [0, 0, 4]]
    codes.values[1, 2] = before[1, 2]
    assert torch.equal(codes.values, before)


def test_the_gradient_of_the_prior_is_that_of_its_loss():
    torch.manual_seed(0)
    clean = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    estimate = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    signal, noise = torch.tensor([0.6, 0.96]), torch.tensor([0.8, 0.28])
    weights = torch.tensor([0.75, 1.0], dtype=torch.float64)
    loss = sum(w * (e - x).square().sum() / 2 / 12 for w, e, x in zip(weights, estimate, clean, strict=True))
    (expected,) = torch.autograd.grad(loss, clean)
    torch.testing.assert_close(
        prior_gradient(clean.detach(), estimate, signal, noise).double(), expected, rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("stage", ["coarse", "fine"])
def test_the_prior_is_asked_once_and_kept_for_all_steps(stage, memory, latent_autoencoder):
    config = replace(CONFIG, joint=replace(JOINT, steps=3, prior_mult=0.5, num_scenes=1))
    losses, codes, own = joint_losses(stage, memory, latent_autoencoder, config)
    timestep, indices = torch.tensor([300, 800]), [1, 2]
    turn = int(ItemDraws(0, range(2)).integers(4)[0])
    before = codes.values.clone()
    losses.losses_of_estimate(indices, timestep, ItemDraws(0, range(2)))
    assert losses.wrapped.asked == 1
    alpha = losses.scheduler.alphas_cumprod[300]
    weight = min(1.0, float((alpha / (1 - alpha)).sqrt()))
    gradient = 0.5 * weight * (before[1, turn] - 0.25) / before[1, turn].numel()
    first = (1 - 0.9**3) * gradient
    torch.testing.assert_close(codes.first[1, turn], first, rtol=1e-3, atol=1e-9)
    assert codes.count.sum() == codes.count[1, turn] == 3
    moved = codes.values[1, turn] - before[1, turn]
    large = gradient.abs() > 1e-5
    torch.testing.assert_close(moved[large], -0.03 * gradient.sign()[large], rtol=2e-2, atol=0)
    shown = losses.denoiser.latent.inverse(codes.values[1, turn]).reshape(getattr(own, stage)[1, turn].shape)
    assert torch.equal(getattr(own, stage)[1, turn], shown.half()), "the denoiser sees it where it is"
    others = torch.ones(3, 4, dtype=torch.bool)
    others[1, turn] = False
    for name in ("scene_code", "coarse", "fine", "coarse_codes"):
        assert torch.equal(getattr(own, name)[others], getattr(memory, name)[others])
        if name != stage:
            assert torch.equal(getattr(own, name), getattr(memory, name))


def test_the_gradient_of_the_views_is_that_of_rendering(memory, latent_autoencoder, renderer, views):
    config = replace(CONFIG, joint=replace(JOINT, steps=1, prior_mult=0.0, rendering_mult=2.0, num_scenes=1))
    denoiser = new_denoiser("coarse", DENOISER_SIZES["coarse"], memory, latent_autoencoder)
    rendering = EstimateRendering(denoiser, latent_autoencoder, renderer, memory, *views, num_scenes=1, num_views=2)
    losses, codes, _ = joint_losses("coarse", memory, latent_autoencoder, config, rendering=rendering)
    turns = ItemDraws(0, range(1)).integers(4)
    row = (2, int(turns[0]))
    values = codes.values[row][None].clone().requires_grad_()
    found = losses.losses_of_estimate([2], torch.tensor([500]), ItemDraws(0, range(1)))
    seen = ItemDraws(0, range(1))
    seen.integers(4)
    seen.normal(memory.pick("scene_code", [2], turns, "cpu"))  # noise of the code, then that of the pass
    seen.normal(values)
    expected = rendering(values, torch.ones(1), [2], turns, seen)
    (gradient,) = torch.autograd.grad(expected, values)
    assert float(found["_code_rendering_loss"]) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(codes.first[row], 0.1 * 2.0 * gradient[0], rtol=1e-3, atol=1e-8)


def test_codes_that_views_pull_at_fit_them_better(memory, latent_autoencoder, renderer, views):
    config = replace(CONFIG, joint=JointConfig(learning_rate=0.05, num_scenes=1, steps=2, num_views=12, prior_mult=0.0))
    denoiser = new_denoiser("fine", DENOISER_SIZES["fine"], memory, latent_autoencoder)
    rendering = EstimateRendering(denoiser, latent_autoencoder, renderer, memory, *views, num_scenes=1, num_views=12)
    losses, _, _ = joint_losses("fine", memory, latent_autoencoder, config, rendering=rendering)
    found = [
        float(losses.losses_of_estimate([0], torch.tensor([500]), ItemDraws(0, range(1)))["_code_rendering_loss"])
        for _ in range(8)
    ]
    assert found[-1] < found[0]


# Training


@pytest.mark.parametrize("stage", ["coarse", "fine"])
def test_resumed_training_is_equal_to_the_bit(stage, trained, memory, latent_autoencoder, renderer, tmp_path):
    prints = [model_hash(model) for model in (latent_autoencoder, renderer)]
    kept = {name: getattr(memory, name).clone() for name in ("scene_code", "coarse", "fine", "coarse_codes")}
    whole = trained(stage, tmp_path / "whole")
    with pytest.raises(Interrupted):
        trained(stage, tmp_path / "parts", on_progress=interrupt)
    parts = trained(stage, tmp_path / "parts")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    codes = [load_file(tmp_path / name / CODES)[stage] for name in ("whole", "parts")]
    assert torch.equal(*codes) and not torch.equal(codes[0], kept[stage]), "codes move, and the same way"
    assert [model_hash(model) for model in (latent_autoencoder, renderer)] == prints
    assert all(torch.equal(getattr(memory, name), value) for name, value in kept.items()), "the given memory stays"
    plain = trained(stage, tmp_path / "plain", replace(CONFIG, joint=None))
    assert not torch.equal(plain.unet.conv_out.weight, whole.unet.conv_out.weight)
    with pytest.raises(UserInputError, match="joint"):
        trained(stage, tmp_path / "parts", replace(CONFIG, joint=replace(JOINT, prior_mult=1.0)))


def test_f_goes_on_with_the_c_of_c(trained, memory, latent_autoencoder, renderer, tmp_path):
    with pytest.raises(UserInputError, match="train coarse first"):
        with_codes_of_run(memory, tmp_path / "coarse", latent_autoencoder)
    for stage in ("global", "coarse"):
        trained(stage, tmp_path / stage)
    known = with_codes_of_run(memory, tmp_path / "coarse", latent_autoencoder)
    codes = load_file(tmp_path / "coarse" / CODES)["coarse"]
    assert torch.equal(known.coarse, codes) and not torch.equal(codes, memory.coarse)
    expected = latent_autoencoder.quantise_coarse(codes[1].float()).half()
    torch.testing.assert_close(known.coarse_codes[1], expected)
    trained("fine", tmp_path / "fine", known=known)
    assert save_pipeline(tmp_path, renderer, latent_autoencoder) is not None
    fewer = replace(memory, coarse=memory.coarse[:2])
    with pytest.raises(UserInputError, match="other scenes or turns"):
        with_codes_of_run(fewer, tmp_path / "coarse", latent_autoencoder)


def test_settings_that_cannot_be(trained, tmp_path, capsys):
    for config, words in (
        (replace(CONFIG, rendering_mult=0.5), "goes without --rendering-mult"),
        (replace(CONFIG, joint=replace(JOINT, learning_rate=0.0)), "--joint-learning-rate is 0"),
        (replace(CONFIG, joint=replace(JOINT, prior_mult=-1.0)), "--joint-prior-mult is -1"),
        (replace(CONFIG, joint=replace(JOINT, steps=0)), "--joint-steps is 0"),
    ):
        with pytest.raises(UserInputError, match=words):
            trained("coarse", tmp_path / "run", config)
    assert not (tmp_path / "run").exists()
    paths = ["--voxels", "v", "--latent-autoencoder", "l", "--output-dir", "o"]
    for arguments, words in (
        (["--joint-steps", "3"], "--joint-steps is of the codes that --joint optimises"),
        (["--joint", "--joint-steps", "0"], "--joint-steps is 0"),
    ):
        with pytest.raises(SystemExit) as stopped:
            train_diffusion.main(["coarse", *paths, *arguments])
        assert stopped.value.code == 2 and words in capsys.readouterr().err
