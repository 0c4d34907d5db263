"""Priors that observe a place from some views: maps at other poses, training, refining and reconstruction."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nfldm_ns.choice import evenly
from nfldm_ns.commands.train_prior import main
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.cameras import look_along, surround_cameras
from nfldm_ns.generated.scene_files import GeneratedScene, renderer_of
from nfldm_ns.method_configs.refine import refine_trainer_config
from nfldm_ns.reconstruction.prior_refinement import PriorRefinement
from nfldm_ns.reconstruction.reconstruction import ReconstructionConfig, SeenPlace, reconstruct_seen
from nfldm_ns.refine.distillation import DistillationConfig
from nfldm_ns.refine.domain_prior import DomainPrior, PriorDenoiser, load_domain_prior
from nfldm_ns.refine.images import collection_paths
from nfldm_ns.refine.observed_views import (
    MAX_OBSERVED,
    ObservedViewEncoder,
    ObservedViews,
    draw_observed,
    map_channels,
    middle_squares,
    most_seen,
    most_similar_place,
    observed_in,
    observed_maps,
    require_box,
    shared_sight,
    without_depth,
)
from nfldm_ns.refine.prior_losses import PriorLosses, held_out_losses
from nfldm_ns.refine.prior_training import train_prior
from nfldm_ns.refine.refiner import Refiner
from nfldm_ns.refine.settings import RefinementConfig
from nfldm_ns.scenes.collection import read_transforms
from nfldm_ns.scenes.views import Views, index_cameras, make_cameras
from tests.pretrained import require_weights
from tests.small_models import random_grid, small_scene_autoencoder
from tests.test_domain_prior import MODEL, TRAINING
from tests.test_reconstruction import QUICK, lively_pipeline

SIDE = 16


def mean_colours(images: torch.Tensor) -> torch.Tensor:
    return images.mean((2, 3))


@pytest.fixture(scope="module")
def folder(box_room_collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_weights("lpips-alex")
    root = tmp_path_factory.mktemp("observing")
    return train_prior(box_room_collection, root, MODEL, TRAINING, stage1=small_scene_autoencoder())


@pytest.fixture(scope="module")
def prior(folder) -> DomainPrior:
    return load_domain_prior(folder)


def scene_of(collection, name: str) -> GeneratedScene:
    """A place of the collection as stage 1 has it."""
    stage1 = small_scene_autoencoder()
    with torch.no_grad():
        grid = stage1.encode(Views.stack([collection.load_scene(name).source]))
    return GeneratedScene(grid, renderer_of(stage1), surround_cameras(6, (32, 32), 16.0))


# Maps


def test_maps_are_what_stage_1_renders():
    stage1, grid, cameras = small_scene_autoencoder(), random_grid(1), surround_cameras(10, (32, 32), 16.0)
    maps = observed_maps(stage1, grid, cameras, 8)
    assert maps.shape == (10, map_channels(stage1), 8, 8) == (10, 4 + 2, 8, 8)
    with torch.no_grad():
        seen = stage1.render(grid, index_cameras(cameras, None)).maps
    reach = float((grid.aabb[1] - grid.aabb[0]).norm()) / 2
    for found, expected in ((maps[:, :4], seen.features), (maps[:, 4:5], seen.accumulation)):
        assert torch.allclose(found, torch.nn.functional.avg_pool2d(expected[0], 2), atol=1e-5)
    assert torch.allclose(maps[:, 5:] * reach, torch.nn.functional.avg_pool2d(seen.depth[0], 2), atol=1e-4)
    assert (maps[:, 5] > 0).all(), "so a map of what was observed is never taken for none"


def test_middle_squares_see_the_middle():
    cameras = middle_squares(surround_cameras(2, (32, 40), 16.0))
    assert int(cameras.width[0]) == int(cameras.height[0]) == 32
    assert (cameras.cx == 16).all() and (cameras.cy == 16).all() and (cameras.fx == 16).all()


def test_images_are_learned_from_other_views_of_their_place(box_room_collection):
    stage1 = small_scene_autoencoder()
    paths = collection_paths(box_room_collection, "train")[:24]
    found = observed_in(box_room_collection, stage1, mean_colours, paths, 8)
    again = observed_in(box_room_collection, stage1, mean_colours, paths[12:], 8)
    assert torch.equal(again.maps, found.maps[12:]), "whichever places are looked at"
    counts = {len(names) for names in found.observed}
    assert min(counts) >= 1 and max(counts) <= MAX_OBSERVED
    for path, names in zip(paths, found.observed, strict=True):
        assert f"images/{path.name}" not in names
    # By hand, for one image that is learned with depth and one that is learned without.
    root = box_room_collection.root / "scenes"
    place = paths[0].relative_to(root).parts[0]
    transforms, source = read_transforms(root / place), box_room_collection.load_scene(place).source
    chosen = [[transforms.source_names.index(name) for name in names] for names in found.observed[:12]]
    kinds = set()
    for i, views in enumerate(chosen):
        camera = transforms.cameras([f"images/{paths[i].name}"], (32, 32))
        observed = Views.stack([source[views]])
        told = [observed_maps(stage1, stage1.encode(v), camera, 8) for v in (observed, without_depth(observed))]
        same = [torch.allclose(found.maps[i].float(), maps[0], atol=5e-3, rtol=1e-2) for maps in told]
        assert any(same)
        kinds.add(same.index(True))
        assert torch.allclose(found.embeddings[i], source.images[views].mean((2, 3)).mean(0), atol=1e-5)
    assert kinds == {0, 1}


def turned(*yaw: float):
    """Level cameras at the origin with a field of view of 90 degrees; yaw in degrees."""
    count = len(yaw)
    poses = look_along(torch.zeros(count, 3), torch.deg2rad(torch.tensor(yaw)), torch.zeros(count))
    return make_cameras(poses, 16.0, 16.0, 16.0, 16.0, 32, 32)


def test_views_share_what_both_have_in_their_images():
    box = torch.tensor([[-9.0, -9.0, -9.0], [9.0, 9.0, 9.0]])
    shared = shared_sight(turned(0.0, 45.0), turned(0.0, 45.0, 90.0, 180.0), box)
    assert torch.allclose(shared[0, [0, 2, 3]], torch.tensor([1.0, 0.0, 0.0])), "itself, and what begins where it ends"
    assert 0.3 < shared[0, 1] < 0.5, "about half, less in the corners"
    assert shared[1, [0, 2]].tolist() == pytest.approx([float(shared[0, 1])] * 2, abs=0.02)
    flat = torch.tensor([[-9.0, -9.0, -0.01], [9.0, 9.0, 0.01]])
    assert (shared_sight(turned(0.0), turned(0.0, 180.0), flat) == 0).all(), "what lies outside of the box is not seen"


def test_observed_views_are_those_in_which_there_is_most_to_see():
    """Of two sets of views, of which one lacks each; and of several draws, the one that shows most."""
    shared = shared_sight(turned(*range(0, 360, 45)), turned(*range(0, 360, 45)), torch.tensor([[-9.0] * 3, [9.0] * 3]))
    found, kept = [], []
    for seed in range(20):
        subsets = draw_observed(shared, "place", seed, "here")
        mean, chosen = most_seen(shared, subsets, range(8))
        for number, choice in enumerate(chosen):
            assert number not in subsets[choice]
            others = [subset for subset in subsets if number not in subset]
            assert shared[number, subsets[choice]].max() == max(shared[number, subset].max() for subset in others)
        assert all(1 <= len(subset) <= MAX_OBSERVED for subset in subsets) and not set(subsets[0]) & set(subsets[1])
        found.append(mean)
        draw = np.random.default_rng([seed, *b"place"])
        halves = np.array_split(draw.permutation(8), 2)
        first = [sorted(half[: draw.integers(1, MAX_OBSERVED + 1)].tolist()) for half in halves]
        kept.append(most_seen(shared, first, range(8))[0])
    assert all(best >= first for best, first in zip(found, kept, strict=True))
    assert np.mean(found) > 1.2 * np.mean(kept)


def test_a_place_is_most_like_itself(box_room_collection):
    stage1 = small_scene_autoencoder()
    for name in box_room_collection.split("train"):
        source = box_room_collection.load_scene(name).source
        with torch.no_grad():
            grid = stage1.encode(Views.stack([source[evenly(range(source.shape[0]), MAX_OBSERVED)]]))
        found, views = most_similar_place(box_room_collection, stage1, grid)
        assert found == name and 1 <= views.shape[1] <= MAX_OBSERVED


def test_places_of_another_box_are_refused():
    with pytest.raises(UserInputError, match="on such places"):
        require_box(2 * random_grid().aabb, small_scene_autoencoder(), "the scene")


# The denoiser and its training


def test_nothing_observed_is_nothing_said():
    torch.manual_seed(0)
    denoiser = PriorDenoiser(**MODEL, embedding_dim=8, view_channels=6)
    sample, timestep, embedding = torch.randn(2, 3, 16, 16), torch.tensor([3, 900]), torch.randn(2, 8)
    maps = torch.rand(2, 6, SIDE, SIDE)
    maps[1] = 0
    plain, told = denoiser(sample, timestep, embedding), denoiser(sample, timestep, embedding, views=maps)
    assert torch.allclose(plain[1], told[1], atol=1e-6) and not torch.allclose(plain[0], told[0], atol=1e-4)
    with pytest.raises(ValueError, match="without observed views"):
        PriorDenoiser(**MODEL, embedding_dim=8)(sample, timestep, embedding, views=maps)


def test_maps_are_normalised_and_get_no_gradient_where_nothing_was_observed():
    encoder = ObservedViewEncoder(6)
    maps = 5 * torch.randn(50, 6, 4, 4) + 3
    encoder.fit(maps)
    scaled = encoder.scale(maps.movedim(1, -1)).flatten(0, 2)
    assert scaled.mean(0).abs().max() < 1e-4 and (scaled.std(0) - 1).abs().max() < 1e-2
    told = torch.cat([maps[:1], torch.zeros(1, 6, 4, 4)]).requires_grad_()
    encoder(told, torch.zeros(2, 3, 8, 8)).square().sum().backward()
    assert float(told.grad[0].abs().sum()) > 0 and (told.grad[1] == 0).all()


def test_a_prior_that_observes_comes_back_with_its_stage_1(folder, prior):
    made = json.loads((folder / "prior.json").read_text())["made_by"]
    assert made["held_out_loss"] > 0 and made["held_out_loss_without_views"] > 0
    expected = small_scene_autoencoder().state_dict()
    assert prior.observes and all(torch.equal(v, expected[k]) for k, v in prior.stage1.state_dict().items())
    assert not any(parameter.requires_grad for parameter in prior.parameters())
    assert prior.denoiser.config.view_channels == 6 and prior.denoiser.view_encoder.scale.std.min() > 0


def test_the_denoiser_is_told_of_the_place_and_not_of_the_image(box_room_collection, prior):
    """Losses depend on the maps and embeddings of the observed views; of the image's own embedding nothing is told."""
    paths = collection_paths(box_room_collection, "train")[:4]
    observed = observed_in(box_room_collection, prior.stage1, prior.embedder, paths, SIDE)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    told = {}

    class Asked(torch.nn.Module):
        def forward(self, noisy, timestep, embedding, drop, origin, **rest):
            told.update(embedding=embedding, views=rest["views"])
            return prior.denoiser(noisy, timestep, embedding, drop, origin, **rest)

    losses = PriorLosses(
        Asked(), prior.denoiser, prior.space, prior.embedder, images, TRAINING, torch.device("cpu"), observed=observed
    )
    draws = losses.share.draws(0)
    losses.losses([2, 1, 0, 3], torch.tensor([5, 6, 7, 8]), draws, augment=False)
    assert torch.equal(told["embedding"], observed.embeddings[[2, 1, 0, 3]])
    assert torch.equal(told["views"], observed.maps[[2, 1, 0, 3]].float())
    losses.config = replace(TRAINING, view_dropout=1.0)
    losses.losses([2, 1, 0, 3], torch.tensor([5, 6, 7, 8]), losses.share.draws(0))
    assert (told["views"] == 0).all()


