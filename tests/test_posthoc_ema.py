"""Averages whose length is chosen after the training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nfldm_ns.diffusion.training import DiffusionTrainingConfig, train_denoiser
from nfldm_ns.errors import UserInputError
from nfldm_ns.training.identity import model_hash
from nfldm_ns.training.posthoc_ema import (
    LONGEST,
    PowerAverages,
    check_profiles,
    inner_product,
    power_of,
    relative_length,
    solve_weights,
    synthesise,
)
from nfldm_ns.training.schedule import Schedule
from tests.interruption import Interrupted, interrupt
from tests.small_models import DENOISER_SIZES

LENGTHS = (0.05, 0.10)
SCHEDULE = Schedule(
    max_steps=6, batch_size=2, log_every=2, checkpoint_every=3, ema_profiles=LENGTHS, ema_snapshot_every=2
)
TRAINING = DiffusionTrainingConfig(schedule=SCHEDULE)


class _Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(3, dtype=torch.float64))


def walk(steps, lengths, trajectory, folder=None, every=0):
    """Averages of weights that go where a function of the step says."""
    model = _Weights()
    averages = PowerAverages(model, lengths)
    for step in range(1, steps + 1):
        model.value.data = trajectory(step)
        averages.step(model, step)
        if folder is not None and step % every == 0:
            averages.save_snapshot(folder, step)
    return averages


def meander(step):
    """A curved way with some noise, the same each time."""
    noise = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    return torch.tensor([np.log(step), np.sin(step / 150), step**0.5 / 10]) + 0.1 * noise


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.25])
def test_lengths_and_powers_are_inverses(length):
    assert relative_length(power_of(length)) == pytest.approx(length)


def test_powers_are_those_of_the_paper():
    assert power_of(0.05) == pytest.approx(16.97, abs=0.01) and power_of(0.10) == pytest.approx(6.94, abs=0.01)
    assert relative_length(0) == pytest.approx(LONGEST)


@pytest.mark.parametrize("length", [0.03, 0.1, 0.2])
def test_averages_of_a_straight_way_are_known(length):
    """theta = a + b t: the mean of the density of tau is t (gamma + 1) / (gamma + 2)."""
    start, speed = torch.tensor([1.0, -2.0, 0.0]).double(), torch.tensor([0.5, 0.1, -1.0]).double()
    steps, gamma = 400, power_of(length)
    found = walk(steps, [length], lambda t: start + speed * t).averages[0]["value"]
    times = torch.arange(1, steps + 1).double()
    shares = (times / steps) ** (gamma + 1) - ((times - 1) / steps) ** (gamma + 1)
    torch.testing.assert_close(found, start + speed * (shares * times).sum())
    continuous = start + speed * steps * (gamma + 1) / (gamma + 2)
    torch.testing.assert_close(found, continuous, atol=0.51 * float(speed.abs().max()), rtol=0)


def test_inner_products_are_the_integrals():
    time = np.linspace(0, 100, 200_001)[1:]

    def density(t, gamma):
        return np.where(time <= t, (gamma + 1) / t * (time / t) ** gamma, 0)

    for (t_a, gamma_a), (t_b, gamma_b) in (((40, 3.0), (100, 8.0)), ((100, 3.0), (40, 8.0)), ((70, 5.0), (70, 5.0))):
        numeric = float((density(t_a, gamma_a) * density(t_b, gamma_b)).sum() * (time[1] - time[0]))
        assert inner_product(*map(np.float64, (t_a, gamma_a, t_b, gamma_b))) == pytest.approx(numeric, rel=1e-3)


def test_a_profile_that_was_kept_comes_back(tmp_path):
    averages = walk(800, LENGTHS, meander, tmp_path, every=100)
    for length, average in zip(LENGTHS, averages.averages, strict=True):
        torch.testing.assert_close(synthesise(tmp_path, length)["value"].double(), average["value"], atol=1e-6, rtol=0)
    weights = solve_weights([400, 400, 800, 800], [17.0, 7.0, 17.0, 7.0], 800, 7.0)
    np.testing.assert_allclose(weights, [0, 0, 0, 1], atol=1e-8)


@pytest.mark.parametrize("length", [0.04, 0.07, 0.13])
def test_other_profiles_are_close_to_those_kept_directly(length, tmp_path):
    averages = walk(800, LENGTHS, meander, tmp_path, every=50)
    direct = walk(800, [length], meander).averages[0]["value"]
    error = (synthesise(tmp_path, length)["value"] - direct).abs().max()
    assert float(error) < 0.1 * float((averages.averages[0]["value"] - averages.averages[1]["value"]).abs().max())


# In trainings


@pytest.fixture(scope="module")
def trained_on(memory, latent_autoencoder):
    return memory, latent_autoencoder


def train(trained_on, folder, config=TRAINING, on_progress=lambda share, losses: None):
    return train_denoiser("global", *trained_on, folder, DENOISER_SIZES["global"], config, on_progress=on_progress)


def snapshots(folder):
    return {path.name: load_file(path) for path in sorted(folder.glob("ema-*.safetensors"))}


def test_snapshots_of_a_resumed_training_are_equal_to_the_bit(trained_on, tmp_path):
    whole = train(trained_on, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(trained_on, tmp_path / "parts", on_progress=interrupt)
    later = tmp_path / "parts" / "ema-00000005.safetensors"
    later.write_bytes(b"of steps after the checkpoint")
    assert model_hash(train(trained_on, tmp_path / "parts")) == model_hash(whole)
    expected, found = snapshots(tmp_path / "whole"), snapshots(tmp_path / "parts")
    assert list(found) == list(expected) == [f"ema-{step:08d}.safetensors" for step in (2, 4, 6)]
    assert all(torch.equal(value, found[name][key]) for name in expected for key, value in expected[name].items())


def test_averages_leave_the_training_as_it_is(trained_on, tmp_path):
    plain = replace(TRAINING, schedule=replace(SCHEDULE, ema_profiles=(), ema_snapshot_every=0))
    assert model_hash(train(trained_on, tmp_path / "plain", plain)) == model_hash(train(trained_on, tmp_path / "kept"))
    assert not snapshots(tmp_path / "plain")
    with pytest.raises(UserInputError, match="ema_profiles"):
        train(trained_on, tmp_path / "plain")


def test_the_length_is_chosen_after_the_training(trained_on, tmp_path):
    first = model_hash(train(trained_on, tmp_path))
    other = train(trained_on, tmp_path, replace(TRAINING, ema_length=0.08))
    assert model_hash(other) != first
    expected = synthesise(tmp_path, 0.08)
    written = load_file(tmp_path / "denoiser" / "diffusion_pytorch_model.safetensors")
    assert expected.keys() == dict(other.named_parameters()).keys()
    assert all(torch.equal(value, written[name]) for name, value in expected.items())
    kept = train(trained_on, tmp_path, replace(TRAINING, ema_length=0.05))
    last = snapshots(tmp_path)["ema-00000006.safetensors"]
    for name, value in kept.named_parameters():
        torch.testing.assert_close(value, last[f"0.{name}"], atol=1e-5, rtol=1e-4)
    assert model_hash(train(trained_on, tmp_path)) == first, "and may be given up again"


@pytest.mark.parametrize(
    ("lengths", "every", "message"),
    [
        ((0.05, 0.3), 0, "--ema-profiles has 0.3, but relative lengths are above 0 and below 0.289"),
        ((float("nan"),), 0, "--ema-profiles has nan"),
        ((0.1, 0.1), 0, "names a length twice"),
        ((0.1,), -1, "--ema-snapshot-every is -1"),
        ((), 5, "add --ema-profiles"),
    ],
)
def test_profiles_that_cannot_be_are_refused(lengths, every, message):
    with pytest.raises(UserInputError, match=message):
        check_profiles(lengths, every)


def test_lengths_without_snapshots_are_refused(trained_on, tmp_path):
    plain = replace(TRAINING, schedule=replace(SCHEDULE, ema_profiles=(), ema_snapshot_every=0), ema_length=0.1)
    with pytest.raises(UserInputError, match="add the --ema-profiles"):
        train(trained_on, tmp_path / "run", plain)
    with pytest.raises(UserInputError, match="--ema-length has 0.5"):
        train(trained_on, tmp_path / "run", replace(TRAINING, ema_length=0.5))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserInputError, match="has no snapshots"):
        synthesise(tmp_path, 0.1)
    walk(4, LENGTHS, meander, tmp_path, every=2)
    path = tmp_path / "ema-00000004.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserInputError, match="ema-00000004.safetensors cannot be used .*: delete it"):
        synthesise(tmp_path, 0.1)
