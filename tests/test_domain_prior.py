"""The in-domain prior: trained on a collection's images, saved, resumed, and distilled."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

from nfldm_ns.commands.train_prior import main
from nfldm_ns.errors import UserInputError
from nfldm_ns.method_configs.prior_presets import PRIOR_PRESETS
from nfldm_ns.models import PRIOR
from nfldm_ns.refine.distillation import DistillationConfig, distill, guided_noise
from nfldm_ns.refine.domain_prior import (
    RENDERED,
    UNKNOWN,
    DomainPrior,
    Judgement,
    PriorDenoiser,
    colour_moments,
    load_domain_prior,
)
from nfldm_ns.refine.images import (
    centre_square,
    chosen_paths,
    collection_paths,
    example_images,
    read_square_images,
    render_images,
)
from nfldm_ns.refine.loading import load_prior
from nfldm_ns.refine.prior import pick, repeat, rows_of
from nfldm_ns.refine.prior_losses import PriorTrainingConfig
from nfldm_ns.refine.prior_training import train_prior
from nfldm_ns.refine.spaces import FeatureSpace, PixelSpace, space_shape
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.training.schedule import Schedule
from tests.pretrained import require_weights

MODEL = {"image_size": 16, "channels": (8, 8), "attention": (False, True), "head_dim": 8}
TRAINING = PriorTrainingConfig(
    schedule=Schedule(max_steps=4, batch_size=4, warmup_steps=1, log_every=1, checkpoint_every=2, report_to="none"),
    embedding="alex",
)


@pytest.fixture(scope="module")
def folder(box_room_collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_weights("lpips-alex")
    return train_prior(box_room_collection, tmp_path_factory.mktemp("prior"), MODEL, TRAINING)


def test_a_prior_says_what_made_it(folder):
    description = json.loads((folder / "prior.json").read_text())
    assert description["made_by"]["collection"] == "box-rooms" and description["made_by"]["images"] == 3 * 12
    assert description["made_by"]["steps"] == TRAINING.schedule.max_steps
    assert description["made_by"]["licence"] == "CC0-1.0" and 0 < description["made_by"]["held_out_loss"] < 2
    assert all(
        value.dtype == torch.float16 for path in folder.rglob("*.safetensors") for value in load_file(path).values()
    )


def test_a_resumed_training_gives_the_same_weights(folder, box_room_collection, tmp_path):
    reports = []

    def stop_after_three(share: float, losses: dict[str, float]) -> None:
        reports.append(losses)
        if len(reports) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_prior(box_room_collection, tmp_path, MODEL, TRAINING, on_progress=stop_after_three)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000002"]
    again = train_prior(box_room_collection, tmp_path, MODEL, TRAINING)
    name = "denoiser/diffusion_pytorch_model.safetensors"
    first, second = load_file(folder / name), load_file(again / name)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def in_greys(collection: SceneCollection, root: Path, *values: int) -> SceneCollection:
    """A copy of a collection whose images are each of one grey, in turns."""
    shutil.copytree(collection.root, root)
    for number, path in enumerate(sorted(root.glob("scenes/*/images/*.png"))):
        Image.fromarray(np.full((32, 32, 3), values[number % len(values)], np.uint8)).save(path)
    return SceneCollection.open(root)


def test_a_prior_learns_a_collection_in_greys(tmp_path, box_room_collection):
    """Of a domain of grey images it must know that they are grey: a noisy image's clean part."""
    require_weights("lpips-alex")
    grey = in_greys(box_room_collection, tmp_path / "grey", 100)
    longer = Schedule(max_steps=40, batch_size=4, learning_rate=1e-2, warmup_steps=5, log_every=20, report_to="none")
    prior = load_domain_prior(train_prior(grey, tmp_path / "run", MODEL, replace(TRAINING, schedule=longer)))
    x = torch.full((4, 3, 16, 16), 0.8).requires_grad_()
    config = DistillationConfig(guidance="none", max_time=0.7)
    distilled = distill(
        prior, x, pick(prior.clean_condition(), range(4)), None, config, 0.0, torch.Generator().manual_seed(0)
    )
    assert (distilled.gradient.mean((1, 2, 3)) > 0).all(), "brighter than the domain: descending makes it darker"