def test_what_was_observed_is_made_use_of(prior):
    """Of patterns that nothing tells but the maps: what is lost at much noise falls by what they tell."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 2, (16, 1, 4, 4), generator=generator).float()
    patterns = torch.nn.functional.interpolate(patterns, (16, 16))
    images = (40 + 175 * patterns).expand(-1, 3, -1, -1).to(torch.uint8)
    maps = torch.cat([patterns.expand(-1, 5, -1, -1), torch.ones(16, 1, SIDE, SIDE)], dim=1).half()
    torch.manual_seed(0)
    denoiser = PriorDenoiser(**MODEL, embedding_dim=1152, view_channels=6)
    denoiser.view_encoder.fit(maps)

    def silent(pixels: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pixels), 1152)

    observed = ObservedViews(maps, torch.zeros(16, 1152), [()] * 16)
    config = replace(TRAINING, view_dropout=0.3, schedule=replace(TRAINING.schedule, batch_size=16))
    asked = (denoiser, denoiser, prior.space, silent, images, config, torch.device("cpu"))
    losses = PriorLosses(*asked, observed=observed)
    optimiser = torch.optim.Adam(denoiser.parameters(), lr=1e-2)
    for step in range(60):
        optimiser.zero_grad()
        losses(step)["loss"].backward()
        optimiser.step()
    found = held_out_losses(losses)
    assert found["held_out_loss"] < 0.8 * found["held_out_loss_without_views"], found


# Refining


@pytest.mark.parametrize("guidance", ["none", "negative", "classifier_free"])
def test_each_view_is_told_what_was_observed_of_the_scene(box_room_collection, prior, guidance):
    scene = scene_of(box_room_collection, box_room_collection.split("train")[0])
    config = RefinementConfig(distillation=DistillationConfig(guidance=guidance))
    (term,) = Refiner(scene, prior, config).terms
    views = term.start.own_views((32, 32))
    assert views.shape == (1, MAX_OBSERVED) and (views.depths > 0).all()
    cameras = term.start.views(3, torch.Generator().manual_seed(0))
    wanted, unwanted = term.conditions(cameras, {}, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = observed_maps(prior.stage1, prior.stage1.encode(views), index_cameras(cameras, 0), SIDE)
    assert torch.equal(wanted["views"], expected)
    if guidance == "negative":
        assert torch.equal(unwanted["views"], expected), "y and y' differ in what they look like alone"
    if guidance == "classifier_free":
        assert (unwanted["views"] == 0).all()


def test_similar_clean_places_are_observed_in_the_place_of_the_scene(box_room_collection, prior):
    name = box_room_collection.split("train")[1]
    scene = scene_of(box_room_collection, name)
    plain = DistillationConfig(guidance="none")
    config = RefinementConfig(distillation=plain, observed="similar", clean_images=box_room_collection.root)
    (term,) = Refiner(scene, prior, config).terms
    with torch.no_grad():
        grid = prior.stage1.encode(term.start.own_views((32, 32)))
    _, views = most_similar_place(box_room_collection, prior.stage1, grid)
    assert torch.equal(term.wanted["embedding"], prior.condition(views.images[0])["embedding"])
    with pytest.raises(UserInputError, match="--clean-images"):
        Refiner(scene, prior, replace(config, clean_images=None))


def test_refining_by_what_was_observed_changes_the_scene(box_room_collection, prior):
    scene = scene_of(box_room_collection, box_room_collection.split("train")[0])
    asked = DistillationConfig(objective="multistep", guidance="none", sample_lpips_mult=0.0, reconstruction_steps=2)
    refiner = Refiner(scene, prior, RefinementConfig(distillation=asked))
    grid = replace(scene.grid, features=scene.grid.features.clone().requires_grad_())
    losses, metrics = refiner.losses(grid, scene.renderer, 0.5, torch.Generator().manual_seed(0))
    losses["distillation_loss"].backward()
    assert metrics["skipped_views"] == 0 and float(grid.features.grad.abs().sum()) > 0


# Reconstruction


def test_answers_are_refined_where_no_image_shows_them(box_room_collection, prior):
    pipeline = lively_pipeline()
    source = box_room_collection.load_scene(box_room_collection.split("test")[0]).source
    views = Views.stack([source[[0, 3]]])
    refinement = PriorRefinement(prior, refine_trainer_config().optimizers, steps=2)
    refinement.config.distillation.sample_lpips_mult = 0.0
    config: ReconstructionConfig = QUICK
    seen = SeenPlace.of(pipeline, views, config)
    plain = reconstruct_seen(pipeline, seen, 0, config)
    refined = reconstruct_seen(pipeline, seen, 0, config, refinement=refinement)
    kept = seen.visibility.weights().expand_as(plain.grid.features) == 1
    assert bool(kept.any()) and torch.equal(refined.grid.features[kept], seen.grid.features[kept])
    assert not torch.equal(refined.grid.features[~kept], plain.grid.features[~kept])
    assert torch.equal(refined.latents.coarse, plain.latents.coarse)
    again = reconstruct_seen(pipeline, seen, 0, config, refinement=refinement)
    assert torch.equal(again.grid.features, refined.grid.features), "the same seed, the same answer"
    with pytest.raises(UserInputError, match="--prior-steps"):
        replace(refinement, steps=0)


def test_the_command_trains_a_prior_that_observes(box_room_collection, tmp_path, capsys):
    require_weights("lpips-alex")
    small_scene_autoencoder().save_pretrained(tmp_path / "stage1")
    arguments = [str(box_room_collection.root), "--preset", "tiny", "--image-size", "16", "--max-images", "8"]
    arguments += ["--output-dir", str(tmp_path / "run"), "--max-steps", "1", "--report-to", "none"]
    with pytest.raises(SystemExit):
        main([*arguments, "--view-dropout", "0.5"])
    assert "--condition views" in capsys.readouterr().err
    main([*arguments, "--condition", "views", "--stage1", str(tmp_path / "stage1"), "--view-dropout", "0.5"])
    assert load_domain_prior(tmp_path / "run").observes
