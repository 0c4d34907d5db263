"""Editing scenes: regions, resampling, combining, interpolation, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from nfldm_ns.commands import edit, sample
from nfldm_ns.diffusion.inpainting import Inpainting, NoiseLevels, stretches
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, Steps, scene_generators
from nfldm_ns.diffusion.windows import slerp
from nfldm_ns.editing.blending import blend_voxels
from nfldm_ns.editing.combining import combine_scenes, harmonise_seams
from nfldm_ns.editing.interpolation import interpolate_scenes
from nfldm_ns.editing.region import (
    Region,
    box_region,
    everywhere,
    half_plane_region,
    mask_region,
    parse_region,
)
from nfldm_ns.editing.resampling import resample_region
from nfldm_ns.editing.scenes import (
    encode_again,
    encode_real_scene,
    latents_of,
    load_scene,
    scene_code_of,
    with_latents,
    write_edited_scene,
)
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.scene_files import GeneratedScene, half_precision, load_generated_scene, renderer_of
from nfldm_ns.scenes.views import index_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid, voxel_centres
from tests.small_models import random_grid, small_pipeline, small_scene_autoencoder
from tests.synthetic import AABB, make_box_room_collection

STEPS = 4
SCHEDULERS = [
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
]


def lively_pipeline() -> NFLDMPipeline:
    """Denoisers that answer to what they see: untrained ones begin with zeros as their last weights."""
    torch.manual_seed(0)
    pipeline = small_pipeline()
    for name in ("coarse_denoiser", "fine_denoiser"):
        torch.nn.init.normal_(getattr(pipeline, name).unet.conv_out.weight, std=0.1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> NFLDMPipeline:
    return lively_pipeline()


def sampled_scene(pipeline: NFLDMPipeline, seed: int, steps: Steps = STEPS) -> GeneratedScene:
    output = pipeline(1, scene_generators(seed, 1), num_inference_steps=steps)
    scene = GeneratedScene(
        half_precision(output.grids),
        renderer_of(pipeline.scene_autoencoder),
        index_cameras(output.cameras, 0),
        provenance={
            "seed": seed,
            "command": "nfldm-sample",
            "num_inference_steps": list(steps) if isinstance(steps, tuple) else steps,
        },
    )
    return with_latents(scene, output.latents)


@pytest.fixture(scope="module")
def scenes(pipeline) -> list[GeneratedScene]:
    return [sampled_scene(pipeline, seed) for seed in range(3)]


def equal_voxels(first: VoxelGrid, second: VoxelGrid, where: torch.Tensor | None = None) -> bool:
    where = torch.ones(first.shape[1:], dtype=torch.bool) if where is None else where
    return torch.equal(first.density[..., where], second.density[..., where]) and torch.equal(
        first.features[..., where], second.features[..., where]
    )


# Regions: the plane is 6 x 6 m with 16 x 16 columns of 0.375 m, c has 4 x 4 cells of 1.5 m


def test_a_box_holds_the_columns_whose_centres_it_holds():
    grid = random_grid(1)
    region = box_region(grid, (0.0, -3.0, 3.0, -1.5))
    points = voxel_centres((1, 16, 16), grid.aabb)[0]
    expected = (points[..., 0] > 0) & (points[..., 1] < -1.5)
    assert torch.equal(region.columns, expected) and region.share == 8 * 4 / 256
    assert region.cells(4).tolist() == [[False, False, True, True], *[[False] * 4] * 3], "the south-east, row 0 south"
    assert box_region(grid, (-3, -3, 3, 3)).covers_all


def test_weights_fall_from_one_to_exactly_zero_over_the_seam():
    region = half_plane_region(random_grid(1), 1, 0, 0)
    weights = region.weights(1.0)
    assert torch.equal(weights, weights[:1].expand_as(weights))
    torch.testing.assert_close(weights[0, 4:9], torch.tensor([0.0, 0.0, 0.25, 0.625, 1.0]))
    assert torch.equal(region.weights(0.0), region.columns.float())
    assert Region(torch.zeros(16, 16, dtype=torch.bool), (6.0, 6.0)).weights(1.0).sum() == 0
    assert region.border(0.4).columns[0].tolist() == [7 <= i <= 8 for i in range(16)]


def test_a_mask_is_north_up_like_the_maps_of_collections(tmp_path):
    picture = np.zeros((32, 32), np.uint8)
    picture[:4, :12] = 255  # north-west
    Image.fromarray(picture).save(tmp_path / "mask.png")
    grid = random_grid(1)
    region = mask_region(grid, tmp_path / "mask.png")
    assert torch.equal(region.columns, box_region(grid, (-3, 3 - 6 * 4 / 32, -3 + 6 * 12 / 32, 3)).columns)
    # A column of voxels in the north-west, as a point of the world finds it.
    grid.density.zero_()
    grid.density[..., region.columns] = 1.0
    inside, outside = (grid.sample(torch.tensor([[[x, 2.6, 0.0]]]))[0].item() for x in (-2.5, 2.5))
    assert inside == pytest.approx(1) and outside == 0
    region.picture().save(tmp_path / "again.png")
    assert torch.equal(mask_region(grid, tmp_path / "again.png").columns, region.columns)


def test_a_mask_agrees_with_the_map_of_an_asymmetric_scene(tmp_path):
    collection = make_box_room_collection(tmp_path, num_train=1, num_test=1, num_val=0, num_source=2, num_target=1)
    bev = collection.load_scene("room_000").bev
    Image.fromarray(np.where(bev == 1, 255, 0).astype(np.uint8)).save(tmp_path / "floor.png")
    region = mask_region(random_grid(1), tmp_path / "floor.png")
    assert torch.equal(region.columns, torch.from_numpy(bev[::-1].copy()) == 1), "rows of V go north"
    assert not torch.equal(region.columns, region.columns.flip(0)), "or this test says nothing"


@pytest.mark.parametrize(
    ("text", "count"),
    [("box -3 -3 0 0", 64), ("box -3,-3,0,0", 64), ("x > 0", 128), ("y<-1.5", 64), ("half-plane 1 1 0", 120)],
)
def test_places_in_words(text, count):
    assert int(parse_region(random_grid(1), text).columns.sum()) == count


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("box -4 0 1 1", "reaches outside the scene, which spans -3 to 3 m in x"),
        ("box 1 0 1 1", "is empty"),
        ("box 0.01 0.01 0.02 0.02", "centre of no column"),
        ("x > 7", "centre of no column"),
        ("half-plane 0 0 1", "no half-plane"),
        ("box 1 2 3", "does not say where"),
        ("x > east", "does not say where"),
        ("circle 0 0 1", "does not say where"),
        ("mask nowhere.png", "There is no mask nowhere.png"),
    ],
)
def test_places_that_cannot_be_meant(text, words):
    with pytest.raises(UserInputError, match=words):
        parse_region(random_grid(1), text)


def test_masks_that_cannot_be_meant(tmp_path):
    path = tmp_path / "mask.png"
    for picture, words in (
        (Image.new("RGB", (16, 16), "white"), "has mode RGB"),
        (Image.new("P", (16, 16), 1), "has mode P"),
        (Image.new("L", (16, 8), 255), "is 16 x 8 pixels, but the scene is 6 x 6 m"),
        (Image.new("L", (16, 16), 0), "holds the centre of no column"),
    ):
        picture.save(path)
        with pytest.raises(UserInputError, match=words):
            mask_region(random_grid(1), path)
    path.write_text("no picture")
    with pytest.raises(UserInputError, match="not a readable image"):
        mask_region(random_grid(1), path)


# Blending


def test_blending_keeps_both_ends_and_what_agrees_bit_for_bit():
    first, second = random_grid(1, seed=1), random_grid(1, seed=2)
    weights = half_plane_region(first, 1, 0.3, 0).weights(1.5)
    mixed = blend_voxels(first, second, weights)
    assert equal_voxels(mixed, first, weights == 0) and equal_voxels(mixed, second, weights == 1)
    assert equal_voxels(blend_voxels(first, first, weights), first)
    between = (weights > 0) & (weights < 1)
    assert bool(between.any()) and not equal_voxels(mixed, first, between)
    assert torch.equal(mixed.background, first.background)


def test_features_of_empty_voxels_do_not_stain_those_of_full_ones():
    first, second = random_grid(1, seed=1), random_grid(1, seed=2)
    first.density.fill_(0.0)
    second.density.fill_(50.0)
    mixed = blend_voxels(first, second, torch.full((16, 16), 0.5))
    torch.testing.assert_close(mixed.features, second.features, atol=0.02, rtol=0.02)
    assert torch.all(mixed.density == 25)


# The diffusion in a region


def test_stretches_cover_the_last_steps_once_and_keep_groups_whole():
    assert stretches(7, 1, 3) == [range(3), range(3, 6), range(6, 7)]
    assert stretches(9, 2, 2) == [range(4), range(4, 8), range(8, 9)]
    assert stretches(10, 1, 5, strength=0.3) == [range(7, 10)]
    assert stretches(10, 1, 5, strength=1e-6) == [range(9, 10)]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noising_in_two_ways_gives_one_level(pipeline, name):
    """The forward process to an earlier level has the variance that this level has."""
    scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(6)
    levels = NoiseLevels.of(scheduler)
    assert (float(levels.signal[-1]), float(levels.noise[-1])) == (1, 0)
    assert bool((levels.noise[1:] <= levels.noise[:-1] + 1e-4).all())
    clean, first, second = torch.randn(3, 200_000)
    target, level = 2, len(scheduler.timesteps) - 1
    noisy = levels.back(levels.add(clean, first, level), second, level, target)
    expected = levels.add(clean, first, target)
    torch.testing.assert_close(noisy.std(), expected.std(), atol=0, rtol=0.02)
    torch.testing.assert_close((noisy * clean).mean(), (expected * clean).mean(), atol=0.03, rtol=0.02)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "HeunDiscreteScheduler"])  # it samples noise
def test_resampling_with_every_scheduler(name):
    pipeline = lively_pipeline()
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    scene = sampled_scene(pipeline, 0)
    region = box_region(scene.grid, (0, 0, 3, 3))
    edited = resample_region(pipeline, scene, region, 5, num_inference_steps=STEPS, resamplings=2, jump_length=2)
    cells = region.cells(4)
    old, new = scene.latents["coarse"], edited.latents["coarse"]
    assert torch.equal(old[..., ~cells], new[..., ~cells]), "what is kept is kept bit for bit"
    assert bool((old[..., cells] != new[..., cells]).all())
    assert bool(new.isfinite().all()) and float(new.abs().max()) < 2 * float(old.abs().max()), "of the samples' size"
    whole = resample_region(pipeline, scene, everywhere(scene.grid), 5, num_inference_steps=STEPS)
    code = scene_code_of(pipeline, scene)
    fresh = pipeline(1, scene_generators(5, 1), num_inference_steps=STEPS, scene_code=code)
    assert torch.equal(whole.latents["coarse"], fresh.latents.coarse[0])
    assert equal_voxels(whole.grid, fresh.grids), "everywhere is fresh sampling"


def test_the_same_seed_gives_the_same_scene_and_another_another(pipeline, scenes):
    region = box_region(scenes[0].grid, (0, 0, 3, 3))
    first, same, other = (
        resample_region(pipeline, scenes[0], region, seed, num_inference_steps=STEPS) for seed in (5, 5, 6)
    )
    assert equal_voxels(first.grid, same.grid)
    assert all(torch.equal(value, same.latents[name]) for name, value in first.latents.items())
    cells = region.cells(4)
    assert bool((first.latents["coarse"][..., cells] != other.latents["coarse"][..., cells]).all())


def test_a_region_beyond_its_seam_leaves_voxels_bit_for_bit(pipeline, scenes):
    scene, region = scenes[0], half_plane_region(scenes[0].grid, 1, 0, 1)
    edited = resample_region(pipeline, scene, region, 1, seam_m=0.8, num_inference_steps=STEPS)
    beyond = region.distance() >= 0.8
    assert equal_voxels(edited.grid, scene.grid, beyond)
    assert not equal_voxels(edited.grid, scene.grid, region.columns)
    assert torch.equal(edited.grid.background, scene.grid.background)
    assert torch.equal(edited.latents["global_latent"], scene.latents["global_latent"])
    fine = edited.latents["fine"] == scene.latents["fine"]
    assert torch.equal(fine.all(dim=0), ~region.cells(4).repeat_interleave(4, 0).repeat_interleave(4, 1))


def test_c_and_f_begin_with_the_noise_of_the_seed_whether_or_not_g_is_given(pipeline, scenes):
    code = scene_code_of(pipeline, scenes[1])
    given = pipeline(1, scene_generators(3, 1), num_inference_steps=2, scene_code=code).latents
    noise = pipeline.draw_noise(1, scene_generators(3, 1))
    again = pipeline(1, noise=noise, num_inference_steps=2, scene_code=code).latents
    assert torch.equal(given.coarse, again.coarse) and torch.equal(given.fine, again.fine)


def test_an_empty_region_returns_the_scene(pipeline, scenes):
    nothing = Region(torch.zeros(16, 16, dtype=torch.bool), (6.0, 6.0))
    edited = resample_region(pipeline, scenes[0], nothing, 3, num_inference_steps=STEPS)
    assert equal_voxels(edited.grid, scenes[0].grid)
    assert all(torch.equal(value, edited.latents[key]) for key, value in scenes[0].latents.items())


def test_the_part_that_is_kept_decides_what_the_new_part_becomes(pipeline, scenes):
    """The same noise in the region, other scenes around it."""
    region = box_region(scenes[0].grid, (0, 0, 3, 3))
    foreign = replace(scenes[0], latents={**scenes[0].latents, "coarse": scenes[1].latents["coarse"]})
    first, second = (
        resample_region(pipeline, scene, region, 4, num_inference_steps=STEPS) for scene in (scenes[0], foreign)
    )
    cells = region.cells(4)
    assert not torch.allclose(first.latents["coarse"][..., cells], second.latents["coarse"][..., cells])


def test_little_strength_changes_little(pipeline, scenes):
    region = box_region(scenes[0].grid, (0, 0, 3, 3))

    def change(strength: float) -> float:
        edited = resample_region(
            pipeline, scenes[0], region, 4, num_inference_steps=10, strength=strength, resamplings=1
        )
        return float((edited.latents["coarse"] - scenes[0].latents["coarse"]).abs().mean())

    assert change(0.1) < 0.7 * change(1.0)


def test_pipeline_inpaints_several_scenes_and_calls_back(pipeline, scenes):
    latents = latents_of(pipeline, scenes[0])
    cells = box_region(scenes[0].grid, (0, 0, 3, 3)).cells(4)
    nowhere = torch.zeros(16, 16, dtype=torch.bool)
    seen = []
    output = pipeline(
        2,
        scene_generators(0, 2),
        num_inference_steps=4,
        scene_code=scene_code_of(pipeline, scenes[0]).expand(2, -1),
        inpainting=Inpainting(latents, cells, nowhere, resamplings=2, jump_length=2),
        callback_on_step_end=lambda pipe, step, time, values: seen.append((pipe.stage, step, pipe.num_timesteps)),
    )
    assert seen == [("coarse", step, 8) for step in range(8)], "4 steps, each walked twice; nothing of f is sampled"
    assert torch.equal(output.latents.fine, latents.fine.expand(2, -1, -1, -1))
    assert not torch.equal(output.latents.coarse[0], output.latents.coarse[1])
    alone = pipeline(
        1,
        scene_generators(1, 1),
        num_inference_steps=4,
        scene_code=scene_code_of(pipeline, scenes[0]),
        inpainting=Inpainting(latents, cells, nowhere, resamplings=2, jump_length=2),
    )
    torch.testing.assert_close(alone.latents.coarse[0], output.latents.coarse[1], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="needs the scene_code"):
        pipeline(1, inpainting=Inpainting(latents, cells, nowhere))
    with pytest.raises(ValueError, match="coarse_region"):
        Inpainting(latents, nowhere, nowhere)
    with pytest.raises(ValueError, match="strength"):
        Inpainting(latents, cells, nowhere, strength=0)
    with pytest.raises(ValueError, match="resamplings"):
        Inpainting(latents, cells, nowhere, resamplings=0)


def test_given_noise_is_the_noise_of_the_seed(pipeline):
    noise = pipeline.draw_noise(1, scene_generators(3, 1))
    given = pipeline(1, noise=noise, num_inference_steps=STEPS).latents
    drawn = pipeline(1, scene_generators(3, 1), num_inference_steps=STEPS).latents
    assert all(torch.equal(value, drawn.state_dict()[key]) for key, value in given.state_dict().items())


# Real scenes


def test_real_scenes_are_edited_like_generated_ones(pipeline, box_room_collection):
    real = encode_real_scene(pipeline, box_room_collection, "room_004", "somewhere")
    assert real.provenance["scene"] == "room_004" and real.cameras.shape == (8,)
    source = box_room_collection.batch([box_room_collection.load_scene("room_004")]).source
    with torch.no_grad():
        encoded = half_precision(pipeline.scene_autoencoder.encode(source))
    assert equal_voxels(real.grid, encoded)
    region = half_plane_region(real.grid, 0, 1, 0)
    edited = resample_region(pipeline, real, region, 1, num_inference_steps=STEPS)
    assert equal_voxels(edited.grid, real.grid, region.weights(1.0) == 0)
    with pytest.raises(UserInputError, match="has no scene nowhere"):
        encode_real_scene(pipeline, box_room_collection, "nowhere")


# Combining


def test_combining_a_scene_with_itself_is_that_scene(scenes):
    region = half_plane_region(scenes[0].grid, 1, 1, 0)
    assert equal_voxels(combine_scenes([scenes[0], scenes[0]], [region]).grid, scenes[0].grid)


def test_each_scene_is_seen_in_its_place(scenes):
    grid = scenes[0].grid
    east, north = half_plane_region(grid, 1, 0, 0), half_plane_region(grid, 0, 1, 1)
    combined = combine_scenes(scenes, [east, north], seam_m=0.7)
    later, middle = north.weights(0.7), east.weights(0.7)
    assert equal_voxels(combined.grid, scenes[2].grid, later == 1)
    assert equal_voxels(combined.grid, scenes[1].grid, (later == 0) & (middle == 1))
    assert equal_voxels(combined.grid, scenes[0].grid, (later == 0) & (middle == 0))
    assert combined.latents == {} and len(combined.provenance["sources"]) == 3
    with pytest.raises(ValueError, match="3 scenes need 2 regions"):
        combine_scenes(scenes, [east])


def test_scenes_that_do_not_belong_together(scenes):
    region = [half_plane_region(scenes[0].grid, 1, 0, 0)]
    wider = replace(scenes[1], grid=replace(scenes[1].grid, aabb=2 * torch.tensor(AABB)))
    with pytest.raises(UserInputError, match="use scenes of one pipeline"):
        combine_scenes([scenes[0], wider], region)
    foreign = replace(scenes[1], renderer=renderer_of(small_scene_autoencoder(seed=1)))
    with pytest.raises(UserInputError, match="another decoder"):
        combine_scenes([scenes[0], foreign], region)


def test_harmony_changes_the_seam_alone(pipeline, scenes):
    region = half_plane_region(scenes[0].grid, 1, 0, 0)
    joined = combine_scenes(scenes[:2], [region], seam_m=0.4)
    settings = {"strength": 0.5, "seam_m": 0.4, "num_inference_steps": STEPS}
    harmonised = harmonise_seams(pipeline, joined, [region], 0, **settings)
    reach = 0.4 + 0.4  # the seam to both sides, and the soft seam around it
    far = (region.distance() > reach) | (Region(~region.columns, region.extent).distance() > reach)
    assert equal_voxels(harmonised.grid, joined.grid, far) and bool(far.any())
    assert not equal_voxels(harmonised.grid, joined.grid, ~far)
    assert equal_voxels(harmonise_seams(pipeline, joined, [region], 0, **settings).grid, harmonised.grid)
    assert harmonised.provenance["harmonised"]["strength"] == 0.5
    assert set(harmonised.latents) == {"global_latent", "coarse", "fine"}


# Interpolation


def test_slerp_keeps_ends_and_length_and_divides_the_angle():
    first, second = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    assert torch.equal(slerp(first, second, 0.0), first) and torch.equal(slerp(first, second, 1.0), second)
    torch.testing.assert_close(slerp(first, second, 1 / 3), 2 * torch.tensor([3**0.5 / 2, 0.5]))
    torch.testing.assert_close(slerp(first, first, 0.3), first)
    a, b = torch.randn(2, 100_000)
    assert float(slerp(a, b, 0.4).std()) == pytest.approx(1, abs=0.01)


def test_interpolation_begins_and_ends_with_the_scenes(pipeline, scenes):
    way = list(interpolate_scenes(pipeline, scenes[0], scenes[1], 4, num_inference_steps=STEPS))
    assert len(way) == 4 and way[0] is scenes[0] and way[-1] is scenes[1]
    assert way[1].provenance["seeds"] == [0, 1] and way[1].provenance["share"] == pytest.approx(1 / 3)
    steps = [
        float((way[i + 1].latents["global_latent"] - way[i].latents["global_latent"]).norm())
        for i in range(len(way) - 1)
    ]
    whole = float((way[-1].latents["global_latent"] - way[0].latents["global_latent"]).norm())
    assert max(steps) < 0.8 * whole, "no jump"


def test_interpolation_takes_the_steps_that_scenes_were_sampled_with(pipeline):
    steps = (3, 2, 1)
    first, second = (sampled_scene(pipeline, seed, steps) for seed in range(2))
    way = list(interpolate_scenes(pipeline, first, second, 3))
    assert way[1].provenance["num_inference_steps"] == steps
    damaged = replace(first, provenance={**first.provenance, "num_inference_steps": [3, 0, 1]})
    with pytest.raises(UserInputError, match="must be at least 1.*give --num-inference-steps"):
        next(interpolate_scenes(pipeline, damaged, second, 3))


def test_interpolation_needs_the_noise(pipeline, scenes):
    foreign = replace(scenes[1], provenance={"seed": 7})
    with pytest.raises(UserInputError, match="not what this pipeline makes of the seed 7"):
        next(interpolate_scenes(pipeline, scenes[0], foreign, 3, num_inference_steps=STEPS))
    with pytest.raises(UserInputError, match="seed None"):
        next(interpolate_scenes(pipeline, replace(scenes[1], provenance={}), scenes[0], 3, num_inference_steps=STEPS))
    with pytest.raises(UserInputError, match="give at least 2"):
        next(interpolate_scenes(pipeline, scenes[0], scenes[1], 1))


# Folders and the command


def test_an_edited_scene_is_a_generated_scene(pipeline, scenes, tmp_path):
    region = box_region(scenes[0].grid, (0, 0, 3, 3))
    edited = resample_region(pipeline, scenes[0], region, 2, num_inference_steps=STEPS)
    write_edited_scene(tmp_path / "edited", edited, region)
    again = load_generated_scene(tmp_path / "edited")
    assert equal_voxels(again.grid, half_precision(edited.grid))
    assert equal_voxels(again.grid, scenes[0].grid, region.weights(1.0) == 0), "also after storage in half precision"
    assert all(torch.equal(value, again.latents[key]) for key, value in edited.latents.items())
    assert again.provenance["region"]["box"] == [0, 0, 3, 3] and again.provenance["seed"] == 2
    assert again.provenance["sources"] == [scenes[0].provenance]
    assert torch.equal(mask_region(again.grid, tmp_path / "edited" / "region.png").columns, region.columns)
    assert (tmp_path / "edited" / "config.yml").is_file()


def test_scenes_without_latents_say_how_to_get_them(pipeline, scenes):
    bare = replace(scenes[0], latents={})
    region = everywhere(bare.grid)
    with pytest.raises(UserInputError, match="nfldm-edit encode"):
        resample_region(pipeline, bare, region)
    resample_region(pipeline, encode_again(pipeline, bare), region, num_inference_steps=2)
    odd = replace(scenes[0], latents={**scenes[0].latents, "coarse": torch.zeros(4, 2, 8, 8)})
    with pytest.raises(UserInputError, match="give the pipeline that made the scene"):
        resample_region(pipeline, odd, region)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """pipeline/, generated/scene_000000 and scene_000001, rooms/."""
    root = tmp_path_factory.mktemp("editing")
    lively_pipeline().save_pretrained(root / "pipeline")
    options = f"--num-scenes 2 --num-inference-steps {STEPS} --device cpu --output-dir {root / 'generated'}"
    sample.main([str(root / "pipeline"), *options.split()])
    make_box_room_collection(root / "rooms", num_train=1, num_test=1, num_val=0, num_source=2, num_target=1)
    return root


def run(command: str, *more: object) -> None:
    edit.main([*command.split(), *map(str, more), "--device", "cpu"])


def test_the_command_edits_generated_scenes(made, tmp_path):
    a, b = (made / "generated" / f"scene_{seed:06d}" for seed in range(2))
    out = ["--output-dir", tmp_path, "--num-inference-steps", STEPS]
    run("resample", a, "--box", 0, 0, 3, 3, "--seed", 4, "--num-scenes", 2, *out)
    variants = [load_scene(tmp_path / f"scene_000000_resampled_{seed:06d}") for seed in (4, 5)]
    assert not equal_voxels(variants[0].grid, variants[1].grid)
    before = load_scene(a)
    beyond = box_region(before.grid, (0, 0, 3, 3)).weights(1.0) == 0
    assert all(equal_voxels(scene.grid, before.grid, beyond) for scene in variants)
    first = tmp_path / "scene_000000_resampled_000004"
    run("resample", a, "--mask", first / "region.png", "--seed", 4, *out)
    assert equal_voxels(load_scene(first).grid, variants[0].grid), "the written region is the region"
    run("combine", a, b, "--where", "x > 0", "--harmonise", 0.5, *out)
    combined = load_scene(tmp_path / "scene_000000_with_scene_000001")
    assert combined.provenance["sources"][1]["folder"] == str(b) and combined.provenance["harmonised"]["seed"] == 0
    run("interpolate", a, b, "--frames", 3, "--keep-scenes", "--camera", "turn", *out)
    way = tmp_path / "scene_000000_to_scene_000001"
    assert (way / "video.mp4").stat().st_size > 0
    assert sorted(path.name for path in way.iterdir()) == ["frame_0000", "frame_0001", "frame_0002", "video.mp4"]
    assert equal_voxels(load_scene(way / "frame_0002").grid, load_scene(b).grid)
    again = json.loads((way / "frame_0001" / "scene.json").read_text())["provenance"]
    assert again["command"] == "nfldm-edit interpolate" and again["share"] == 0.5


def test_the_command_edits_real_and_joined_scenes(made, tmp_path):
    a = made / "generated" / "scene_000000"
    run("encode", made / "rooms", "--pipeline", made / "pipeline", "--scenes", "room_001", "--output-dir", tmp_path)
    real = tmp_path / "room_001"
    out = ["--output-dir", tmp_path]
    run("resample", real, "--box", -3, -3, 0, 0, "--num-inference-steps", 2, *out)
    run("combine", real, a, "--where", "box 0 0 3 3", *out)
    joined = tmp_path / "room_001_with_scene_000000"
    with pytest.raises(SystemExit):
        run("resample", joined, "--box", -3, -3, 0, 0, *out)
    run("encode", joined, "--pipeline", made / "pipeline", *out)
    run("resample", tmp_path / f"{joined.name}_encoded", "--box", -3, -3, 0, 0, "--num-inference-steps", 2, *out)
    assert equal_voxels(load_scene(tmp_path / f"{joined.name}_encoded").grid, load_scene(joined).grid)


def test_the_command_explains_bad_input(made, tmp_path, capsys):
    a, b = (made / "generated" / f"scene_{seed:06d}" for seed in range(2))
    mask = tmp_path / "mask.png"
    Image.new("RGB", (16, 16)).save(mask)
    (tmp_path / "taken" / "scene_000000_resampled_000000").mkdir(parents=True)
    box = ["--box", 0, 0, 3, 3]
    for arguments, words in (
        (["resample", a], "give one of --box and --mask"),
        (["resample", a, *box, "--mask", mask], "give one of --box and --mask"),
        (["resample", a, "--mask", mask], "has mode RGB"),
        (["resample", a, "--box", 0, 0, 30, 3], "reaches outside the scene"),
        (["resample", tmp_path, *box], "no generated scene"),
        (["resample", a, *box, "--pipeline", tmp_path], "model_index.json"),
        (["resample", a, *box, "--strength", 0], "--strength"),
        (["resample", a, *box, "--seam", -1], "--seam"),
        (["resample", a, *box, "--resamplings", 0], "--resamplings"),
        (["resample", a, *box, "--num-scenes", 0], "--num-scenes"),
        (["resample", a, *box, "--output-dir", tmp_path / "taken"], "is no generated scene"),
        (["combine", a, "--where", "x > 0"], "two scenes"),
        (["combine", a, b, "--where", "x > 0", "y > 0"], "2 scenes need 1 places"),
        (["combine", a, b, "--where", "somewhere"], "does not say where"),
        (["combine", a, b, "--where", "x > 0", "--harmonise", 2], "--harmonise"),
        (["interpolate", a, b, "--frames", 1], "at least 2"),
        (["interpolate", a, b, "--num-inference-steps", 9], "not what this pipeline makes"),
        (["encode", made / "rooms", "--pipeline", made / "pipeline"], "name some with --scenes"),
        (["encode", made / "rooms", "--scenes", "room_000"], "give one with --pipeline"),
        (["encode", tmp_path, "--scenes", "room_000"], "collection.json"),
        (["encode", a, "--scenes", "room_000"], "leave out --scenes"),
    ):
        more = [] if "--output-dir" in arguments else ["--output-dir", tmp_path / "out"]
        with pytest.raises(SystemExit) as end:
            edit.main([*map(str, [*arguments, *more])])
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.startswith("error: ") and words in error, (arguments, error)
        assert error.count("\n") == 1 and error.rstrip().endswith("."), error
    assert not list(tmp_path.glob("out/*")), "nothing half-written"