def test_a_prior_learns_what_tells_renders_from_clean_images(tmp_path, box_room_collection):
    """Clean images are dark and renders bright: away from renders is darker."""
    require_weights("lpips-alex")
    dark_images = in_greys(box_room_collection, tmp_path / "dark", 60)
    scene = tmp_path / "generated" / "scene_000000"
    (scene / "images").mkdir(parents=True)
    (scene / "scene.json").write_text("{}")
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(scene / "images" / "source_00.png")
    longer = Schedule(max_steps=200, batch_size=8, learning_rate=1e-2, warmup_steps=5, log_every=20, report_to="none")
    training = replace(TRAINING, schedule=longer, render_share=0.5, condition_dropout=0.5)
    made = train_prior(dark_images, tmp_path / "run", MODEL, training, generated=[tmp_path / "generated"])
    assert json.loads((made / "prior.json").read_text())["made_by"]["renders"] == 1
    prior = load_domain_prior(made)
    pixels = torch.full((4, 3, 16, 16), 0.5)
    noisy, timestep = torch.zeros(4, 3, 16, 16), torch.full((4,), 700)
    nothing = prior.unconditional()["embedding"].expand(4, -1)
    rendered = {**prior.render_condition(pixels), "embedding": nothing}
    clean = {**pick(prior.clean_condition(), range(4)), "embedding": nothing}
    signal, sigma = prior.signal_and_noise(timestep)
    dark, bright = (
        ((noisy - sigma * prior.predict_noise(noisy, timestep, given)) / signal).mean() for given in (clean, rendered)
    )
    assert dark < -0.2 < 0.2 < bright, (dark, bright)
    assert prior.contrast(noisy, timestep, clean, rendered).mean() > 0, "descending makes it darker"


def test_a_style_pulls_towards_its_brightness(tmp_path, box_room_collection):
    """Of a domain of dark and bright images, without any renders: a noisy grey becomes what the style is."""
    require_weights("lpips-alex")
    greys = in_greys(box_room_collection, tmp_path / "greys", 60, 200)
    longer = Schedule(max_steps=60, batch_size=8, learning_rate=1e-2, warmup_steps=5, log_every=20, report_to="none")
    prior = load_domain_prior(train_prior(greys, tmp_path / "run", MODEL, replace(TRAINING, schedule=longer)))
    noisy, timestep = torch.zeros(2, 3, 16, 16), torch.tensor([300, 700])
    dark, bright = (prior.condition(torch.full((2, 3, 16, 16), value / 255)) for value in (60, 200))
    for opposite in (repeat(prior.unconditional(), 2), prior.render_condition(torch.full((2, 3, 16, 16), 0.5))):
        darker, brighter = (
            prior.contrast(noisy, timestep, style, opposite).mean((1, 2, 3)) for style in (dark, bright)
        )
        assert (darker > 0).all() and (brighter < 0).all(), "a step descends along it"


def test_conditions_of_a_prior(folder):
    prior = load_domain_prior(folder.parent)  # the run's folder does as well
    images = torch.rand(2, 3, 40, 40)
    condition = prior.condition(images)
    assert condition["embedding"].shape == (2, 1152) and rows_of(prior.clean_condition()) == 36
    assert torch.allclose(prior.condition(images[1:])["embedding"], condition["embedding"][1:], atol=1e-4)
    noisy, timestep = torch.randn(2, 3, 16, 16), torch.tensor([3, 999])
    nothing = repeat(prior.unconditional(), 2)
    dropped = prior.denoiser(noisy, timestep, condition["embedding"], torch.tensor([True, True]))
    assert torch.allclose(prior.denoise(noisy, timestep, nothing), dropped, atol=1e-6)
    with pytest.raises(UserInputError, match="no words"):
        prior.condition(text="snow")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("prior.json", b'{"format": "other"}', "not of format"),
        ("denoiser/diffusion_pytorch_model.safetensors", b"\x00" * 64, "is damaged"),
        ("clean_images.safetensors", None, "is missing"),
    ],
)
def test_broken_priors_are_refused(folder, tmp_path, name, content, sentence):
    broken = tmp_path / "prior"
    shutil.copytree(folder, broken)
    (broken / name).unlink()
    if content is not None:
        (broken / name).write_bytes(content)
    with pytest.raises(UserInputError, match=sentence):
        load_domain_prior(broken)


