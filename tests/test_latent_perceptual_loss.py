"""The loss of the denoisers' estimates in the features of stage 2's decoder."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nfldm_ns.diffusion.denoisers import CoarseDenoiser
from nfldm_ns.diffusion.latent_memory import encode_latents
from nfldm_ns.diffusion.latent_perceptual_loss import EPSILON, LatentPerceptualLoss
from nfldm_ns.diffusion.rendering_loss import latents_with
from nfldm_ns.diffusion.training import DiffusionLosses, DiffusionTrainingConfig, new_denoiser, train_denoiser
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.blocks import pack_channels_last
from nfldm_ns.training.schedule import Schedule
from tests.small_models import DENOISER_SIZES, encoded_rooms, small_latent_autoencoder, small_scene_autoencoder

CONFIG = DiffusionTrainingConfig(
    schedule=Schedule(max_steps=2, batch_size=2, log_every=1, checkpoint_every=2), latent_perceptual_mult=0.5
)
TURNS = torch.tensor([0, 3])


@pytest.fixture(scope="module")
def latent_autoencoder():
    return small_latent_autoencoder().requires_grad_(False)


@pytest.fixture(scope="module")
def memory(tmp_path_factory, latent_autoencoder):
    store = encoded_rooms(tmp_path_factory.mktemp("scenes"), small_scene_autoencoder())
    return encode_latents(store, latent_autoencoder, store.splits["train"])


@pytest.fixture(params=["coarse", "fine"])
def denoiser(request, memory, latent_autoencoder):
    return new_denoiser(request.param, DENOISER_SIZES[request.param], memory, latent_autoencoder)


def true_latent(denoiser, memory, stage):
    found = memory.pick(stage, [1, 2], TURNS, "cpu")
    return denoiser.latent(found.flatten(1, 2) if stage == "coarse" else found)


def stage_of(denoiser):
    return "coarse" if isinstance(denoiser, CoarseDenoiser) else "fine"


def test_features_are_what_the_decoder_makes_voxels_of(latent_autoencoder, memory):
    latents = memory_latents(latent_autoencoder, memory)
    features = latent_autoencoder.decoder_features(latents)
    finest, coarsest = latent_autoencoder.grid_shape[1], latent_autoencoder.coarse_shape[2]
    doubled = [coarsest * 2**i for i in range((finest // coarsest).bit_length())]
    assert [f.shape[2] for f in features] == [*doubled, finest]
    codes, decoder = latent_autoencoder.quantise(latents), latent_autoencoder.decoder
    last = features[-1]
    if decoder.norm_out is not None:
        last = F.silu(decoder.norm_out(last, codes.global_latent))
    fine, coarse = pack_channels_last(codes.fine), pack_channels_last(codes.coarse.flatten(1, 2))
    assert torch.equal(decoder.conv_out(last), decoder(codes.global_latent, coarse, fine))


def memory_latents(latent_autoencoder, memory):
    denoiser = new_denoiser("fine", DENOISER_SIZES["fine"], memory, latent_autoencoder)
    clean = true_latent(denoiser, memory, "fine")
    return latents_with(denoiser, latent_autoencoder, memory, clean, [1, 2], TURNS)


def test_the_truth_has_no_error_and_all_others_are_by_hand(denoiser, memory, latent_autoencoder):
    stage, share = stage_of(denoiser), torch.tensor([0.25, 1.0])
    loss = LatentPerceptualLoss(denoiser, latent_autoencoder, memory)
    clean = true_latent(denoiser, memory, stage)
    assert float(loss(clean, clean, share, [1, 2], TURNS)) == 0
    estimate = (clean + torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))).requires_grad_(True)
    found = loss(estimate, clean, share, [1, 2], TURNS)
    errors = []
    for ours, true in zip(
        *(
            latent_autoencoder.decoder_features(
                latents_with(denoiser, latent_autoencoder, memory, values, [1, 2], TURNS)
            )
            for values in (estimate, clean)
        ),
        strict=True,
    ):
        std = true.std(dim=(0, 2, 3), keepdim=True) + EPSILON
        errors.append((((ours - true) / std) ** 2).mean(dim=(1, 2, 3)))
    if stage == "fine":
        assert all(float(error.abs().max()) == 0 for error in errors[:-1]), "f joins the last features alone"
    expected = (share * sum(errors) / len(errors)).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-5) and float(found) > 0
    found.backward()
    assert float(estimate.grad.abs().sum()) > 0
    assert float(loss(estimate, clean, torch.zeros(2), [1, 2], TURNS)) == 0


def test_its_gradient_reaches_the_denoiser_and_not_stage_2(denoiser, memory, latent_autoencoder):
    perceptual = LatentPerceptualLoss(denoiser, latent_autoencoder, memory)
    losses = DiffusionLosses(
        stage_of(denoiser), denoiser, denoiser, memory, CONFIG, torch.device("cpu"), perceptual=perceptual
    )
    found = losses(0)
    assert set(found) == {"loss", "latent_perceptual_loss"}
    found["latent_perceptual_loss"].backward()
    assert float(denoiser.unet.conv_out.weight.grad.abs().sum()) > 0
    assert all(p.grad is None for p in latent_autoencoder.parameters())


def trained(folder, memory, latent_autoencoder, config, stage="coarse"):
    sizes, quiet = DENOISER_SIZES[stage], {"on_progress": lambda share, losses: None}
    return train_denoiser(stage, memory, latent_autoencoder, folder, sizes, config, **quiet)


def test_training_with_it_is_another_training_that_repeats(memory, latent_autoencoder, tmp_path):
    first, again = (trained(tmp_path / name, memory, latent_autoencoder, CONFIG) for name in ("a", "b"))
    plain = trained(tmp_path / "c", memory, latent_autoencoder, replace(CONFIG, latent_perceptual_mult=0.0))
    states = [model.state_dict()["unet.conv_out.weight"] for model in (first, again, plain)]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    trained(tmp_path / "g", memory, latent_autoencoder, CONFIG, "global")
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("a", "c", "g")]
    assert [run.get("latent_perceptual_mult") for run in runs] == [0.5, None, None]
    with pytest.raises(UserInputError, match="--latent-perceptual-mult is inf: give a finite number"):
        trained(tmp_path / "run", memory, latent_autoencoder, replace(CONFIG, latent_perceptual_mult=float("inf")))
    assert not (tmp_path / "run").exists()
