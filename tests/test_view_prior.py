"""Priors of novel views through diffusers' classes, sums of two priors, and LoRA weights."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.cameras import look_along
from nfldm_ns.refine import hub_loading
from nfldm_ns.refine.distillation import DistillationConfig, distill
from nfldm_ns.refine.hub_loading import load_hub_prior
from nfldm_ns.refine.loading import load_prior
from nfldm_ns.refine.prior import repeat
from nfldm_ns.refine.refiner import Refiner
from nfldm_ns.refine.settings import RefinementConfig, RegulariserConfig
from nfldm_ns.refine.view_prior import ViewPrior, relative_poses
from nfldm_ns.scenes.views import Views, make_cameras
from tests.test_distillation import GaussianPrior, images
from tests.test_refine import room_grid, room_scene
from tests.tiny_priors import IMAGE_SIZE, save_image_variation_prior, save_text_prior, save_view_prior

PLAIN = DistillationConfig(guidance="none", max_time=0.6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("view_priors")
    for name, save in {
        "view": save_view_prior,
        "text": save_text_prior,
        "variation": save_image_variation_prior,
    }.items():
        save(root / name)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def prior(folders) -> ViewPrior:
    return load_hub_prior(str(folders["view"]))


def looking(yaw: list[float], pitch: float = 0.0):
    """Level cameras at the origin, `[1, N]`; yaw in degrees."""
    count = len(yaw)
    poses = look_along(torch.zeros(count, 3), torch.deg2rad(torch.tensor(yaw)), torch.full((count,), pitch))
    return make_cameras(poses[None], 16.0, 16.0, 16.0, 16.0, 32, 32)


def observed(*yaw: float) -> Views:
    generator = torch.Generator().manual_seed(0)
    return Views(looking(list(yaw)), torch.rand(1, len(yaw), 3, 32, 32, generator=generator))


# Zero-1-to-3


def on_a_sphere(polar: float, azimuth: float, radius: float) -> Tensor:
    """The pose of a camera that looks at the origin from there; angles in degrees."""
    polar, azimuth = math.radians(polar), math.radians(azimuth)
    back = torch.tensor([math.sin(polar) * math.cos(azimuth), math.sin(polar) * math.sin(azimuth), math.cos(polar)])
    yaw, pitch = torch.tensor([azimuth + math.pi]), torch.tensor([polar - math.pi / 2])
    return look_along(radius * back[None], yaw, pitch)


def test_relative_poses_are_those_of_spherical_coordinates():
    reference = on_a_sphere(60, 30, 1.5)
    for polar, azimuth, radius in ((60, 30, 1.5), (60, 120, 1.5), (90, 30, 2.0), (40, -60, 1.0)):
        found = relative_poses(on_a_sphere(polar, azimuth, radius), reference)[0]
        turned = math.radians(azimuth - 30)
        expected = [math.radians(polar - 60), math.sin(turned), math.cos(turned), radius - 1.5]
        assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_network_sees_reference_pose_and_embedding(prior):
    """By the pipeline's own parts: one token of embedding and pose, and unscaled latents beside the noisy ones."""
    views = observed(0.0, 90.0)
    told = prior.observing(views)(looking([10.0, 100.0, 80.0]))
    assert told["reference"].shape == (3, 4, IMAGE_SIZE // 2, IMAGE_SIZE // 2)
    latents = prior.vae.encode(2 * views.images[0] - 1).latent_dist.mode()
    assert torch.allclose(told["reference"], latents[[0, 1, 1]], atol=1e-5), "those that look most nearly the same way"
    assert torch.allclose(told["embedding"], prior.embed_images(views.images[0])[[0, 1, 1]], atol=1e-5)
    turns = torch.deg2rad(torch.tensor([10.0, 10.0, -10.0]))
    pose = torch.stack([torch.zeros(3), turns.sin(), turns.cos(), torch.zeros(3)], dim=1)
    assert torch.allclose(told["pose"], pose, atol=1e-5)
    noisy, timestep = torch.randn(3, 4, 16, 16), torch.tensor([5, 400, 900])
    token = prior.cc_projection.projection(torch.cat([told["embedding"], pose], dim=1))[:, None]
    expected = prior.unet(torch.cat([noisy, told["reference"]], dim=1), timestep, token).sample
    assert torch.allclose(prior.predict_noise(noisy, timestep, told), expected, atol=1e-5)
    nothing = {name: torch.zeros_like(values) for name, values in told.items()}
    free = prior.unet(torch.cat([noisy, torch.zeros_like(noisy)], dim=1), timestep, torch.zeros_like(token)).sample
    assert torch.allclose(prior.predict_noise(noisy, timestep, nothing), free, atol=1e-5)


@pytest.mark.parametrize("guidance", ["none", "classifier_free"])
def test_scenes_are_refined_by_their_own_views(prior, guidance):
    config = RefinementConfig(prior="x", distillation=replace(PLAIN, guidance=guidance))
    refiner = Refiner(room_scene(), prior, config)
    grid = room_grid()
    grid.features.requires_grad_()
    losses, metrics = refiner.losses(grid, room_scene().renderer, 0.0, torch.Generator().manual_seed(0))
    losses["distillation_loss"].backward()
    assert metrics["skipped_views"] == 0 and float(grid.features.grad.abs().sum()) > 0
    wanted, unwanted = refiner._drawn.conditions[0]
    assert (wanted["known"] == 1).all() and len(wanted["pose"]) == 4
    assert unwanted is None if guidance == "none" else (unwanted["known"] == 0).all()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"style": "winter"}, "views of the place alone"),
        ({"distillation": DistillationConfig(guidance="negative")}, "classifier_free"),
        ({"observed": "similar"}, "--condition views"),
    ],
)
def test_what_a_view_prior_cannot_be_told_is_refused(prior, changes, sentence):
    with pytest.raises(UserInputError, match=sentence):
        Refiner(room_scene(), prior, RefinementConfig(**{"prior": "x", "distillation": PLAIN, **changes}))