def test_the_command_trains_what_it_is_told(box_room_collection, tmp_path, capsys):
    require_weights("lpips-alex")
    arguments = ["--preset", "tiny", "--image-size", "16", "--max-images", "8", "--max-steps", "1"]
    main([str(box_room_collection.root), "--output-dir", str(tmp_path / "run"), *arguments, "--report-to", "none"])
    assert "loss on held-out images" in capsys.readouterr().out
    assert load_domain_prior(tmp_path / "run").image_size == 16
    with pytest.raises(SystemExit) as ending:
        main(
            [str(box_room_collection.root), "--output-dir", str(tmp_path / "odd"), "--image-size", "18", *arguments[:2]]
        )
    assert ending.value.code == 2 and "cannot be halved" in capsys.readouterr().err
    again = [str(box_room_collection.root), "--output-dir", str(tmp_path / "maps"), *arguments, "--report-to", "none"]
    with pytest.raises(SystemExit):
        main([*again, "--bev-dropout", "0.5"])
    assert "--condition bev" in capsys.readouterr().err
    main([*again, "--condition", "bev", "--bev-dropout", "0.5"])
    assert load_domain_prior(tmp_path / "maps").maps is not None


def test_features_are_normalised_and_come_back_with_the_prior(box_room_collection, tmp_path):
    require_weights("lpips-vgg")
    require_weights("lpips-alex")
    model = {"image_size": 32, "channels": (8, 8), "attention": (False, True), "head_dim": 8, "space": "features"}
    made = train_prior(box_room_collection, tmp_path / "run", model, TRAINING)
    images = read_square_images(collection_paths(box_room_collection, "train"), 32)
    space = FeatureSpace(32)
    space.fit(images)
    encoded = space(images.float() / 255)
    assert encoded.shape == (36, FeatureSpace.channels, 8, 8) == (36, *space_shape("features", 32)[:1], 8, 8)
    assert encoded.mean((0, 2, 3)).abs().max() < 1e-3 and (encoded.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert torch.allclose(space.preview(encoded), torch.nn.functional.avg_pool2d(images.float() / 255, 4), atol=1e-5)
    prior = load_domain_prior(made)
    assert torch.allclose(prior.encode(images[:4].float() / 255), encoded[:4], atol=1e-4)
    x = (images[:2].float() / 255).requires_grad_()
    distilled = distill(
        prior, x, pick(prior.clean_condition(), range(2)), None, DistillationConfig(guidance="none"), 0.5
    )
    distilled.loss.backward()
    assert distilled.gradient.shape == (2, FeatureSpace.channels, 8, 8) and (x.grad.flatten(1).norm(dim=1) > 0).all()
    (made / "space.safetensors").unlink()
    with pytest.raises(UserInputError, match="is missing"):
        load_domain_prior(made)


def test_components_are_the_directions_of_greatest_variance():
    """What a level's components keep of its variance is what an SVD of the same activations says is possible."""
    require_weights("lpips-vgg")
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    space = FeatureSpace(32)
    space.fit(images)
    level = space._levels(images.float() / 255)[2].movedim(1, -1).flatten(0, 2).double()[::7]
    centred = level - level.mean(0)
    kept = float((centred @ space.components_2.double().T).square().sum())
    assert kept == pytest.approx(float(torch.linalg.svdvals(centred)[:48].square().sum()), rel=1e-3)
    components = space.components_2
    assert (components.gather(1, components.abs().argmax(1, keepdim=True)) > 0).all(), (
        "whichever way a solver turns them"
    )


class LinearJudge(torch.nn.Module):
    """Odds and the mean of every component are multiples of the sum of a place's channels."""

    num_components = 64 + 9

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> Judgement:
        total = sample.sum(1)
        mean = 0.5 * total[:, None].expand(-1, self.num_components, -1, -1)
        return Judgement(3 * total, mean, torch.full((len(sample), self.num_components, 1, 1), math.log(2.0)))


def with_linear_judge(folder: Path) -> DomainPrior:
    plain = load_domain_prior(folder)
    denoiser = PriorDenoiser(**MODEL, embedding_dim=1152, knows_renders=True)
    denoiser.fit(plain.clean_embeddings, torch.rand(36, 9))
    denoiser.judge = LinearJudge()
    scheduler = DDPMScheduler.from_config(json.loads((folder / "scheduler" / "scheduler_config.json").read_text()))
    return DomainPrior(denoiser, PixelSpace(16), scheduler, plain.embedder, plain.clean_embeddings)


def test_the_contrast_of_clean_images_and_renders_is_the_gradient_of_log_odds(folder):
    """Guidance by Bayes' rule: gamma eps(y) + (1 - gamma) eps(y') with eps(y) - eps(y') = -sigma grad log-odds."""
    plain, prior = load_domain_prior(folder), with_linear_judge(folder)
    noisy, timestep = torch.randn(2, 3, 16, 16), torch.tensor([100, 600])
    clean, rendered = pick(prior.clean_condition(), [0, 1]), prior.render_condition(torch.rand(2, 3, 16, 16))
    contrast = prior.contrast(noisy, timestep, clean, rendered)
    sigma = prior.signal_and_noise(timestep)[1]
    assert torch.allclose(contrast, (-sigma * 3).expand_as(noisy))
    guided = guided_noise(prior, noisy, timestep, clean, rendered, 5.0)
    assert torch.allclose(guided, prior.predict_noise(noisy, timestep, clean) + 4 * contrast)
    assert prior.contrast(noisy, timestep, clean, repeat(prior.unconditional(), 2)) is None, "no embedding is meant"
    assert plain.contrast(noisy, timestep, clean, rendered) is None, "it does not know renders"


def test_the_contrast_of_a_style_is_the_gradient_of_its_likelihood(folder):
    """By hand: grad log N(y; x/2, 2) = (y - x/2) / 4 for each component and channel, minus that of a known y'.

    Colours, the last nine components, count ten times.
    """
    prior = with_linear_judge(folder)
    noisy, timestep = torch.randn(2, 3, 16, 16), torch.tensor([100, 600])
    style, renders = prior.condition(torch.rand(2, 3, 16, 16)), prior.render_condition(torch.rand(2, 3, 16, 16))
    sigma = prior.signal_and_noise(timestep)[1]
    y, other = (given["shown"][:, :, None, None] for given in (style, renders))
    weights = torch.tensor([1.0] * 64 + [10.0] * 9).view(1, 73, 1, 1)
    pull = (weights * (y - 0.5 * noisy.sum(1, keepdim=True)) / 4).sum(1, keepdim=True)
    free = prior.contrast(noisy, timestep, style, repeat(prior.unconditional(), 2))
    assert torch.allclose(free, (-sigma * pull).expand_as(noisy), atol=1e-3)
    negative = prior.contrast(noisy, timestep, style, renders)
    expected = -sigma * (3 + (weights * (y - other) / 4).sum(1, keepdim=True))
    assert torch.allclose(negative, expected.expand_as(noisy), atol=1e-3)


def test_colours_of_a_style_move_mean_colours_alone():
    """In a space of features, whose Jacobian turns "darker" into other hues."""
    require_weights("lpips-vgg")
    require_weights("lpips-alex")
    prior = load_prior(PRIOR)
    style = prior.condition(torch.rand(1, 3, 64, 64))
    other = {**style, "shown": torch.cat([style["shown"][:, :-9], style["shown"][:, -9:] - 1], dim=1)}
    noisy, timestep, nothing = torch.randn(1, *prior.denoiser.sample_shape), torch.tensor([800]), prior.unconditional()
    first, second = (prior.contrast(noisy, timestep, given, nothing) for given in (style, other))
    assert (first - second)[:, :3].abs().mean() > 1e-2 and torch.equal(first[:, 3:], second[:, 3:])


def test_embeddings_are_whitened():
    denoiser = PriorDenoiser(**MODEL, embedding_dim=12, judged_components=5)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator) + 3
    moments = torch.rand(200, 9, generator=generator) * torch.logspace(0, -2, 9)
    denoiser.fit(embeddings, moments)
    shown = denoiser.describe(embeddings, moments)
    for part in (shown[:, :5], shown[:, 5:]):
        assert torch.allclose(part.T @ part / 200, torch.eye(part.shape[1]), atol=2e-3)
    assert (denoiser.describe(embeddings + 1000, moments).abs() <= 4).all(), "what the domain has never seen"
    denoiser.fit(embeddings[:3], moments[:3])  # span two directions
    for whitening in (denoiser.judged_embedding, denoiser.judged_colours):
        assert [bool(row.any()) for row in whitening.components[:5]] == [True, True, False, False, False]


