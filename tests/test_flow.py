"""Stage 3 as a rectified flow."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import nn

from nfldm_ns.commands import train_diffusion
from nfldm_ns.diffusion.call_checks import check_sampled
from nfldm_ns.diffusion.flow import FlowNoise, make_flow_scheduler, prediction_type_of
from nfldm_ns.diffusion.inpainting import Inpainting, NoiseLevels
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, load_pipeline, scene_generators
from nfldm_ns.diffusion.solver import sample_latents
from nfldm_ns.diffusion.training import (
    STAGES,
    DiffusionLosses,
    DiffusionTrainingConfig,
    evaluate_denoiser,
    held_out_errors,
    make_scheduler,
    save_pipeline,
    train_denoiser,
    training_noise,
    velocity_errors,
)
from nfldm_ns.diffusion.validation import DenoiserPictures
from nfldm_ns.errors import UserInputError
from nfldm_ns.training.draws import ItemDraws
from nfldm_ns.training.identity import own_config
from nfldm_ns.training.schedule import Schedule
from tests.interruption import Interrupted, interrupt
from tests.small_models import DENOISER_SIZES, small_pipeline, small_scene_autoencoder

FLOW = DiffusionTrainingConfig(
    schedule=Schedule(max_steps=6, batch_size=2, log_every=2, checkpoint_every=3), prediction_type="flow"
)
SAMPLERS = [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler]


def train(stage, memory, latent_autoencoder, folder, config=FLOW, **kwargs):
    progress = kwargs.pop("on_progress", lambda share, losses: None)
    sizes = DENOISER_SIZES[stage]
    return train_denoiser(stage, memory, latent_autoencoder, folder, sizes, config, on_progress=progress, **kwargs)


def lively_pipeline(**kwargs) -> NFLDMPipeline:
    torch.manual_seed(0)
    pipeline = small_pipeline(flow=True, **kwargs)
    for name in ("coarse_denoiser", "fine_denoiser"):
        torch.nn.init.normal_(getattr(pipeline, name).unet.conv_out.weight, std=0.1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Sampling


class IdealFlow(nn.Module):
    """E[eps - x_0 | x_t] of a Gaussian: both expectations are linear in x_t."""

    def __init__(self, mean: float = 0.5, std: float = 2.0) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.seen: list[float] = []

    def forward(self, sample, timestep):
        time = timestep[:, None] / 1000
        self.seen += timestep.unique().tolist()
        centred = sample - (1 - time) * self.mean
        variance = ((1 - time) * self.std) ** 2 + time**2
        clean = self.mean + (1 - time) * self.std**2 / variance * centred
        return time / variance * centred - clean


@pytest.mark.parametrize(("sampler", "steps"), [(SAMPLERS[0], 200), (SAMPLERS[1], 40)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampling_the_ideal_flow_gives_its_distribution(sampler, steps, shift):
    pipeline, flow = small_pipeline(flow=True), IdealFlow()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = sampler.from_config(make_flow_scheduler(shift).config)
    noise = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    sampled = pipeline.denoise(flow, noise, steps)
    assert max(flow.seen) == 1000, "sampling begins at pure noise"
    assert float(sampled.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(sampled.std()) == pytest.approx(2.0, abs=0.08)
    torch.testing.assert_close(sample_latents(flow, pipeline.scheduler, noise, steps), sampled)
    cold = pipeline.denoise(flow, 0 * noise, steps)
    torch.testing.assert_close(cold, torch.full_like(cold, 0.5), atol=0.03, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_saved_and_loaded_flows_sample_the_same(sampler, tmp_path):
    pipeline = lively_pipeline()
    pipeline.scheduler = sampler.from_config(make_flow_scheduler(2.0).config)
    expected = pipeline(2, scene_generators(5, 2), num_inference_steps=3)
    pipeline.save_pretrained(tmp_path)
    for loaded in (load_pipeline(tmp_path), NFLDMPipeline.from_pretrained(tmp_path)):
        assert type(loaded.scheduler) is sampler and loaded.scheduler.config.shift == 2
        assert loaded.coarse_denoiser.config.flow and prediction_type_of(loaded.scheduler) == "flow"
        output = loaded(2, scene_generators(5, 2), num_inference_steps=3)
        assert torch.equal(output.grids.density, expected.grids.density)
        assert torch.equal(output.cameras.camera_to_worlds, expected.cameras.camera_to_worlds)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_calls_know_noise_temperatures_guidance_and_callbacks(sampler):
    pipeline = lively_pipeline()
    pipeline.scheduler = sampler.from_config(pipeline.scheduler.config)
    for denoiser in (pipeline.coarse_denoiser, pipeline.fine_denoiser):
        denoiser.register_to_config(condition_dropout=0.1)
    seen = []

    def callback(pipeline, step, timestep, values):
        seen.append((pipeline.stage, timestep))
        return {}

    call = {"num_inference_steps": 3, "callback_on_step_end": callback}
    plain = pipeline(1, scene_generators(1, 1), **call)
    assert len(seen) == 3 * len(pipeline.scheduler.timesteps) and seen[0] == ("global", 1000)
    noise = pipeline.draw_noise(1, scene_generators(1, 1))
    given = pipeline(1, noise=noise, num_inference_steps=3)
    assert torch.equal(given.latents.fine, plain.latents.fine)
    cold = pipeline(1, scene_generators(1, 1), num_inference_steps=3, temperatures=(1, 1, 0))
    assert torch.equal(cold.latents.coarse, plain.latents.coarse)
    assert float(cold.latents.fine.std()) < float(plain.latents.fine.std())
    guided = pipeline(1, scene_generators(1, 1), num_inference_steps=3, guidance_scale=3.0)
    assert not torch.allclose(guided.latents.coarse, plain.latents.coarse)
    half = pipeline.to(torch.bfloat16)(1, scene_generators(1, 1), num_inference_steps=3)
    assert bool(half.grids.density.isfinite().all())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_levels_are_those_of_the_schedulers_own_noise(sampler):
    scheduler = sampler.from_config(make_flow_scheduler(1.5).config)
    scheduler.set_timesteps(6)
    levels = NoiseLevels.of(scheduler)
    assert scheduler.step_index is None, "looking at the levels does not move the scheduler"
    torch.testing.assert_close(levels.noise[:-1], scheduler.sigmas[:-1])
    assert (float(levels.signal[-1]), float(levels.noise[-1])) == (1, 0)
    clean, first, second = torch.randn(3, 200_000)
    scheduler.set_begin_index(2)
    torch.testing.assert_close(levels.add(clean, first, 2), scheduler.scale_noise(clean, levels.noise[2:3], first))
    noisy, expected = levels.back(levels.add(clean, first, 4), second, 4, 1), levels.add(clean, first, 1)
    torch.testing.assert_close(noisy.std(), expected.std(), atol=0, rtol=0.02)
    torch.testing.assert_close((noisy * clean).mean(), (expected * clean).mean(), atol=0.03, rtol=0.02)


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inpainting_keeps_what_is_not_sampled(sampler, strength):
    pipeline = lively_pipeline()
    pipeline.scheduler = sampler.from_config(pipeline.scheduler.config)
    scene = pipeline(1, scene_generators(1, 1), num_inference_steps=4)
    code = torch.cat([scene.latents.global_latent, torch.zeros(1, 10)], dim=1)
    coarse_region = torch.zeros(4, 4, dtype=torch.bool)
    coarse_region[:2, :3] = True
    fine_region = coarse_region.repeat_interleave(4, 0).repeat_interleave(4, 1)
    inpainting = Inpainting(scene.latents, coarse_region, fine_region, strength, resamplings=2, jump_length=2)
    call = {"num_inference_steps": 4, "scene_code": code, "inpainting": inpainting}
    edited = pipeline(1, scene_generators(5, 1), **call).latents
    for old, new, region in (
        (scene.latents.coarse, edited.coarse, coarse_region),
        (scene.latents.fine, edited.fine, fine_region),
    ):
        assert torch.equal(old[..., ~region], new[..., ~region])
        assert bool((old[..., region] != new[..., region]).all()) and bool(new.isfinite().all())
        assert float(new.abs().max()) < 2 * float(old.abs().max())


# Training


class _Watcher(nn.Module):
    """Stands for a denoiser: predicts zeros, and remembers what it saw."""

    def forward(self, sample, timestep, **conditions):
        self.sample, self.timestep = sample, timestep
        return torch.zeros_like(sample)


@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_straight_from_data_to_noise(stage, memory, latent_autoencoder, tmp_path):
    denoiser = train(stage, memory, latent_autoencoder, tmp_path)
    assert denoiser.config.flow
    watcher = _Watcher()
    losses = DiffusionLosses(stage, watcher, denoiser, memory, FLOW, torch.device("cpu"))
    timestep = torch.tensor([250.0, 800.0])
    pass_ = losses.predict([0, 1], timestep, ItemDraws(0, range(2)), augment=False)
    clean, noise, noisy = pass_.clean, pass_.noise, pass_.noisy
    time = torch.tensor([0.25, 0.8]).view(-1, *[1] * (clean.ndim - 1))
    torch.testing.assert_close(noisy, (1 - time) * clean + time * noise)
    assert torch.equal(watcher.sample, noisy) and torch.equal(watcher.timestep, timestep)
    loss = losses.loss([0, 1], timestep, ItemDraws(0, range(2)), augment=False)
    torch.testing.assert_close(loss, (noise - clean).square().mean())
    drawn = losses.timesteps(1000, 0)
    assert float(drawn.min()) > 0 and float(drawn.max()) < 1000
    assert torch.equal(drawn.long().sort().values, torch.arange(1000)), "they cover all times evenly"


def test_shifted_times_are_those_of_the_sampler():
    shares = torch.arange(1, 1000) / 1000
    sigmas = make_flow_scheduler(3.0).sigmas.flip(0)[:-1]
    torch.testing.assert_close(FlowNoise(3.0).timesteps(shares) / 1000, sigmas)


def test_resumed_flow_training_is_equal_to_the_bit(memory, latent_autoencoder, tmp_path):
    whole = train("coarse", memory, latent_autoencoder, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train("coarse", memory, latent_autoencoder, tmp_path / "parts", on_progress=interrupt)
    resumed = train("coarse", memory, latent_autoencoder, tmp_path / "parts")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_denoisers_of_diffusions_and_flows_do_not_mix(memory, latent_autoencoder, tmp_path):
    for stage in STAGES:
        assert save_pipeline(tmp_path, small_scene_autoencoder(), latent_autoencoder) is None
        train(stage, memory, latent_autoencoder, tmp_path / stage, replace(FLOW, flow_shift=2.0))
    pipeline = load_pipeline(save_pipeline(tmp_path, small_scene_autoencoder(), latent_autoencoder))
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler) and pipeline.scheduler.config.shift == 2
    assert pipeline(1, scene_generators(0, 1), num_inference_steps=2).grids.density.isfinite().all()
    shutil.rmtree(tmp_path / "fine")
    fine = train("fine", memory, latent_autoencoder, tmp_path / "fine")
    with pytest.raises(UserInputError, match=r"--flow-shift 1.0 and 2.0"):
        save_pipeline(tmp_path, small_scene_autoencoder(), latent_autoencoder)
    shutil.rmtree(tmp_path / "fine")
    diffusion = replace(FLOW, prediction_type="v_prediction")
    with pytest.raises(UserInputError, match=r"does not fit .*\(flow\)"):
        train("fine", memory, latent_autoencoder, tmp_path / "fine", diffusion, initial=fine)
    train("fine", memory, latent_autoencoder, tmp_path / "fine", diffusion)
    with pytest.raises(UserInputError, match="flow, v_prediction"):
        save_pipeline(tmp_path, small_scene_autoencoder(), latent_autoencoder)


def test_pictures_of_a_flow_that_trains(memory, latent_autoencoder, tmp_path):
    denoiser = train("coarse", memory, latent_autoencoder, tmp_path)
    arguments = (memory, latent_autoencoder, small_scene_autoencoder())
    assert DenoiserPictures("coarse", denoiser, make_flow_scheduler(), *arguments)()


def test_errors_of_a_flow_are_in_units_of_their_own(memory, latent_autoencoder, tmp_path):
    denoiser = train("coarse", memory, latent_autoencoder, tmp_path)
    errors = velocity_errors("coarse", denoiser, memory, FLOW)
    assert list(errors) == list(range(50, 1000, 100))
    assert errors == velocity_errors("coarse", denoiser, memory, replace(FLOW, flow_shift=3.0))
    assert evaluate_denoiser("coarse", denoiser, memory, FLOW) > 0
    assert held_out_errors("coarse", denoiser, memory, FLOW)["prediction_type"] == "flow"
    torch.nn.init.zeros_(denoiser.unet.conv_out.weight)
    torch.nn.init.zeros_(denoiser.unet.conv_out.bias)
    errors = velocity_errors("coarse", denoiser, memory, FLOW)
    assert sum(errors.values()) / 10 == pytest.approx(2, abs=0.3), "of predicting nothing: noise and data"


def test_errors_of_v_are_smaller_by_a_known_factor():
    """A wrong flow, read as v at the same level of noise."""
    clean, noise, wrong = torch.randn(3, 1000, dtype=torch.float64)
    for time in (0.1, 0.5, 0.8):
        noisy, predicted = (1 - time) * clean + time * noise, noise - clean + 0.1 * wrong
        norm = (time**2 + (1 - time) ** 2) ** 0.5
        signal, sigma = (1 - time) / norm, time / norm
        velocity = signal * (noisy + (1 - time) * predicted) - sigma * (noisy - time * predicted)
        error = (velocity - (signal * noise - sigma * clean)).square().mean()
        torch.testing.assert_close(error, norm**2 * (0.1 * wrong).square().mean())


# What does not go together


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_weighting": "min_snr"}, "--loss-weighting min_snr weighs the timesteps of a diffusion"),
        ({"zero_terminal_snr": False}, "leave out --no-zero-terminal-snr"),
        ({"flow_shift": 0.0}, "--flow-shift is 0.0, but must be a finite number above 0"),
        ({"flow_shift": float("inf")}, "--flow-shift is inf"),
        ({"prediction_type": "sample", "flow_shift": 2.0}, "add --prediction-type flow"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message, memory, latent_autoencoder, tmp_path):
    with pytest.raises(UserInputError, match=message):
        training_noise(replace(FLOW, **changes))
    with pytest.raises(UserInputError, match=message):
        train("coarse", memory, latent_autoencoder, tmp_path / "run", replace(FLOW, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "FlowMatchLCMScheduler"])
def test_flows_refuse_other_schedulers(name):
    pipeline = lively_pipeline()
    pipeline.scheduler = getattr(diffusers, name)()
    expected = f"{name} samples no flow, .* take FlowMatchEulerDiscreteScheduler or FlowMatchHeunDiscreteScheduler"
    with pytest.raises(ValueError, match=expected):
        pipeline(1, num_inference_steps=2)


@pytest.mark.parametrize("name", ["invert_sigmas", "use_dynamic_shifting"])
def test_flows_refuse_the_times_of_other_models(name):
    pipeline = lively_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**{name: True})
    with pytest.raises(ValueError, match=f"has {name}, so its times are not those"):
        pipeline(1, num_inference_steps=2)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_diffusions_refuse_schedulers_of_flows(sampler):
    pipeline = small_pipeline()
    pipeline.scheduler = sampler()
    with pytest.raises(ValueError, match=f"{sampler.__name__} has no .* another kind of diffusion"):
        pipeline(1, num_inference_steps=2)


def test_what_explodes_names_the_schedulers_of_flows():
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler ended c .* take FlowMatchEuler"):
        check_sampled(FlowMatchHeunDiscreteScheduler(), torch.full((4,), 100.0), "c")
    check_sampled(make_flow_scheduler(), torch.full((4,), 100.0), "c")


def test_folders_whose_parts_do_not_go_together_are_refused(tmp_path):
    small_pipeline(flow=True).save_pretrained(tmp_path / "flow")
    small_pipeline().save_pretrained(tmp_path / "diffusion")
    folder = shutil.copytree(tmp_path / "flow", tmp_path / "mixed")
    shutil.rmtree(folder / "coarse_denoiser")
    shutil.copytree(tmp_path / "diffusion" / "coarse_denoiser", folder / "coarse_denoiser")
    with pytest.raises(UserInputError, match="flag flow of coarse_denoiser is False, but that of global_denoiser"):
        load_pipeline(folder)
    pipeline = NFLDMPipeline.from_pretrained(tmp_path / "flow")
    pipeline.scheduler = DDIMScheduler.from_config(make_scheduler().config)
    pipeline.save_pretrained(tmp_path / "ddim")
    with pytest.raises(UserInputError, match="flag flow of scheduler is False"):
        load_pipeline(tmp_path / "ddim")


def test_damaged_schedulers_of_flows_are_refused(tmp_path):
    small_pipeline(flow=True).save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    whole = json.loads(path.read_text())
    for damage in ({"shift": -2.0}, {"shift": "a"}, {"use_dynamic_shifting": True}, {"num_train_timesteps": 0}):
        path.write_text(json.dumps({**whole, **damage}))
        with pytest.raises(UserInputError, match="scheduler_config.json"):
            load_pipeline(tmp_path)


def test_models_of_diffusions_are_the_same_as_before_there_were_flows():
    pipeline = small_pipeline()
    assert "flow" not in own_config(pipeline.coarse_denoiser)
    assert own_config(small_pipeline(flow=True).coarse_denoiser)["flow"] is True


def test_the_command_refuses_a_shift_without_a_flow(capsys, store, latent_autoencoder, tmp_path):
    latent_autoencoder.save_pretrained(tmp_path / "stage2")
    common = ["--voxels", str(store.root), "--latent-autoencoder", str(tmp_path / "stage2")]
    with pytest.raises(SystemExit) as exit_info:
        train_diffusion.main(["global", *common, "--output-dir", str(tmp_path / "out"), "--flow-shift", "2"])
    assert exit_info.value.code == 2 and "--prediction-type flow" in capsys.readouterr().err