def test_folders_that_do_not_fit_are_refused(tmp_path, folders):
    save_view_prior(tmp_path / "other", pose_numbers=3)
    with pytest.raises(UserInputError, match="takes 19 numbers"):
        load_hub_prior(str(tmp_path / "other"))
    (tmp_path / "other" / "cc_projection" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserInputError, match="cannot be loaded"):
        load_hub_prior(str(tmp_path / "other"))


# Two priors


class Told(GaussianPrior):
    """One mean, whatever it is told."""

    def __init__(self, mean: float, size: int = 16) -> None:
        super().__init__(size)
        self.mean, self.texts = mean, []

    def condition(self, images: Tensor | None = None, text: str | None = None):
        self.texts.append(text)
        return {"mean": torch.full((1, 3, self.image_size, self.image_size), self.mean)}


def test_two_priors_are_a_weighted_sum():
    config = RefinementConfig(
        prior="x",
        style="a hall",
        second_prior="y",
        second_weight=2.5,
        second_style="a barn",
        distillation=PLAIN,
        regularisers=RegulariserConfig(0, 0),
    )
    first, second = Told(0.2), Told(0.9, 8)
    refiner = Refiner(room_scene(), [first, second], config)
    assert first.texts == ["a hall"] and second.texts == ["a barn"]
    losses, metrics = refiner.losses(room_grid(), room_scene().renderer, 0.0, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    cameras = refiner.views(4, generator)
    rendered = room_scene().renderer.render(room_grid(), cameras).rgb[0]
    found = [
        distill(prior, rendered, {"mean": images(*[mean] * 4, size=prior.image_size)}, None, PLAIN, 0.0, generator)
        for prior, mean in ((first, 0.2), (second, 0.9))
    ]
    expected = float(found[0].loss.detach()) + 2.5 * float(found[1].loss.detach())
    assert float(losses["distillation_loss"].detach()) == pytest.approx(expected, rel=1e-5)
    assert metrics["second_gradient"] == pytest.approx(float(found[1].gradient.square().mean().sqrt()), rel=1e-4)


def test_each_of_two_priors_has_its_own_wishes():
    config = RefinementConfig(
        prior="x",
        second_prior="y",
        second_style="a hall",
        second_guidance="classifier_free",
        second_guidance_scale=7.5,
        second_weight=0.1,
        view_prompt_share=1.0,
        distillation=PLAIN,
    )
    (first, one), (second, weight) = config.of_priors()
    assert (one, weight) == (1.0, 0.1)
    assert (first.style, first.view_prompt_share, first.distillation.guidance) == (None, 0.0, "none")
    assert (second.style, second.view_prompt_share, second.prior) == ("a hall", 1.0, "y")
    assert (second.distillation.guidance, second.distillation.guidance_scale) == ("classifier_free", 7.5)
    assert second.distillation.max_time == PLAIN.max_time and len(second.of_priors()) == 1
    config.check()
    with pytest.raises(UserInputError, match="--second-prior"):
        replace(config, second_prior=None).check()
    with pytest.raises(UserInputError, match="want words"):
        replace(config, second_style=None).check()
    with pytest.raises(UserInputError, match="--second-weight"):
        replace(config, second_weight=-1.0).check()


def test_a_view_prior_and_one_of_words_refine_together(prior, folders):
    """Magic123: poses from one, words from the other."""
    config = RefinementConfig(prior="x", second_prior="y", second_style="a hall", distillation=PLAIN)
    refiner = Refiner(room_scene(), [prior, load_hub_prior(str(folders["text"]))], config)
    grid = room_grid()
    grid.features.requires_grad_()
    losses, metrics = refiner.losses(grid, room_scene().renderer, 0.0, torch.Generator().manual_seed(0))
    losses["distillation_loss"].backward()
    assert metrics["distillation_gradient"] > 0 and metrics["second_gradient"] > 0
    assert grid.features.grad.isfinite().all()


# LoRA

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


def lora_weights(folder: Path, prior) -> dict[str, Tensor]:
    """Of one layer of the U-Net, rank 2."""
    weight = prior.unet.get_submodule(LAYER).weight
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(2, weight.shape[1], generator=generator)
    up = torch.randn(weight.shape[0], 2, generator=generator)
    folder.mkdir()
    names = {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}
    save_file(names, folder / "pytorch_lora_weights.safetensors")
    return {"down": down, "up": up}


def test_lora_weights_are_added(folders, tmp_path):
    """W + scale B A, and everything else to the bit."""
    pytest.importorskip("peft", reason="LoRA weights are loaded by peft, which is not installed")
    plain = load_hub_prior(str(folders["text"]))
    parts = lora_weights(tmp_path / "lora", plain)
    tuned = load_hub_prior(str(folders["text"]), lora=str(tmp_path / "lora"), lora_scale=0.5)
    before, after = plain.unet.state_dict(), tuned.unet.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{LAYER}.weight"}
    expected = before[f"{LAYER}.weight"] + 0.5 * parts["up"] @ parts["down"]
    assert torch.allclose(after[f"{LAYER}.weight"], expected, atol=1e-5)
    assert repeat(tuned.unconditional(), 2)["encoder_hidden_states"].shape[0] == 2
    (tmp_path / "other").mkdir()
    save_file(
        {"unet.nothing.lora_A.weight": torch.zeros(2, 4)}, tmp_path / "other" / "pytorch_lora_weights.safetensors"
    )
    with pytest.raises(UserInputError, match="cannot be loaded"):
        load_hub_prior(str(folders["text"]), lora=str(tmp_path / "other"))


def test_lora_weights_that_nothing_takes_are_refused(folders, tmp_path, monkeypatch):
    with pytest.raises(UserInputError, match="takes no LoRA weights: leave out --lora"):
        load_hub_prior(str(folders["variation"]), lora="some")
    with pytest.raises(UserInputError, match="takes no LoRA weights: leave out --lora"):
        load_hub_prior(str(folders["view"]), lora="some")
    with pytest.raises(UserInputError, match="in-domain prior, which takes no LoRA"):
        load_prior("vizdoom-prior", lora="some")
    monkeypatch.setattr(hub_loading, "is_peft_available", lambda: False)
    with pytest.raises(UserInputError, match="pip install peft"):
        load_hub_prior(str(folders["text"]), lora="some")
