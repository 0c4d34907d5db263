"""Distillation to few steps: what a solver's long steps get wrong is learned, and a small training."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

from nfldm_ns.commands import sample
from nfldm_ns.commands.train_diffusion import TrainDiffusion
from nfldm_ns.diffusion.distillation import (
    Shortening,
    check_distillable,
    matched_contrasts,
    randomly_cooled,
    require_same_latents,
)
from nfldm_ns.diffusion.flow import make_flow_scheduler
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, load_pipeline
from nfldm_ns.diffusion.solver import draws_noise, sample_latents
from nfldm_ns.diffusion.training import (
    DiffusionTrainingConfig,
    kind_of_sampler,
    make_scheduler,
    save_pipeline,
    signal_and_noise,
    train_denoiser,
    training_scheduler,
)
from nfldm_ns.errors import UserInputError
from nfldm_ns.training.schedule import Schedule
from tests.small_models import DENOISER_SIZES, small_pipeline, small_scene_autoencoder

NOISE = training_scheduler(DiffusionTrainingConfig())
MEAN = torch.tensor([0.7, -0.4, 0.1])
STD = 0.5


def solver(**settings: object) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler.from_config(make_scheduler().config, **settings)


class GaussianTeacher(nn.Module):
    """The exact v of data of a normal distribution with the mean `MEAN` and the standard deviation `STD`."""

    def forward(self, noisy: Tensor, timestep: Tensor) -> Tensor:
        alpha, sigma = (part[:, None] for part in signal_and_noise(NOISE, timestep))
        variance = alpha**2 * STD**2 + sigma**2
        clean = MEAN + alpha * STD**2 / variance * (noisy - alpha * MEAN)
        noise = sigma / variance * (noisy - alpha * MEAN)
        return alpha * noise - sigma * clean


class AffineStudent(nn.Module):
    """`v = a z + b` with its own a and b at each of the timesteps of four steps, all 0 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.shift = nn.Parameter(torch.zeros(5, 1)), nn.Parameter(torch.zeros(5, 3))

    def forward(self, noisy: Tensor, timestep: Tensor) -> Tensor:
        row = (timestep + 1) // 250
        return self.slope[row] * noisy + self.shift[row]


def test_long_steps_stop_short_of_the_exact_samples():
    """Normal data keep their quantiles: from noise z to `MEAN + STD z`."""
    noise = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    exact, errors = MEAN + STD * noise, []
    for steps in (2, 4, 12, 40):
        sampled = sample_latents(GaussianTeacher(), solver(), noise, steps)
        errors.append(float((sampled - exact).abs().max()))
    assert errors == sorted(errors, reverse=True) and errors[1] > 0.05 > 0.01 > errors[3], errors


@pytest.mark.parametrize("scheduler", [solver(), make_scheduler(), DDIMScheduler.from_config(make_scheduler().config)])
def test_a_student_learns_to_do_in_four_steps_what_its_teacher_does_in_more(scheduler):
    """For normal data both are affine, so that the student can be as exact as its teacher, which four steps are not."""
    torch.manual_seed(0)
    student, shortening = AffineStudent(), Shortening(GaussianTeacher(), scheduler, 20, 4)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    for step in range(200):
        loss = shortening.error(student, torch.randn(64, 3), {}).mean()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:  # every step of the student learns
            assert (student.shift.grad.abs().sum(1) > 0).tolist() == [False, True, True, True, True]
        optimizer.step()
    noise = torch.randn(32, 3)
    wanted, learned = shortening.sample(shortening.teacher, noise, 20, {}), shortening.sample(student, noise, 4, {})
    four = shortening.sample(shortening.teacher, noise, 4, {})
    assert float((learned - wanted).detach().abs().max()) < 0.1 * float((four - wanted).abs().max())


def test_noise_is_cooled_between_the_temperature_and_1():
    noise = torch.ones(3, 2)
    assert randomly_cooled(noise, 0.4, torch.tensor([0.0, 0.5, 1.0]))[:, 0].tolist() == pytest.approx([1.0, 0.7, 0.4])
    assert randomly_cooled(noise, 1.0, torch.rand(3)).equal(noise)


def test_solvers_that_draw_noise_are_told_from_others():
    config = make_scheduler().config
    before = torch.random.get_rng_state()
    kinds: list[SchedulerMixin] = [
        solver(),
        make_scheduler(),
        DDIMScheduler.from_config(config),
        make_flow_scheduler(),
        DDPMScheduler.from_config(config),
        EulerAncestralDiscreteScheduler.from_config(config),
        DPMSolverMultistepScheduler.from_config(config, algorithm_type="sde-dpmsolver++"),
    ]
    assert [draws_noise(kind) for kind in kinds] == [False] * 4 + [True] * 3
    assert torch.random.get_rng_state().equal(before)


def test_what_cannot_be_distilled_is_refused(tmp_path):
    pipeline = small_pipeline()
    check_distillable("mine", pipeline, pipeline.default_steps - 1)
    for steps in (0, pipeline.default_steps):
        with pytest.raises(UserInputError, match=f"mine takes {pipeline.default_steps} steps: give fewer"):
            check_distillable("mine", pipeline, steps)
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(UserInputError, match="EulerAncestralDiscreteScheduler, which draws noise"):
        check_distillable("mine", pipeline, 4)
    with pytest.raises(UserInputError, match="leave out --zero-terminal-snr, --condition"):
        command(tmp_path, zero_terminal_snr=False, condition="bev").run()
    with pytest.raises(UserInputError, match="leave out --initial-weights"):
        command(tmp_path, initial_weights=tmp_path).run()


