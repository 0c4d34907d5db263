"""Distillation to few steps: its algebra, its target where the exact denoiser is known, and a small training."""

from __future__ import annotations

import shutil
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from nfldm_ns.diffusion.distillation import (
    Halving,
    check_teacher,
    ddim_step,
    distillation_loss,
    few_step_sampler,
    matched_contrasts,
    randomly_cooled,
    require_same_latents,
    rounds,
    signal_and_noise,
    step_indices,
    step_timestep,
    two_steps,
    velocity_between,
)
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, load_pipeline
from nfldm_ns.diffusion.training import (
    DiffusionTrainingConfig,
    distil_denoiser,
    make_scheduler,
    save_pipeline,
    train_denoiser,
    training_scheduler,
)
from nfldm_ns.errors import UserInputError
from nfldm_ns.training.schedule import Schedule
from tests.small_models import DENOISER_SIZES, small_pipeline, small_scene_autoencoder

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
    scheduler = few_step_sampler(make_scheduler().config)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == step_timestep(torch.tensor([4, 3, 2, 1]), 4).tolist() == [999, 749, 499, 249]
    assert int(step_timestep(torch.tensor(0), 4)) == -1
    alpha, sigma = signal_and_noise(NOISE, torch.tensor([999, -1]), 2)
    assert alpha.flatten().tolist() == [0, 1] and sigma.flatten().tolist() == [1, 0]
    assert step_indices(torch.tensor([0.0, 0.24, 0.26, 0.999]), 4).tolist() == [1, 1, 2, 4]


def test_a_step_is_that_of_diffusers():
    scheduler = few_step_sampler(make_scheduler().config)
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
    assert errors[-1] < 0.04


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


# Trainings


class AffineStudent(nn.Module):
    """`v = a z + b` with its own a and b at each of the timesteps of four steps, all 0 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.shift = nn.Parameter(torch.zeros(5, 1)), nn.Parameter(torch.zeros(5, 3))

    def forward(self, noisy: Tensor, timestep: Tensor) -> Tensor:
        row = (timestep + 1) // 250
        return self.slope[row] * noisy + self.shift[row]


def test_a_student_learns_to_do_in_four_steps_what_its_teacher_does_in_eight():
    """For normal data both are affine, so that the student can be as exact as its teacher, which four steps are not."""
    torch.manual_seed(0)
    student, teacher = AffineStudent(), GaussianTeacher(0.5)
    halving, optimizer = Halving(teacher, 4), torch.optim.Adam(student.parameters(), lr=0.03)
    losses = []
    for _ in range(400):
        clean, noise = MEAN + 0.5 * torch.randn(64, 3), torch.randn(64, 3)
        index = step_indices(torch.rand(64), 4)
        loss = distillation_loss(student, halving, NOISE, clean, noise, index, {}).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 1e-3 * losses[0]
    noise = torch.randn(32, 3)
    four, eight, learned = sampled(teacher, noise, 4), sampled(teacher, noise, 8), sampled(student, noise, 4)
    assert float((learned - eight).abs().max()) < 0.2 * float((four - eight).abs().max())


@torch.no_grad()
def sampled(denoiser: nn.Module, noise: Tensor, steps: int) -> Tensor:
    """Samples of DDIM."""
    for i in range(steps, 0, -1):
        index = torch.full((len(noise),), i)
        noise = ddim_step(noise, denoiser(noise, step_timestep(index, steps)), *levels(index, steps))
    return noise


def with_tuned_decoders(pipeline: NFLDMPipeline) -> NFLDMPipeline:
    """A generator whose decoders are others than in its trainings, as stored in half precision."""
    for model in (pipeline.latent_autoencoder, pipeline.scene_autoencoder):
        for parameter in model.decoder.parameters():
            parameter.data.add_(0.5)
        for parameter in model.parameters():
            parameter.data.copy_(parameter.half())
    return pipeline


def test_the_teacher_is_of_the_same_latents(latent_autoencoder):
    pipeline = small_pipeline()
    pipeline.latent_autoencoder.load_state_dict(latent_autoencoder.state_dict())
    tuned = with_tuned_decoders(pipeline).latent_autoencoder
    assert not tuned.state_dict().keys() ^ latent_autoencoder.state_dict().keys()
    require_same_latents("mine", tuned, latent_autoencoder)
    next(tuned.coarse_encoder.parameters()).data.add_(0.01)
    with pytest.raises(UserInputError, match="mine samples latents of another stage 2"):
        require_same_latents("mine", tuned, latent_autoencoder)


def test_contrasts_make_up_for_what_distillation_levels():
    student, teacher = small_pipeline(), small_pipeline()
    teacher.register_to_config(contrasts=(1.25, 0.8, 1.5))
    found = matched_contrasts(student, teacher, num_scenes=4)
    assert found == pytest.approx((1.25, 0.8, 1.5), abs=2e-3)
    student.register_to_config(contrasts=(3.0, 3.0, 3.0))
    assert matched_contrasts(student, teacher, num_scenes=4) == found, "whatever it had before"


def test_a_distilled_pipeline_takes_few_steps(memory, latent_autoencoder, tmp_path):
    common, out = (memory, latent_autoencoder), tmp_path / "out"
    short = DiffusionTrainingConfig(schedule=Schedule(max_steps=2, batch_size=2, log_every=1, checkpoint_every=9))
    for stage in ("global", "coarse", "fine"):
        given = (DENOISER_SIZES[stage], short)
        teacher = train_denoiser(stage, *common, tmp_path / "teachers" / stage, *given)
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        if stage == "fine":
            train_denoiser(stage, *common, out / stage, *given)
            with pytest.raises(UserInputError, match="distilled to other numbers of steps"):
                save_pipeline(out, small_scene_autoencoder(), latent_autoencoder)
            shutil.rmtree(out / stage)
        student = distil_denoiser(stage, teacher, *common, out / stage, *given, 4, temperature=0.5)
        assert all(value.equal(before[name]) for name, value in teacher.state_dict().items())
        assert any(not value.equal(before[name]) for name, value in student.state_dict().items())
    assert {f"{stage}{steps}" for stage in ("global", "coarse", "fine") for steps in ("", "-16", "-8")} == {
        path.name for path in out.iterdir()
    }
    teachers = save_pipeline(tmp_path / "teachers", small_scene_autoencoder(), latent_autoencoder)
    assert teachers is not None
    tuned = with_tuned_decoders(load_pipeline(teachers))
    saved = save_pipeline(out, small_scene_autoencoder(), latent_autoencoder, shown_by=tuned)
    assert saved is not None
    pipeline = load_pipeline(saved)
    for name in ("scene_autoencoder", "latent_autoencoder"):
        state = getattr(tuned, name).state_dict()
        assert all(value.equal(state[key]) for key, value in getattr(pipeline, name).state_dict().items()), name
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert pipeline.default_steps == 4
    assert pipeline.config.contrasts == pytest.approx(matched_contrasts(pipeline, tuned), rel=0.01)
    calls: list[str] = []
    pipeline.set_progress_bar_config(disable=True)
    pipeline(1, torch.Generator().manual_seed(0), callback_on_step_end=lambda p, *_: calls.append(p.stage) or {})
    assert calls == ["global"] * 4 + ["coarse"] * 4 + ["fine"] * 4
