"""Distillation to few steps: its algebra, its target where the exact denoiser is known, and a small training."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from nfldm_ns.diffusion.distillation import (
    DEFAULT_STEPS,
    Halving,
    check_teacher,
    ddim_step,
    few_step_sampler,
    randomly_cooled,
    rounds,
    signal_and_noise,
    step_indices,
    step_timestep,
    two_steps,
    velocity_between,
)
from nfldm_ns.diffusion.latent_memory import encode_latents
from nfldm_ns.diffusion.pipeline import load_pipeline
from nfldm_ns.diffusion.training import (
    DiffusionTrainingConfig,
    distil_denoiser,
    make_scheduler,
    save_pipeline,
    train_denoiser,
    training_scheduler,
)
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.voxel_store import encode_collection
from nfldm_ns.training.schedule import Schedule
from tests.small_models import DENOISER_SIZES, small_latent_autoencoder, small_scene_autoencoder
from tests.synthetic import make_box_room_collection

NOISE = training_scheduler(DiffusionTrainingConfig())
MEAN = torch.tensor([0.7, -0.4, 0.1])


class GaussianTeacher(nn.Module):
    """The exact v of data of a normal distribution with the mean `MEAN` and one standard deviation."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, noisy: Tensor, timestep: Tensor) -> Tensor:
        alpha, sigma = signal_and_noise(NOISE, timestep, noisy.ndim)
        variance = alpha**2 * self.std**2 + sigma**2
        clean = MEAN + alpha * self.std**2 / variance * (noisy - alpha * MEAN)
        noise = sigma / variance * (noisy - alpha * MEAN)
        return alpha * noise - sigma * clean

    def exact(self, noisy: Tensor, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]) -> Tensor:
        """Where the probability flow goes: normal distributions keep their quantiles."""
        before, after = (((alpha * self.std) ** 2 + sigma**2).sqrt() for alpha, sigma in (start, end))
        return end[0] * MEAN + after / before * (noisy - start[0] * MEAN)


