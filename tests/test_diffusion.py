"""Stage 3: denoisers, their training, and trajectories."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.training_utils import compute_snr

from nfldm_ns.diffusion.denoisers import CoarseDenoiser, FineDenoiser, GlobalDenoiser, Normaliser
from nfldm_ns.diffusion.latent_memory import LatentMemory, encode_latents
from nfldm_ns.diffusion.pipeline import load_pipeline, scene_generators
from nfldm_ns.diffusion.training import (
    STAGES,
    DiffusionTrainingConfig,
    diffusion_target,
    evaluate_denoiser,
    load_denoiser,
    load_initial_denoiser,
    loss_weights,
    make_scheduler,
    predicted_velocity,
    save_pipeline,
    spread_timesteps,
    stages_of,
    train_denoiser,
    training_scheduler,
    velocity_errors,
)
from nfldm_ns.diffusion.trajectory import cameras_to_trajectory, trajectory_to_cameras, turn_trajectory
from nfldm_ns.errors import UserInputError
from nfldm_ns.method_configs.latent_presets import DIFFUSION_PRESETS, LATENT_PRESETS
from nfldm_ns.scenes.views import rotate_cameras90
from nfldm_ns.training.run import read_metrics
from nfldm_ns.training.schedule import Schedule
from tests.interruption import Interrupted, interrupt
from tests.small_models import DENOISER_SIZES, small_latent_autoencoder, small_scene_autoencoder
from tests.synthetic import AABB, surround_cameras

TRAINING = DiffusionTrainingConfig(schedule=Schedule(max_steps=6, batch_size=2, log_every=2, checkpoint_every=3))


# Trajectories


def test_trajectory_keeps_level_cameras():
    cameras = surround_cameras(8, 32, torch.Generator().manual_seed(0))
    trajectory = cameras_to_trajectory(cameras)
    back = trajectory_to_cameras(trajectory, torch.tensor(AABB), (16.0, 16.0, 16.0, 16.0), (32, 32))
    torch.testing.assert_close(back.camera_to_worlds, cameras.camera_to_worlds, atol=1e-5, rtol=0)
    torch.testing.assert_close(back.fx, cameras.fx)


@pytest.mark.parametrize("turns", range(4))
def test_trajectory_turns_with_the_cameras(turns):
    cameras = surround_cameras(4, 32, torch.Generator().manual_seed(0))
    turned = cameras_to_trajectory(rotate_cameras90(cameras, turns))
    torch.testing.assert_close(turn_trajectory(cameras_to_trajectory(cameras), turns), turned, atol=1e-6, rtol=0)


def test_sampled_cameras_are_brought_into_the_box():
    wild = torch.tensor([[50.0, -50.0, 9.0, 3.0, 4.0]])
    camera = trajectory_to_cameras(wild, torch.tensor(AABB), (16.0, 16.0, 16.0, 16.0), (32, 32))
    pose = camera.camera_to_worlds[0, 0]
    box = torch.tensor(AABB)
    assert bool((pose[:, 3] > box[0]).all()) and bool((pose[:, 3] < box[1]).all())
    torch.testing.assert_close(pose[:, :3] @ pose[:, :3].T, torch.eye(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(-pose[:, 2], torch.tensor([0.6, 0.8, 0.0]), atol=1e-6, rtol=0)


# The noise schedule


def test_training_covers_the_noise_from_none_to_nothing_else():
    for sampler in (DDPMScheduler, DDIMScheduler):
        alphas = sampler.from_config(make_scheduler().config).alphas_cumprod
        assert float(alphas[0]) > 0.999 and float(alphas[-1]) == 0, "the last step is pure noise"
    assert float(make_scheduler().alphas_cumprod[-1]) == 2**-24, "DPM-Solver++ takes its logarithm"
    plain = DDPMScheduler.from_config(make_scheduler("epsilon", zero_terminal_snr=False).config).alphas_cumprod
    assert 0 < float(plain[-1]) < 1e-8
    alphas = DDPMScheduler.from_config(make_scheduler().config).alphas_cumprod
    torch.testing.assert_close(alphas[1:-1], plain[1:-1], atol=1e-4, rtol=1e-2)


def test_predicting_pure_noise_from_pure_noise_is_refused(memory, latent_autoencoder, tmp_path):
    with pytest.raises(UserInputError, match="v_prediction, or --no-zero-terminal-snr"):
        train("coarse", memory, latent_autoencoder, tmp_path / "run", replace(TRAINING, prediction_type="epsilon"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sampler", [DPMSolverMultistepScheduler, DDIMScheduler])
@pytest.mark.parametrize("steps", [1, 7, 30])
def test_sampling_starts_at_pure_noise(sampler, steps):
    scheduler = sampler.from_config(make_scheduler().config)
    scheduler.set_timesteps(steps)
    assert int(scheduler.timesteps[0]) == 999 and len(scheduler.timesteps) == steps
    assert not scheduler.config.get("clip_sample", False), "latents are not confined to [-1, 1]"


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
def test_min_snr_weighs_the_clean_sample_alike_whatever_is_predicted(prediction_type):
    zero = prediction_type != "epsilon"
    scheduler = DDPMScheduler.from_config(make_scheduler(prediction_type, zero).config)
    timestep = torch.tensor([3, 100, 400, 700, 950])
    alpha = scheduler.alphas_cumprod[timestep]
    snr = alpha / (1 - alpha)
    clean, noise = torch.randn(2, 5, 4, dtype=torch.float64)
    wrong = clean + 0.1
    a, s = alpha.double().sqrt()[:, None], (1 - alpha.double()).sqrt()[:, None]
    noisy = a * clean + s * noise
    predictions = {"sample": wrong, "epsilon": (noisy - a * wrong) / s, "v_prediction": (a * noisy - wrong) / s}
    targets = {"sample": clean, "epsilon": noise, "v_prediction": a * noise - s * clean}
    error = (predictions[prediction_type] - targets[prediction_type]).square().mean(1)
    weights = loss_weights(scheduler, timestep, "min_snr", gamma=5.0)
    torch.testing.assert_close((weights * error).float(), 0.01 * snr.clamp(max=5), rtol=1e-3, atol=1e-7)
    assert torch.equal(loss_weights(scheduler, timestep, "uniform"), torch.ones(5))
    by_diffusers = compute_snr(scheduler, timestep)
    divisor = {"sample": 1, "epsilon": by_diffusers, "v_prediction": by_diffusers + 1}[prediction_type]
    torch.testing.assert_close(weights, by_diffusers.clamp(max=5) / divisor, rtol=1e-4, atol=1e-7)


def test_timesteps_of_a_batch_cover_the_range():
    timesteps = spread_timesteps(100, 1000)
    assert torch.equal((timesteps // 10).sort().values, torch.arange(100))


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
def test_exact_predictions_recover_the_clean_sample(prediction_type):
    """For a distribution of a single point the exact prediction is known at any time; the solver must land on it."""
    clean = torch.randn(2, 3, 4)
    scheduler = make_scheduler(prediction_type, prediction_type != "epsilon")
    training = DDPMScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(10)
    x = torch.randn(2, 3, 4)
    for timestep in scheduler.timesteps:
        alpha = training.alphas_cumprod[timestep]
        noise = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        target = diffusion_target(training, clean, noise, timestep.expand(2))
        x = scheduler.step(target, timestep, x).prev_sample
    torch.testing.assert_close(x, clean, atol=1e-2, rtol=1e-2)


def ideal_gaussian_velocity(x, timestep, training, mean=0.5, std=2.0):
    """The velocity of the optimal denoiser of a Gaussian: E[x_0 | x_t] is linear in x_t."""
    alpha = training.alphas_cumprod[timestep]
    signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
    variance = alpha * std**2 + 1 - alpha
    clean = mean + signal * std**2 / variance * (x - signal * mean)
    return signal * (x - signal * clean) / noise - noise * clean


def test_ddim_round_trip_with_an_ideal_denoiser_returns_its_input():
    config = {**make_scheduler().config, "timestep_spacing": "leading", "clip_sample": False, "set_alpha_to_one": False}
    training = DDPMScheduler.from_config(config)
    inverse, forward = DDIMInverseScheduler.from_config(config), DDIMScheduler.from_config(config)
    x = start = 0.5 + 2 * torch.randn(64)
    for scheduler in (inverse, forward):
        scheduler.set_timesteps(500)
        for timestep in scheduler.timesteps:
            t = min(int(timestep), 995)  # at pure noise the velocity says nothing of x
            x = scheduler.step(ideal_gaussian_velocity(x, t, training), t, x).prev_sample
        if scheduler is inverse:
            noise = x
    assert 0.7 < float(noise.std()) < 1.3 and abs(float(noise.mean())) < 0.4, "the inversion ends in unit noise"
    torch.testing.assert_close(x, start, atol=0.05, rtol=0.02)


@pytest.mark.parametrize(("sampler", "steps"), [(DPMSolverMultistepScheduler, 30), (DDIMScheduler, 100)])
def test_sampling_with_the_ideal_denoiser_gives_its_distribution(sampler, steps):
    scheduler = sampler.from_config(make_scheduler().config)
    training = DDPMScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(steps)
    x = torch.randn(20_000)
    for timestep in scheduler.timesteps:
        x = scheduler.step(ideal_gaussian_velocity(x, int(timestep), training), timestep, x).prev_sample
    assert float(x.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(x.std()) == pytest.approx(2.0, abs=0.08)


# Denoisers


@pytest.mark.parametrize("space", [(), (4, 4)])
def test_normaliser_inverts_and_never_blows_up_constants(space):
    spread = torch.tensor([1.0, 5.0, 0.0]).view(-1, *[1] * len(space))
    values = torch.randn(500, 3, *space) * spread + torch.randn(3, *space)
    normaliser = Normaliser(3, *space)
    normaliser.fit(values)
    normalised = normaliser(values)
    torch.testing.assert_close(normalised.mean(dim=0), torch.zeros(3, *space), atol=1e-3, rtol=0)
    axes = (0, *range(2, 2 + len(space)))
    torch.testing.assert_close(normalised[:, :2].std(dim=axes), torch.ones(2), atol=1e-2, rtol=0)
    assert float(normalised[:, 2].abs().max()) < 1e-3
    torch.testing.assert_close(normaliser.inverse(normalised), values)


@pytest.mark.parametrize("preset", ["tiny", "rooms", "base", "paper", "streets-tiny", "streets", "streets-paper"])
def test_denoisers_of_every_preset_fit_its_latents(preset):
    shapes = {
        "tiny": ((12, 4, 8, 8), (16, 32, 32)),
        "rooms": ((12, 4, 12, 12), (20, 48, 48)),
        "base": ((8, 8, 16, 16), (8, 64, 64)),
        "paper": ((4, 8, 32, 32), (4, 128, 128)),
        "streets-tiny": ((12, 4, 12, 12), (16, 48, 48)),
        "streets": ((8, 8, 20, 20), (8, 80, 80)),
        "streets-paper": ((4, 8, 32, 32), (4, 128, 128)),
    }
    coarse, fine = shapes[preset]
    assert LATENT_PRESETS[preset].model.get("coarse_channels", 8) == coarse[0]
    models = DIFFUSION_PRESETS[preset].models
    with torch.device("meta"):
        code, time = torch.empty(2, 168), torch.empty(2, dtype=torch.long)
        psi_g = GlobalDenoiser(**models["global"])
        psi_c = CoarseDenoiser(coarse_shape=coarse, **models["coarse"])
        psi_f = FineDenoiser(fine_shape=fine, coarse_shape=coarse, **models["fine"])
        assert psi_g(code, time).shape == (2, *psi_g.sample_shape)
        assert psi_c(torch.empty(2, *psi_c.sample_shape), time, code).shape == (2, *psi_c.sample_shape)
        x = torch.empty(2, *psi_f.sample_shape)
        assert psi_f(x, time, code, torch.empty(2, *coarse)).shape == x.shape


def test_conditions_reach_the_denoisers():
    torch.manual_seed(0)
    psi_c = CoarseDenoiser((4, 2, 4, 4), 18, **DENOISER_SIZES["coarse"]).eval()
    psi_f = FineDenoiser((4, 16, 16), (4, 2, 4, 4), code_dim=18, **DENOISER_SIZES["fine"]).eval()
    code, other = torch.randn(2, 1, 18)
    time, coarse = torch.tensor([500]), torch.randn(1, 4, 2, 4, 4)
    c, f = torch.randn(1, 8, 4, 4), torch.randn(1, 4, 16, 16)
    context = torch.randn(1, 5, 8)
    assert not torch.allclose(psi_c(c, time, code), psi_c(c, time, other))
    assert not torch.allclose(psi_c(c, time, code), psi_c(c, time, code, context)), "cross-attention sees the tokens"
    assert not torch.allclose(psi_f(f, time, code, coarse), psi_f(f, time, other, coarse))
    assert not torch.allclose(psi_f(f, time, code, coarse), psi_f(f, time, code, -coarse))
    assert not torch.allclose(psi_f(f, time, code, coarse), psi_f(f, time, code, coarse, context))
    drop = torch.tensor([True])
    assert torch.equal(psi_c(c, time, code, drop_code=drop), psi_c(c, time, other, drop_code=drop))
    assert torch.equal(psi_f(f, time, code, coarse, drop_code=drop), psi_f(f, time, other, coarse, drop_code=drop))
    assert torch.equal(psi_c(c, time, code, drop_code=~drop), psi_c(c, time, code))


# Latents of the training scenes


def test_latents_are_those_of_the_turned_scenes(store, latent_autoencoder, memory):
    assert memory.num_turns == 4 and len(memory) == 3 and memory.num_cameras == 8
    scene_id = store.splits["train"][1]
    with torch.no_grad():
        latents = latent_autoencoder.encode(store.grid([scene_id]).rotate90(3))
    torch.testing.assert_close(memory.fine[1, 3].float(), latents.fine[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(memory.scene_code[1, 3, :8], latents.global_latent[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(memory.scene_code[1, 3, :8], memory.scene_code[1, 0, :8])
    cameras = store.load_collection().load_scene(scene_id).source.cameras
    expected = cameras_to_trajectory(rotate_cameras90(cameras, 3))
    torch.testing.assert_close(memory.scene_code[1, 3, 8:], expected, atol=1e-4, rtol=1e-4)
    codes = latent_autoencoder.quantise_coarse(memory.coarse[1, 3:4].float())
    torch.testing.assert_close(memory.coarse_codes[1, 3].float(), codes[0], atol=2e-3, rtol=2e-3)
    assert encode_latents(store, latent_autoencoder, [scene_id], quarter_turns=False).num_turns == 1
    with pytest.raises(UserInputError, match="8 source views"):
        encode_latents(store, latent_autoencoder, [scene_id], num_cameras=9)


# Training


def train(stage, memory, latent_autoencoder, folder, config=TRAINING, **kwargs):
    progress = kwargs.pop("on_progress", lambda share, losses: None)
    sizes = kwargs.pop("sizes", DENOISER_SIZES[stage])
    return train_denoiser(stage, memory, latent_autoencoder, folder, sizes, config, on_progress=progress, **kwargs)


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_training_is_equal_to_the_bit(stage, memory, latent_autoencoder, tmp_path):
    whole = train(stage, memory, latent_autoencoder, tmp_path / "whole")

    with pytest.raises(Interrupted):
        train(stage, memory, latent_autoencoder, tmp_path / "parts", on_progress=interrupt)
    resumed = train(stage, memory, latent_autoencoder, tmp_path / "parts")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert [line["step"] for line in read_metrics(tmp_path / "parts")] == [2, 4, 6]


def test_training_begins_from_a_given_denoiser(memory, latent_autoencoder, tmp_path):
    first = train("coarse", memory, latent_autoencoder, tmp_path / "first")
    still = replace(TRAINING, schedule=replace(TRAINING.schedule, learning_rate=0.0, seed=1))
    again = train(
        "coarse", memory, latent_autoencoder, tmp_path / "again", still, initial=load_denoiser(tmp_path / "first")
    )
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    other = replace(still, condition_dropout=0.5)
    with pytest.raises(UserInputError, match=r"does not fit .*\(condition_dropout\)"):
        train("coarse", memory, latent_autoencoder, tmp_path / "other", other, initial=first)
    assert not (tmp_path / "other" / "run.json").exists()


def test_initial_denoisers_are_those_of_a_run_or_of_a_saved_pipeline(memory, latent_autoencoder, tmp_path):
    trained = train("coarse", memory, latent_autoencoder, tmp_path / "coarse")
    saved = tmp_path / "pipeline"
    trained.save_pretrained(saved / "coarse_denoiser")
    (saved / "model_index.json").write_text("{}")
    for folder in (tmp_path, saved):
        initial = load_initial_denoiser(folder, "coarse")
        assert all(torch.equal(value, initial.state_dict()[name]) for name, value in trained.state_dict().items())
    for folder in (tmp_path, saved):
        with pytest.raises(UserInputError, match="holds no trained denoiser: give the --output-dir"):
            load_initial_denoiser(folder, "fine")


@pytest.mark.parametrize("stage", STAGES)
def test_denoiser_overfits_one_sample(stage, memory, latent_autoencoder, tmp_path):
    names = ("scene_code", "coarse", "coarse_codes", "fine")
    values = {name: getattr(memory, name)[:1, :1] for name in names}
    one = LatentMemory(**values, num_cameras=8, intrinsics=memory.intrinsics, image_size=memory.image_size)
    config = DiffusionTrainingConfig(
        schedule=Schedule(max_steps=120, batch_size=8, learning_rate=5e-3, weight_decay=0.0, log_every=20),
        code_noise=0.0,
        coarse_noise=0.0,
        ema_decay=0.9,
    )
    sizes = {"width": 32, "num_layers": 2} if stage == "global" else DENOISER_SIZES[stage]
    train(stage, one, latent_autoencoder, tmp_path, config, sizes=sizes)
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert losses[-1] < 0.6, f"predicting nothing has loss 1: {losses}"


def test_evaluation_is_deterministic_and_leaves_the_random_state(memory, latent_autoencoder, tmp_path):
    denoiser = train("coarse", memory, latent_autoencoder, tmp_path)
    before = torch.random.get_rng_state()
    loss = evaluate_denoiser("coarse", denoiser, memory, TRAINING)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert loss == evaluate_denoiser("coarse", denoiser, memory, TRAINING) and math.isfinite(loss)


def test_other_preset_or_other_latents_are_refused(memory, latent_autoencoder, tmp_path):
    train("global", memory, latent_autoencoder, tmp_path)
    with pytest.raises(UserInputError, match="width"):
        train("global", memory, latent_autoencoder, tmp_path, sizes={"width": 32, "num_layers": 2})
    with pytest.raises(UserInputError, match="latent_autoencoder"):
        train("global", memory, small_latent_autoencoder(seed=1), tmp_path)
    with pytest.raises(UserInputError, match="halved 3 times"):
        sizes = {**DENOISER_SIZES["coarse"], "channels": (8, 8, 8, 8), "attention": (False,) * 4}
        train("coarse", memory, latent_autoencoder, tmp_path / "deep", sizes=sizes)


def test_pipeline_is_saved_only_when_all_denoisers_fit(memory, latent_autoencoder, tmp_path):
    scene_autoencoder = small_scene_autoencoder()
    for stage in ("global", "coarse"):
        train(stage, memory, latent_autoencoder, tmp_path / stage)
        assert save_pipeline(tmp_path, scene_autoencoder, latent_autoencoder) is None
    train("fine", memory, latent_autoencoder, tmp_path / "fine")
    saved = save_pipeline(tmp_path, scene_autoencoder, latent_autoencoder, temperatures=(1.0, 1.0, 0.5))
    assert tuple(load_pipeline(saved).config.temperatures) == (1.0, 1.0, 0.5)
    shutil.rmtree(tmp_path / "fine")
    other = replace(TRAINING, prediction_type="epsilon", zero_terminal_snr=False)
    train("fine", memory, latent_autoencoder, tmp_path / "fine", other)
    with pytest.raises(UserInputError, match="epsilon, v_prediction"):
        save_pipeline(tmp_path, scene_autoencoder, latent_autoencoder)
    with pytest.raises(UserInputError, match="another latent auto-encoder"):
        save_pipeline(tmp_path, scene_autoencoder, small_latent_autoencoder(seed=1))


@pytest.mark.parametrize(("use_fine", "use_global"), [(False, False), (True, False), (False, True)])
def test_denoisers_of_fewer_latents_are_trained_saved_and_sampled(store, tmp_path, use_fine, use_global):
    model = small_latent_autoencoder(use_fine=use_fine, use_global=use_global)
    memory = encode_latents(store, model, store.splits["train"])
    stages = stages_of(model)
    assert stages == (STAGES if use_fine else ("global", "coarse"))
    for stage in stages:
        assert save_pipeline(tmp_path, small_scene_autoencoder(), model) is None
        train(stage, memory, model, tmp_path / stage)
    pipeline = load_pipeline(save_pipeline(tmp_path, small_scene_autoencoder(), model))
    output = pipeline(2, scene_generators(0, 2), num_inference_steps=2)
    assert output.latents.fine.shape == (2, 4 * use_fine, 16, 16)
    assert output.latents.global_latent.shape == (2, 8 * use_global)
    rendered = pipeline.scene_autoencoder.render(output.grids, output.cameras).rgb
    assert rendered.shape == (2, 8, 3, 32, 32) and bool(rendered.isfinite().all())
    if not use_fine:
        with pytest.raises(UserInputError, match="no fine latent"):
            train("fine", memory, model, tmp_path / "fine")


# Errors that can be compared


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("kind", ["v_prediction", "sample", "epsilon"])
def test_a_perfect_prediction_of_any_kind_has_the_true_velocity(kind, zero_terminal_snr):
    config = DiffusionTrainingConfig(prediction_type=kind, zero_terminal_snr=zero_terminal_snr and kind != "epsilon")
    scheduler = training_scheduler(config)
    timestep = torch.arange(50, 1000, 100)
    clean, noise = torch.randn(2, 10, 3, 4, 4, dtype=torch.float64)
    predicted = diffusion_target(scheduler, clean, noise, timestep)
    noisy = scheduler.add_noise(clean, noise, timestep)
    velocity = predicted_velocity(scheduler, predicted, noisy, timestep)
    torch.testing.assert_close(velocity, scheduler.get_velocity(clean, noise, timestep), atol=1e-5, rtol=1e-5)


def test_errors_of_v_do_not_depend_on_the_weighting(memory, latent_autoencoder, tmp_path):
    denoiser = train("coarse", memory, latent_autoencoder, tmp_path)
    errors = velocity_errors("coarse", denoiser, memory, TRAINING)
    assert list(errors) == list(range(50, 1000, 100))
    assert errors == velocity_errors("coarse", denoiser, memory, replace(TRAINING, loss_weighting="min_snr"))
    torch.nn.init.zeros_(denoiser.unet.conv_out.weight)
    torch.nn.init.zeros_(denoiser.unet.conv_out.bias)
    errors = velocity_errors("coarse", denoiser, memory, TRAINING)
    assert sum(errors.values()) / 10 == pytest.approx(1, abs=0.2), "predicting nothing"