def test_colour_moments_of_two_colours():
    """Of an image, half of one and half of another colour: the mean, and a quarter of the squared difference."""
    first, second = torch.tensor([0.2, 0.4, 0.9]), torch.tensor([0.6, 0.4, 0.1])
    image = torch.cat([first.view(3, 1, 1).expand(3, 8, 4), second.view(3, 1, 1).expand(3, 8, 4)], dim=2)[None]
    (moments,) = colour_moments(image)
    assert torch.allclose(moments[:3], (first + second) / 2)
    r, g, b = (first - second) / 2
    assert torch.allclose(moments[3:], torch.stack([r * r, r * g, r * b, g * g, g * b, b * b]), atol=1e-6)


def test_patches_are_places_of_the_network():
    denoiser = PriorDenoiser(**MODEL, embedding_dim=8, patch_size=2, knows_renders=True)
    sample, timestep, embedding = torch.randn(2, 3, 16, 16), torch.tensor([3, 900]), torch.randn(2, 8)
    predicted = denoiser(sample, timestep, embedding)
    assert predicted.shape == sample.shape and denoiser.unet.config.sample_size == 8
    unknown = denoiser(sample, timestep, embedding, origin=torch.tensor([UNKNOWN, UNKNOWN]))
    rendered = denoiser(sample, timestep, embedding, origin=torch.tensor([RENDERED, UNKNOWN]))
    assert torch.equal(predicted, unknown)
    assert not torch.allclose(predicted[0], rendered[0]) and torch.allclose(predicted[1], rendered[1], atol=1e-6)
    with pytest.raises(ValueError, match="patches of 2"):
        PriorDenoiser(**{**MODEL, "image_size": 18}, patch_size=2)


