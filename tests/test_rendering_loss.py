"""The rendering loss of the denoisers' estimates (DiffRF)."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from nfldm_ns.autoencoder.scene_sampler import SceneCache
from nfldm_ns.diffusion.latent_memory import encode_latents
from nfldm_ns.diffusion.rendering_loss import EstimateRendering
from nfldm_ns.diffusion.training import (
    DiffusionLosses,
    DiffusionTrainingConfig,
    diffusion_target,
    estimated_clean,
    new_denoiser,
    train_denoiser,
    training_noise,
)
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.scene_latents import SceneLatents
from nfldm_ns.scenes.views import Views, rotate_cameras90
from nfldm_ns.training.draws import ItemDraws
from nfldm_ns.training.schedule import Schedule
from tests.small_models import DENOISER_SIZES, encoded_rooms, small_latent_autoencoder, small_scene_autoencoder

CONFIG = DiffusionTrainingConfig(
    schedule=Schedule(max_steps=2, batch_size=2, log_every=1, checkpoint_every=2), rendering_mult=0.5
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


class Oracle(nn.Module):
    """Predicts what there is to be predicted."""

    target: torch.Tensor

    def forward(self, sample, timestep, **conditions):
        return self.target


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample", "epsilon", "flow"])
def test_estimates_of_what_is_to_be_predicted_are_the_clean_samples(prediction_type):
    config = DiffusionTrainingConfig(
        prediction_type=prediction_type, zero_terminal_snr=prediction_type not in ("epsilon",)
    )
    scheduler = training_noise(config)
    clean, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    timestep = torch.tensor([10, 500, 900])
    noisy = scheduler.add_noise(clean, noise, timestep)
    target = diffusion_target(scheduler, clean, noise, timestep)
    torch.testing.assert_close(estimated_clean(scheduler, target, noisy, timestep), clean, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("stage", ["coarse", "fine"])
def test_a_perfect_denoiser_has_the_error_of_the_latents_themselves(stage, memory, latent_autoencoder, renderer, views):
    denoiser = new_denoiser(stage, DENOISER_SIZES[stage], memory, latent_autoencoder)
    rendering = EstimateRendering(denoiser, latent_autoencoder, renderer, memory, *views, num_scenes=1, num_views=3)
    oracle = Oracle()
    losses = DiffusionLosses(stage, oracle, denoiser, memory, CONFIG, torch.device("cpu"), rendering=rendering)
    timestep, indices = torch.tensor([300, 700]), [1, 2]

    draws = ItemDraws(0, range(2))
    turns = draws.integers(4)
    clean, _ = losses.sample_and_conditions(indices, draws, turns=turns)
    noise = draws.normal(clean)
    order = draws.permutation(0, 12)
    oracle.target = losses.scheduler.get_velocity(clean, noise, timestep)
    found = losses.losses_of_estimate(indices, timestep, ItemDraws(0, range(2)))
    assert float(found["loss"]) < 1e-8

    latents = {name: memory.pick(name, [1], turns[:1], "cpu") for name in ("coarse", "fine", "scene_code")}
    g = latents["scene_code"][:, : latent_autoencoder.global_dim]
    grid = latent_autoencoder.decode(SceneLatents(g, latents["coarse"], latents["fine"]))
    scene = views[0].load(views[1][1])
    shown = Views.cat([scene.source, scene.target])[order[:3]]
    shown = replace(shown, cameras=rotate_cameras90(shown.cameras, int(turns[0])))
    rgb = renderer.render(grid, Views.stack([shown]).cameras).rgb[0]
    share = float(losses.scheduler.alphas_cumprod[300])
    expected = 0.5 * share * float((rgb - shown.images).abs().mean())
    assert float(found["rendering_loss"]) == pytest.approx(expected, rel=1e-3)


def test_its_gradient_reaches_the_denoiser(memory, latent_autoencoder, renderer, views):
    denoiser = new_denoiser("coarse", DENOISER_SIZES["coarse"], memory, latent_autoencoder)
    rendering = EstimateRendering(denoiser, latent_autoencoder, renderer, memory, *views)
    losses = DiffusionLosses("coarse", denoiser, denoiser, memory, CONFIG, torch.device("cpu"), rendering=rendering)
    losses(0)["rendering_loss"].backward()
    assert float(denoiser.unet.conv_out.weight.grad.abs().sum()) > 0


def trained(folder, memory, latent_autoencoder, config, stage="coarse", **kwargs):
    sizes = DENOISER_SIZES[stage]
    quiet = {"on_progress": lambda share, losses: None}
    return train_denoiser(stage, memory, latent_autoencoder, folder, sizes, config, **quiet, **kwargs)


def test_training_with_it_is_another_training_that_repeats(memory, latent_autoencoder, renderer, views, tmp_path):
    given = {"scene_autoencoder": renderer, "views": views}
    first, again = (trained(tmp_path / name, memory, latent_autoencoder, CONFIG, **given) for name in ("a", "b"))
    plain = trained(tmp_path / "c", memory, latent_autoencoder, replace(CONFIG, rendering_mult=0.0))
    states = [model.state_dict()["unet.conv_out.weight"] for model in (first, again, plain)]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("a", "c")]
    assert runs[0]["rendering_mult"] == 0.5 and "rendering_mult" not in runs[1]


def test_weights_that_are_none_are_refused(memory, latent_autoencoder, tmp_path):
    with pytest.raises(UserInputError, match="--rendering-mult is -1"):
        trained(tmp_path / "run", memory, latent_autoencoder, replace(CONFIG, rendering_mult=-1.0))
    assert not (tmp_path / "run").exists()