def command(folder, **options) -> TrainDiffusion:
    needed = {"voxels": folder, "latent_autoencoder": folder, "output_dir": folder / "out", "distil": folder / "mine"}
    return TrainDiffusion("all", **{**needed, **options})


def test_a_training_is_of_the_kind_that_a_scheduler_samples():
    kinds = [make_scheduler(), make_scheduler("epsilon", False), make_flow_scheduler()]
    assert [tuple(kind_of_sampler(kind).values()) for kind in kinds] == [
        ("v_prediction", True),
        ("epsilon", False),
        ("flow", True),
    ]


def test_scenes_are_sampled_with_other_steps_of_each_latent(tmp_path, capsys):
    small_pipeline().save_pretrained(tmp_path / "mine")
    options = [str(tmp_path / "mine"), "--num-scenes", "1", "--output-dir", str(tmp_path / "out"), "--device", "cpu"]
    sample.main([*options, "--num-inference-steps", "3", "1", "2"])
    scene = json.loads((tmp_path / "out" / "scene_000000" / "scene.json").read_text())
    assert [3, 1, 2] in scene["provenance"].values()
    with pytest.raises(SystemExit):
        sample.main([*options, "--num-inference-steps", "3", "0", "2"])
    assert "--num-inference-steps is 0, but must be at least 1" in capsys.readouterr().err


# Trainings


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


def test_a_distilled_pipeline_takes_few_steps(memory, latent_autoencoder, tmp_path, monkeypatch):
    monkeypatch.setattr("nfldm_ns.diffusion.training.matched_contrasts", partial(matched_contrasts, num_scenes=3))
    common, out = (memory, latent_autoencoder), tmp_path / "out"
    short = DiffusionTrainingConfig(schedule=Schedule(max_steps=2, batch_size=2, log_every=1, checkpoint_every=9))
    for stage in ("global", "coarse", "fine"):
        train_denoiser(stage, *common, tmp_path / "teachers" / stage, DENOISER_SIZES[stage], short)
    teachers = save_pipeline(tmp_path / "teachers", small_scene_autoencoder(), latent_autoencoder)
    assert teachers is not None
    tuned = with_tuned_decoders(load_pipeline(teachers))
    tuned.register_to_config(default_steps=6)
    tuned.scheduler = UniPCMultistepScheduler.from_config(tuned.scheduler.config)

    def distilled(stage: str, steps: int = 4, folder: str = "out") -> NFLDMPipeline:
        teacher = getattr(tuned, f"{stage}_denoiser")
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        shortening = Shortening.of(tuned, stage, steps)
        student = train_denoiser(stage, *common, tmp_path / folder / stage, {}, short, shortening=shortening)
        assert all(value.equal(before[name]) for name, value in teacher.state_dict().items())
        assert any(not value.equal(before[name]) for name, value in student.state_dict().items())
        saved = save_pipeline(tmp_path / folder, small_scene_autoencoder(), latent_autoencoder, teacher=tuned)
        assert saved == tmp_path / folder / "pipeline"
        return load_pipeline(saved)

    pipeline = distilled("global")
    for name in ("scene_autoencoder", "latent_autoencoder", "coarse_denoiser", "fine_denoiser"):  # as they were
        state = getattr(tuned, name).state_dict()
        assert all(value.equal(state[key]) for key, value in getattr(pipeline, name).state_dict().items()), name
    assert isinstance(pipeline.scheduler, UniPCMultistepScheduler) and pipeline.default_steps == 4
    assert pipeline.config.contrasts == pytest.approx(matched_contrasts(pipeline, tuned, num_scenes=3), rel=0.01)
    pipeline = distilled("coarse")
    state = tuned.coarse_denoiser.state_dict()
    assert any(not value.equal(state[key]) for key, value in pipeline.coarse_denoiser.state_dict().items())
    calls: list[str] = []
    pipeline.set_progress_bar_config(disable=True)
    pipeline(1, torch.Generator().manual_seed(0), callback_on_step_end=lambda p, *_: calls.append(p.stage) or {})
    assert calls == ["global"] * 4 + ["coarse"] * 4 + ["fine"] * 4
    other = NFLDMPipeline(**{**tuned.components, "global_denoiser": small_pipeline().global_denoiser})
    with pytest.raises(UserInputError, match="distilled from another generator"):
        save_pipeline(out, small_scene_autoencoder(), latent_autoencoder, teacher=other)
    with pytest.raises(UserInputError, match="distilled to other numbers of steps"):
        distilled("fine", steps=2)
    train_denoiser("global", *common, tmp_path / "plain/global", DENOISER_SIZES["global"], short)
    with pytest.raises(UserInputError, match="or not at all"):
        distilled("coarse", folder="plain")
    with pytest.raises(ValueError, match="4 steps are not fewer"):
        train_denoiser(
            "global", *common, out / "x", {}, short, shortening=Shortening(tuned.global_denoiser, solver(), 4, 4)
        )


def test_distilled_denoisers_make_no_generator_without_their_teacher(memory, latent_autoencoder, tmp_path):
    short = DiffusionTrainingConfig(schedule=Schedule(max_steps=1, batch_size=2))
    tuned = small_pipeline()
    for stage in ("global", "coarse", "fine"):
        teacher = train_denoiser(
            stage, memory, latent_autoencoder, tmp_path / "t" / stage, DENOISER_SIZES[stage], short
        )
        shortening = Shortening(teacher, tuned.scheduler, 6, 2)
        train_denoiser(stage, memory, latent_autoencoder, tmp_path / "s" / stage, {}, short, shortening=shortening)
    with pytest.raises(UserInputError, match="repeat the command that distilled them, with --distil"):
        save_pipeline(tmp_path / "s", small_scene_autoencoder(), latent_autoencoder)