def test_the_small_prior_ships_below_10_megabytes():
    model = {**PRIOR_PRESETS["small"].model, "embedding_dim": 1152, "knows_renders": True}
    count = sum(parameter.numel() for parameter in PriorDenoiser(**model).parameters())
    assert count < 5e6 and 2 * (count + 256 * 1152) < 9.9e6


# Images


def test_squares_are_cut_from_the_middle_and_resized(tmp_path):
    wide = np.zeros((20, 30, 3), np.uint8)
    wide[:, 5:25] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (read_square_images([tmp_path / "wide.png"], 20) == 200).all()
    assert (read_square_images([tmp_path / "wide.png"], 10) == 200).all()
    assert (centre_square(torch.from_numpy(wide).permute(2, 0, 1)) == 200).all()


def test_some_images_are_of_all_scenes_or_all_of_some_scenes(box_room_collection):
    everything = collection_paths(box_room_collection, "train")
    assert chosen_paths(box_room_collection, "train", None, whole_scenes=True) == everything
    assert chosen_paths(box_room_collection, "train", 1000) == everything
    scenes = [{path.parent.parent.name for path in chosen_paths(box_room_collection, "train", 24, w)} for w in (0, 1)]
    assert [len(names) for names in scenes] == [3, 2]
    chosen = chosen_paths(box_room_collection, "train", 24, whole_scenes=True)
    assert chosen == [path for path in everything if path.parent.parent.name in scenes[1]]
    assert len(chosen_paths(box_room_collection, "train", 5, whole_scenes=True)) == 12, "one scene at least"


def test_examples_come_from_files_folders_scenes_and_collections(box_room_collection, tmp_path):
    root, scene = box_room_collection.root, box_room_collection.scene_dir("room_000")
    assert len(collection_paths(box_room_collection, "train")) == 36
    assert example_images(root, 16).shape == (36, 3, 16, 16)
    assert example_images(root, 16, most=5).shape == (5, 3, 16, 16)
    assert example_images(scene, 16).shape == example_images(scene / "images", 16).shape == (12, 3, 16, 16)
    one = example_images(scene / "images" / "source_00.png", 32)
    assert one.shape == (1, 3, 32, 32) and one.min() >= 0 and 0.3 < one.max() <= 1
    with pytest.raises(UserInputError, match="no images of generated scenes"):
        render_images([scene], 16)
    with pytest.raises(UserInputError, match="There is no"):
        example_images(tmp_path / "nothing", 16)
    with pytest.raises(UserInputError, match="no images"):
        example_images(tmp_path, 16)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserInputError, match="not a readable image"):
        example_images(tmp_path, 16)