def levels(index: Tensor, steps: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    start, end = (signal_and_noise(NOISE, step_timestep(index - i, steps), 2) for i in range(2))
    return start, end


def test_steps_lie_where_ddim_samples():
    scheduler = few_step_sampler(make_scheduler().config, 4)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == step_timestep(torch.tensor([4, 3, 2, 1]), 4).tolist() == [999, 749, 499, 249]
    assert int(step_timestep(torch.tensor(0), 4)) == -1
    alpha, sigma = signal_and_noise(NOISE, torch.tensor([999, -1]), 2)
    assert alpha.flatten().tolist() == [0, 1] and sigma.flatten().tolist() == [1, 0]
    assert step_indices(torch.tensor([0.0, 0.24, 0.26, 0.999]), 4).tolist() == [1, 1, 2, 4]


def test_a_step_is_that_of_diffusers():
    scheduler = few_step_sampler(make_scheduler().config, 4)
    scheduler.set_timesteps(4)
    sample, velocity = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.full((2, 3), 0.3)
    for index in (4, 3, 2, 1):
        timestep = step_timestep(torch.tensor([index, index]), 4)
        expected = scheduler.step(velocity, int(timestep[0]), sample).prev_sample
        start, end = levels(torch.tensor([index, index]), 4)
        reached = ddim_step(sample, velocity, start, end)
        torch.testing.assert_close(reached, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(velocity_between(sample, reached, start, end), velocity, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_one_step_of_the_target_is_two_of_the_teacher(steps):
    teacher = GaussianTeacher(0.5)
    index = step_indices(torch.linspace(0, 0.999, 8), steps)
    noisy = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    target = two_steps(Halving(teacher, steps), NOISE, noisy, index, {})
    start, end = levels(index, steps)
    middle, _ = levels(2 * index - 1, 2 * steps)
    halfway = ddim_step(noisy, teacher(noisy, step_timestep(2 * index, 2 * steps)), start, middle)
    expected = ddim_step(halfway, teacher(halfway, step_timestep(2 * index - 1, 2 * steps)), middle, end)
    torch.testing.assert_close(ddim_step(noisy, target, start, end), expected, atol=1e-5, rtol=1e-4)


def test_the_target_is_the_exact_solution_of_gaussian_data():
    """Exactly for data that is one point, for others the better the shorter the steps."""
    index, generator = torch.tensor([1, 1]), torch.Generator().manual_seed(0)
    point, noisy = GaussianTeacher(0.0), torch.randn(2, 3, generator=generator)
    for i in (1, 2, 4):
        start, _ = levels(i * index, 4)
        target = two_steps(Halving(point, 4), NOISE, start[0] * MEAN + start[1] * noisy, i * index, {})
        torch.testing.assert_close(target, start[0] * noisy - start[1] * MEAN, atol=1e-4, rtol=1e-3)
    teacher, errors = GaussianTeacher(0.5), []
    for steps in (4, 8, 16, 32):
        sample = noisy
        for i in range(steps, 0, -1):
            start, end = levels(i * index, steps)
            sample = ddim_step(sample, two_steps(Halving(teacher, steps), NOISE, sample, i * index, {}), start, end)
        errors.append(float((sample - teacher.exact(noisy, *_ends())).abs().max()))
    assert all(after < 0.75 * before for before, after in pairwise(errors)), errors
    assert errors[-1] < 0.02


def _ends() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    start = signal_and_noise(NOISE, torch.tensor([999]), 2)
    return start, signal_and_noise(NOISE, torch.tensor([-1]), 2)


def test_noise_is_cooled_between_the_temperature_and_1():
    noise = torch.ones(3, 2)
    assert randomly_cooled(noise, 0.4, torch.tensor([0.0, 0.5, 1.0]))[:, 0].tolist() == pytest.approx([1.0, 0.7, 0.4])
    assert randomly_cooled(noise, 1.0, torch.rand(3)).equal(noise)


def test_rounds_halve_the_steps():
    assert rounds(4) == [16, 8, 4]
    assert rounds(1) == [16, 8, 4, 2, 1]
    assert rounds(20) == [20]
    for steps in (3, 0, -4):
        with pytest.raises(UserInputError, match="must divide 1000"):
            rounds(steps)


def test_other_teachers_are_refused():
    check_teacher("mine", make_scheduler().config)
    for scheduler in (make_scheduler("sample"), make_scheduler(zero_terminal_snr=False)):
        with pytest.raises(UserInputError, match="Only denoisers that predict v"):
            check_teacher("mine", scheduler.config)


# A training


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    collection = make_box_room_collection(root / "rooms", num_train=3, num_test=1)
    store = encode_collection(collection, small_scene_autoencoder(), root / "voxels")
    latent_autoencoder = small_latent_autoencoder()
    return latent_autoencoder, encode_latents(store, latent_autoencoder, store.splits["train"])


def training(steps: int) -> DiffusionTrainingConfig:
    schedule = Schedule(max_steps=steps, batch_size=4, log_every=10, checkpoint_every=1000, learning_rate=3e-3)
    return DiffusionTrainingConfig(schedule=schedule, ema_decay=0.9)


def error_of(student: nn.Module, halving: Halving) -> float:
    """Mean squared error of a student's v of noise alone, against its teacher's two steps."""
    noisy = torch.randn(64, *student.sample_shape, generator=torch.Generator().manual_seed(3))
    index = torch.full((64,), halving.steps)
    target = two_steps(halving, NOISE, noisy, index, {})
    with torch.no_grad():
        return float((student(noisy, step_timestep(index, halving.steps)) - target).square().mean())


def test_a_round_lowers_the_error_and_the_pipeline_takes_few_steps(parts, tmp_path):
    latent_autoencoder, memory = parts
    sizes = {**DENOISER_SIZES["global"], "width": 32}
    teacher = train_denoiser("global", memory, latent_autoencoder, tmp_path / "teacher", sizes, training(150))
    common = (memory, latent_autoencoder)
    student = distil_denoiser("global", teacher, *common, tmp_path / "out" / "global", sizes, training(120), 4)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["global", "global-16", "global-8"]
    before = load_round(tmp_path / "out" / "global-8")
    halving = Halving(before, 4)
    assert error_of(student, halving) < 0.7 * error_of(before, halving)
    for stage in ("coarse", "fine"):
        short = replace(training(1), schedule=replace(training(1).schedule, max_steps=1))
        of_stage = DENOISER_SIZES[stage]
        known = train_denoiser(stage, *common, tmp_path / f"teacher_{stage}", of_stage, short)
        if stage == "fine":
            unfinished = train_denoiser(stage, *common, tmp_path / "out" / "fine", of_stage, short)
            assert unfinished is not None
            with pytest.raises(UserInputError, match="distilled to other numbers of steps"):
                save_pipeline(tmp_path / "out", small_scene_autoencoder(), latent_autoencoder)
            for path in sorted((tmp_path / "out" / "fine").rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        distil_denoiser(stage, known, *common, tmp_path / "out" / stage, of_stage, short, 4)
    saved = save_pipeline(tmp_path / "out", small_scene_autoencoder(), latent_autoencoder)
    assert saved is not None
    pipeline = load_pipeline(saved)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert pipeline.scheduler.config[DEFAULT_STEPS] == pipeline.default_steps == 4
    calls: list[str] = []
    pipeline.set_progress_bar_config(disable=True)
    pipeline(1, torch.Generator().manual_seed(0), callback_on_step_end=lambda p, *_: calls.append(p.stage) or {})
    assert calls == ["global"] * 4 + ["coarse"] * 4 + ["fine"] * 4


def load_round(folder):
    from nfldm_ns.diffusion.training import load_denoiser

    return load_denoiser(folder).requires_grad_(False)
