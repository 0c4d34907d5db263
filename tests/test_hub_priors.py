"""Priors through diffusers: tiny random pipelines of the real classes, saved to disk and loaded by the same code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.utils import logging

from nfldm_ns.errors import UserInputError
from nfldm_ns.refine.distillation import DistillationConfig, distill
from nfldm_ns.refine.hub_loading import load_hub_prior
from nfldm_ns.refine.hub_priors import ImageVariationPrior, TextPrior, UnclipPrior
from nfldm_ns.refine.prior import repeat
from tests.tiny_priors import IMAGE_SIZE, save_image_variation_prior, save_text_prior, save_unclip_prior

SAVERS = {"unclip": save_unclip_prior, "variation": save_image_variation_prior, "text": save_text_prior}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("priors")
    for name, save in SAVERS.items():
        save(root / name)
    return {name: root / name for name in SAVERS}


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 24, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "kind", "prediction"),
    [
        ("unclip", UnclipPrior, "v_prediction"),
        ("variation", ImageVariationPrior, "epsilon"),
        ("text", TextPrior, "epsilon"),
    ],
)
def test_priors_are_loaded_and_distilled_through_their_encoder(folders, name, kind, prediction):
    prior = load_hub_prior(str(folders[name]))
    assert isinstance(prior, kind) and prior.prediction_type == prediction
    assert prior.image_size == IMAGE_SIZE and prior.num_timesteps == 1000
    assert not any(parameter.requires_grad for parameter in prior.parameters())
    condition = repeat(prior.condition(text="a style"), 2) if name == "text" else prior.condition(images())
    x = images().requires_grad_()
    config = DistillationConfig(guidance="classifier_free", guidance_scale=3.0)
    distilled = distill(prior, x, condition, repeat(prior.unconditional(), 2), config, 0.5)
    distilled.loss.backward()
    assert distilled.gradient.shape == (2, 4, IMAGE_SIZE // 2, IMAGE_SIZE // 2)
    assert x.grad.isfinite().all() and (x.grad.abs().flatten(1).sum(1) > 0).all()


@pytest.mark.parametrize("name", list(SAVERS))
def test_nothing_is_cast_that_need_not_be(folders, name, caplog):
    """diffusers warns of every cast of a network, also of one to the precision that it has."""
    logging.get_logger("diffusers").addHandler(caplog.handler)
    load_hub_prior(str(folders[name]))
    logging.get_logger("diffusers").removeHandler(caplog.handler)
    assert "float32" not in caplog.text
    half = load_hub_prior(str(folders[name]), torch.bfloat16)
    assert half.unet.dtype == torch.bfloat16 and half.vae.dtype == torch.float32


def test_latents_are_those_of_the_pipeline(folders):
    prior = load_hub_prior(str(folders["text"]))
    x = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    expected = prior.pipeline.vae.encode(2 * x - 1).latent_dist.mode() * 0.18
    assert torch.allclose(prior.encode(x), expected)


def test_image_embeddings_are_those_of_the_pipelines(folders):
    """`_encode_image` is what the pipelines themselves condition on."""
    variation, unclip = (load_hub_prior(str(folders[name])) for name in ("variation", "unclip"))
    pictures = variation.pipeline.image_processor.numpy_to_pil(images().permute(0, 2, 3, 1).numpy())
    expected = variation.pipeline._encode_image(pictures, "cpu", 1, False)
    assert torch.allclose(variation.condition(images())["encoder_hidden_states"], expected, atol=1e-5)
    labels = unclip.condition(images())["class_labels"]
    generator = torch.Generator().manual_seed(0)
    expected = unclip.pipeline._encode_image(pictures, "cpu", 2, 1, False, 0, generator, None)
    assert torch.allclose(labels, expected, atol=1e-5)
    words = unclip.condition(images(), "snow")["encoder_hidden_states"]
    assert not torch.allclose(words, unclip.condition(images())["encoder_hidden_states"])


def test_noise_is_that_of_the_network(folders):
    prior = load_hub_prior(str(folders["variation"]))
    noisy, timestep = torch.randn(2, 4, 16, 16), torch.tensor([5, 900])
    condition = prior.condition(images())
    expected = prior.unet(noisy, timestep, condition["encoder_hidden_states"]).sample
    assert torch.allclose(prior.predict_noise(noisy, timestep, condition), expected)


def test_conditions_that_a_prior_does_not_know_are_refused(folders):
    with pytest.raises(UserInputError, match="images only"):
        load_hub_prior(str(folders["variation"])).condition(text="snow")
    with pytest.raises(UserInputError, match="text only"):
        load_hub_prior(str(folders["text"])).condition(images())
    with pytest.raises(UserInputError, match="--clean-images"):
        load_hub_prior(str(folders["unclip"])).condition(text="snow")


def test_what_cannot_be_loaded_is_refused(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserInputError, match="cannot be loaded"):
        load_hub_prior(str(tmp_path / "nothing"))
    broken = tmp_path / "broken"
    shutil.copytree(folders["text"], broken)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(UserInputError, match="cannot be loaded"):
        load_hub_prior(str(broken))
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    with pytest.raises(UserInputError, match="is a DDPMPipeline, which is no prior"):
        load_hub_prior(str(other))
