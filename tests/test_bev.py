"""Semantic maps from above as a condition of the denoisers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from nfldm_ns.commands import edit, sample
from nfldm_ns.demo.denoisers import load_latents, save_latents
from nfldm_ns.diffusion.bev import MapEncoder, to_grid_order, turn_map
from nfldm_ns.diffusion.denoisers import CoarseDenoiser, FineDenoiser, GlobalDenoiser
from nfldm_ns.diffusion.latent_memory import encode_latents
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, check_agreement, load_pipeline, scene_generators
from nfldm_ns.diffusion.training import (
    STAGES,
    DiffusionLosses,
    DiffusionTrainingConfig,
    evaluate_denoiser,
    held_out_errors,
    make_scheduler,
    new_denoiser,
    save_pipeline,
    train_denoiser,
)
from nfldm_ns.diffusion.validation import DenoiserPictures
from nfldm_ns.editing.region import box_region
from nfldm_ns.editing.resampling import resample_region
from nfldm_ns.editing.scenes import load_scene
from nfldm_ns.errors import UserInputError
from nfldm_ns.sampling.scenes import sample_scenes
from nfldm_ns.scenes.bev_maps import read_drawn_map
from nfldm_ns.scenes.voxel_grid import VoxelGrid, voxel_centres
from nfldm_ns.scenes.writing import bev_png, write_bev
from nfldm_ns.training.draws import ItemDraws
from nfldm_ns.training.identity import model_hash
from nfldm_ns.training.schedule import Schedule
from tests.interruption import Interrupted, interrupt
from tests.small_models import DENOISER_SIZES, small_pipeline, small_scene_autoencoder
from tests.synthetic import AABB, BEV_CLASSES, BEV_SIZE

SCHEDULE = Schedule(max_steps=6, batch_size=2, log_every=2, checkpoint_every=3)
TRAINING = DiffusionTrainingConfig(schedule=SCHEDULE, condition="bev", bev_dropout=0.5, condition_dropout=0.2)
MAPS = {"bev_classes": 2, "bev_size": (BEV_SIZE, BEV_SIZE), "bev_dropout": 0.1}


@pytest.fixture(scope="module")
def memory(store, latent_autoencoder):
    return encode_latents(store, latent_autoencoder, store.splits["train"], with_maps=True)


def denoisers(**maps):
    """The three denoisers of 4 x 2 x 4 x 4 and 4 x 16 x 16 latents."""
    torch.manual_seed(0)
    return {
        "global": GlobalDenoiser(8, 2, **DENOISER_SIZES["global"], **maps).eval(),
        "coarse": CoarseDenoiser((4, 2, 4, 4), 18, **DENOISER_SIZES["coarse"], **maps).eval(),
        "fine": FineDenoiser((4, 16, 16), (4, 2, 4, 4), code_dim=18, **DENOISER_SIZES["fine"], **maps).eval(),
    }


def learned(denoiser):
    """With weights that are not zero anywhere, so that all that enters counts."""
    generator = torch.Generator().manual_seed(0)
    for parameter in denoiser.parameters():
        if not bool(parameter.any()) or parameter.ndim > 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return denoiser


def inputs(stage, batch=2):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(batch, *shape, generator=generator)

    time = torch.full((batch,), 500)
    if stage == "global":
        return draw(18), time
    return (draw(8, 4, 4), time, draw(18)) if stage == "coarse" else (draw(4, 16, 16), time, draw(18), draw(4, 2, 4, 4))


def random_maps(batch=2, seed=0, size=BEV_SIZE):
    return torch.randint(2, (batch, size, size), generator=torch.Generator().manual_seed(seed))


# Geometry


def test_a_map_lies_on_the_voxels_it_is_of():
    """A wall north-east of the origin: in the first row and last column of a file, the last ones of V."""
    centres = voxel_centres((4, 16, 16), torch.tensor(AABB))
    walls = ((centres[..., 0] > 2) & (centres[..., 1] > 1)).float()
    bev = torch.zeros(16, 16, dtype=torch.uint8)
    cells = (torch.arange(16) + 0.5) / 16
    x, y = -3 + 6 * cells, 3 - 6 * cells  # docs/architecture.md: row 0 is the north
    bev[(y[:, None] > 1) & (x[None] > 2)] = 1
    assert torch.equal(to_grid_order(bev).float(), walls[0])
    assert torch.equal(to_grid_order(to_grid_order(bev)), bev)


@pytest.mark.parametrize("turn", range(4))
def test_a_map_turns_with_its_voxels(turn):
    walls = random_maps(3, seed=5, size=8)
    density = walls[:, None, None].expand(-1, 1, 2, -1, -1).float()
    grid = VoxelGrid(density, torch.zeros(3, 1, 2, 8, 8), torch.tensor(AABB))
    turned = turn_map(walls, turn)
    assert torch.equal(grid.rotate90(turn).density[:, 0, 0], turned.float())
    encoder = MapEncoder(2, (2, 2), 4, 4)
    areas = encoder.areas(walls, (3, 3))
    torch.testing.assert_close(encoder.areas(turned, (3, 3)), torch.rot90(areas, -turn, (-2, -1)))


def test_maps_of_latents_are_those_of_the_turned_scenes(store, latent_autoencoder, memory):
    collection, scene_id = store.load_collection(), store.splits["train"][1]
    bev = torch.from_numpy(np.flipud(collection.load_scene(scene_id).bev).copy())
    assert memory.maps.shape == (3, 4, BEV_SIZE, BEV_SIZE) and memory.maps.dtype == torch.uint8
    assert memory.bev_classes == BEV_CLASSES
    for turn in range(4):
        assert torch.equal(memory.maps[1, turn], turn_map(bev, turn))
    picked = memory.pick_maps([1, 0], torch.tensor([2, 3]), "cpu")
    assert torch.equal(picked, torch.stack([memory.maps[1, 2], memory.maps[0, 3]]).long())


# Denoisers


@pytest.mark.parametrize("stage", STAGES)
def test_without_maps_nothing_changes(stage):
    plain, conditioned = denoisers()[stage], denoisers(**MAPS)[stage]
    added = set(conditioned.state_dict()) - set(plain.state_dict())
    assert added and all(name.startswith(("map_encoder.", "project_")) for name in added)
    assert not any("map" in name or "classes" in name for name in plain.state_dict())
    values = inputs(stage)
    with pytest.raises(ValueError, match="maps of"):
        plain(*values, bev=random_maps())
    before = {k: v for k, v in plain.config.items() if not k.startswith(("bev_", "_"))}
    old = type(plain).from_config(before)
    assert old.config.bev_classes == 0 and model_hash(plain) != model_hash(conditioned)
    old.load_state_dict(plain.state_dict())
    assert model_hash(old) == model_hash(plain) and torch.equal(old.eval()(*values), plain(*values))


@pytest.mark.parametrize("stage", STAGES)
def test_a_dropped_map_is_no_map_and_others_count(stage):
    psi = learned(denoisers(**MAPS)[stage])
    values, maps = inputs(stage), random_maps()
    with torch.no_grad():
        none, seen = psi(*values), psi(*values, bev=maps)
        everywhere = torch.ones(2, dtype=torch.bool)
        torch.testing.assert_close(psi(*values, bev=maps, drop_bev=everywhere), none)
        torch.testing.assert_close(psi(*values, bev=1 - maps, drop_bev=everywhere), none)
        torch.testing.assert_close(psi(*values, bev=maps, drop_bev=~everywhere), seen)
        half = psi(*values, bev=maps, drop_bev=torch.tensor([True, False]))
        torch.testing.assert_close(half, torch.stack([none[0], seen[1]]), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(seen, none) and not torch.allclose(psi(*values, bev=1 - maps), seen)
        assert psi(*values, bev=maps.byte()).equal(seen), "whatever the kind of integers"


def test_the_map_enters_where_it_lies():
    """Nothing but the aligned inputs: what changes in one corner of the map changes the corner of the prediction."""
    psi = learned(denoisers(**MAPS)["fine"])
    maps = random_maps(1)
    other = maps.clone()
    other[:, :4, :4] = 1 - other[:, :4, :4]
    areas = [psi.project_classes(psi.map_encoder.areas(m, (16, 16))) for m in (maps, other)]
    moved = (areas[0] - areas[1]).abs().sum(1)[0] > 1e-6
    assert bool(moved[:4, :4].any()) and not bool(moved[6:, :].any()) and not bool(moved[:, 6:].any())


# Training


def train(stage, memory, latent_autoencoder, folder, config=TRAINING, on_progress=lambda share, losses: None):
    sizes = DENOISER_SIZES[stage]
    return train_denoiser(stage, memory, latent_autoencoder, folder, sizes, config, on_progress=on_progress)


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_training_with_maps_is_equal_to_the_bit(stage, memory, latent_autoencoder, tmp_path):
    whole = train(stage, memory, latent_autoencoder, tmp_path / "whole")

    with pytest.raises(Interrupted):
        train(stage, memory, latent_autoencoder, tmp_path / "parts", on_progress=interrupt)
    resumed = train(stage, memory, latent_autoencoder, tmp_path / "parts")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    run = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert run["model"]["bev_classes"] == 2 and run["model"]["bev_size"] == [BEV_SIZE, BEV_SIZE]
    assert run["model"]["bev_dropout"] == 0.5
    assert [c["name"] for c in run["bev_classes"]] == ["void", "floor"]
    with pytest.raises(UserInputError, match="bev_dropout|model"):
        train(stage, memory, latent_autoencoder, tmp_path / "parts", replace(TRAINING, bev_dropout=0.1))


def test_the_map_is_dropped_apart_from_the_code(memory, latent_autoencoder, tmp_path):
    psi = train("coarse", memory, latent_autoencoder, tmp_path)
    losses = DiffusionLosses("coarse", psi, psi, memory, TRAINING, torch.device("cpu"))
    count = 400
    _, conditions = losses.sample_and_conditions([0] * count, ItemDraws(0, range(count)))
    code, bev = conditions["drop_code"].float(), conditions["drop_bev"].float()
    assert float(code.mean()) == pytest.approx(0.2, abs=0.07) and float(bev.mean()) == pytest.approx(0.5, abs=0.08)
    assert float((code * bev).mean()) == pytest.approx(0.1, abs=0.05), "independent"
    _, conditions = losses.sample_and_conditions([0, 1], ItemDraws(0, range(2)), augment=False)
    assert "drop_bev" not in conditions and conditions["bev"].shape == (2, BEV_SIZE, BEV_SIZE)
    with_map = evaluate_denoiser("coarse", psi, memory, TRAINING)
    assert with_map != evaluate_denoiser("coarse", psi, memory, TRAINING, with_map=False)
    errors = held_out_errors("coarse", psi, memory, TRAINING)
    assert errors["with_map"]["mean"] != errors["without_map"]["mean"] and errors["scenes"] == 3


def test_maps_that_are_missing_are_named(store, memory, latent_autoencoder, tmp_path):
    with pytest.raises(UserInputError, match="without BEV maps: encode them again"):
        train("coarse", replace(memory, maps=None), latent_autoencoder, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    collection = store.load_collection()
    (collection.scene_dir("room_001") / "bev.png").rename(tmp_path / "bev.png")
    try:
        with pytest.raises(UserInputError, match=r"rooms has no BEV maps \(the scene room_001 has no bev.png\)"):
            encode_latents(store, latent_autoencoder, store.splits["train"], with_maps=True)
    finally:
        (tmp_path / "bev.png").rename(collection.scene_dir("room_001") / "bev.png")
    collection.bev_classes = [BEV_CLASSES[0]]
    with pytest.raises(UserInputError, match="has the class 1, which collection.json does not name"):
        collection.load_bev("room_001")
    collection.bev_classes = []
    with pytest.raises(UserInputError, match="collection.json names no bev_classes"):
        collection.load_bev("room_001")


def test_latents_with_maps_survive_the_way_to_another_process(memory, tmp_path):
    save_latents(tmp_path / "latents", memory)
    loaded = load_latents(tmp_path / "latents")
    assert torch.equal(loaded.maps, memory.maps) and loaded.bev_classes == memory.bev_classes


# The pipeline


def map_pipeline(**changes):
    """A pipeline that knows maps, with weights that are not zero."""
    pipeline = small_pipeline(maps={**MAPS, **changes})
    for name in ("global_denoiser", "coarse_denoiser", "fine_denoiser"):
        learned(getattr(pipeline, name))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def file_map(seed=0):
    return random_maps(1, seed)[0].to(torch.uint8)


def test_saved_and_loaded_pipeline_follows_the_map_as_before(tmp_path):
    pipeline = map_pipeline()
    pipeline.save_pretrained(tmp_path)
    expected = pipeline(2, scene_generators(0, 2), num_inference_steps=2, bev=file_map())
    for again in (load_pipeline(tmp_path), NFLDMPipeline.from_pretrained(tmp_path)):
        assert again.bev_classes == BEV_CLASSES and again.bev_size == (BEV_SIZE, BEV_SIZE)
        output = again(2, scene_generators(0, 2), num_inference_steps=2, bev=file_map().expand(2, -1, -1))
        assert torch.equal(output.grids.density, expected.grids.density)
        assert torch.equal(output.cameras.camera_to_worlds, expected.cameras.camera_to_worlds)
    without = pipeline(2, scene_generators(0, 2), num_inference_steps=2)
    other = pipeline(2, scene_generators(0, 2), num_inference_steps=2, bev=1 - file_map())
    for name in ("global_latent", "coarse", "fine"):
        values = [getattr(output.latents, name) for output in (expected, without, other)]
        assert not torch.allclose(values[0], values[1]) and not torch.allclose(values[0], values[2]), name
    half = pipeline.to(torch.bfloat16)(1, scene_generators(0, 1), num_inference_steps=1, bev=file_map())
    assert bool(half.grids.density.isfinite().all())


def test_the_pipeline_gives_the_denoisers_the_map_as_voxels_lie():
    pipeline, seen = map_pipeline(), []
    pipeline.fine_denoiser.map_encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pipeline(1, num_inference_steps=1, bev=file_map())
    assert torch.equal(seen[0][0], file_map().flip(0).long())


def test_guidance_leads_away_from_no_code_and_no_map():
    def coarse(pipeline, scale, **arguments):
        arguments |= {"num_inference_steps": 1, "scene_code": torch.zeros(1, 18), "output_type": "latent"}
        return pipeline(1, scene_generators(0, 1), guidance_scale=scale, **arguments).latents.coarse

    pipeline = map_pipeline()
    plain, without = coarse(pipeline, 1.0, bev=file_map()), coarse(pipeline, 1.0)
    strong = coarse(pipeline, 3.0, bev=file_map())
    torch.testing.assert_close(strong, without + 3 * (plain - without), atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="--condition-dropout, but CoarseDenoiser always saw the scene code"):
        coarse(pipeline, 3.0)
    with pytest.raises(ValueError, match="--condition-dropout or --bev-dropout, but CoarseDenoiser always saw both"):
        coarse(map_pipeline(bev_dropout=0.0), 3.0, bev=file_map())


def test_maps_that_the_pipeline_does_not_know_are_refused():
    pipeline = map_pipeline()
    with pytest.raises(UserInputError, match="trained without BEV maps"):
        small_pipeline()(1, bev=file_map())
    with pytest.raises(UserInputError, match=r"map is \(8, 16\) \(height, width\), but those .* are \(16, 16\)"):
        pipeline(1, bev=file_map()[:8])
    with pytest.raises(UserInputError, match=r"the class 2, but the generator knows \[0, 1\]"):
        pipeline(1, bev=file_map() + 1)
    with pytest.raises(ValueError, match="one map or one per scene"):
        pipeline(3, bev=random_maps(2))
    with pytest.raises(ValueError, match="whole numbers"):
        pipeline(1, bev=file_map().float())


def test_components_that_know_other_maps_are_refused():
    other = small_pipeline()
    for name in ("global_denoiser", "coarse_denoiser", "fine_denoiser"):
        mixed = map_pipeline()
        mixed.register_modules(**{name: getattr(other, name)})
        with pytest.raises(UserInputError, match="number of BEV classes"):
            check_agreement(mixed)
    pipeline = map_pipeline()
    pipeline.coarse_denoiser.register_to_config(bev_size=(8, 8))
    with pytest.raises(UserInputError, match="size of BEV maps of coarse_denoiser"):
        check_agreement(pipeline)
    pipeline = map_pipeline()
    pipeline.register_to_config(bev_classes=[])
    with pytest.raises(UserInputError, match="number of BEV classes of global_denoiser is 2, but that of model_index"):
        check_agreement(pipeline)


def test_trained_denoisers_become_a_pipeline_if_all_know_the_same_maps(memory, latent_autoencoder, tmp_path):
    short = replace(TRAINING, schedule=replace(SCHEDULE, max_steps=1))
    for stage in STAGES:
        config = replace(short, condition="none" if stage == "fine" else "bev")
        train(stage, memory, latent_autoencoder, tmp_path / stage, config)
    with pytest.raises(UserInputError, match="know BEV maps, that of fine knows none: train all with one --condition"):
        save_pipeline(tmp_path, small_scene_autoencoder(), latent_autoencoder)
    (tmp_path / "fine").rename(tmp_path / "plain")
    train("fine", memory, latent_autoencoder, tmp_path / "fine", short)
    pipeline = load_pipeline(save_pipeline(tmp_path, small_scene_autoencoder(), latent_autoencoder))
    assert pipeline.bev_classes == BEV_CLASSES and pipeline.bev_size == (BEV_SIZE, BEV_SIZE)


# Maps that were drawn


def test_drawn_maps_are_read_by_their_colours(tmp_path):
    bev = file_map().numpy()
    write_bev(tmp_path / "bev.png", bev, BEV_CLASSES)
    palette = Image.open(tmp_path / "bev.png")
    palette.convert("RGB").save(tmp_path / "rgb.png")
    palette.convert("RGBA").save(tmp_path / "rgba.png")
    palette.convert("RGB").quantize(5).save(tmp_path / "other.png")  # a palette of its own
    for name in ("bev", "rgb", "rgba", "other"):
        found = read_drawn_map(tmp_path / f"{name}.png", BEV_CLASSES, (BEV_SIZE, BEV_SIZE))
        assert found.dtype == np.uint8 and np.array_equal(found, bev), name


def test_each_mistake_in_a_drawn_map_is_named(tmp_path):
    path, size = tmp_path / "map.png", (BEV_SIZE, BEV_SIZE)
    colours = np.zeros((BEV_SIZE, BEV_SIZE, 3), np.uint8)

    def refuse(image, match):
        image.save(path)
        with pytest.raises(UserInputError, match=match):
            read_drawn_map(path, BEV_CLASSES, size)

    allowed = r"void \(0, 0, 0\), floor \(160, 160, 160\)"
    colours[3, 5], colours[7, 1] = (160, 160, 161), (9, 9, 9)
    wrong = rf"column 5, row 3 of .*map.png .* has the colour \(160, 160, 161\), which is no class: .*{allowed}"
    refuse(Image.fromarray(colours), wrong)
    clear = Image.fromarray(np.zeros((BEV_SIZE, BEV_SIZE, 4), np.uint8))
    refuse(clear, f"column 0, row 0 .* is transparent.*{allowed}")
    refuse(Image.new("L", size), f"has mode L, but a map is an RGB or palette image.*{allowed}")
    refuse(Image.new("RGB", (20, 10)), "is 20 x 10 pixels, but the generator's maps are 16 x 16")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserInputError, match="not a readable image"):
        read_drawn_map(path, BEV_CLASSES, size)
    with pytest.raises(UserInputError, match="There is no map"):
        read_drawn_map(tmp_path / "nowhere.png", BEV_CLASSES, size)


# Commands


def expect_one_sentence(main, args, capsys, *words):
    with pytest.raises(SystemExit) as exit_info:
        main([str(arg) for arg in args])
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and error.startswith("error: ") and "Traceback" not in error
    assert all(word in error for word in words), error


def test_sampling_and_editing_with_maps(tmp_path, capsys):
    pipeline, plain = tmp_path / "pipeline", tmp_path / "plain"
    map_pipeline().save_pretrained(pipeline)
    small_pipeline().save_pretrained(plain)
    drawn = [tmp_path / "a.png", tmp_path / "b.png"]
    for seed, path in enumerate(drawn):
        path.write_bytes(bev_png(file_map(seed).numpy(), BEV_CLASSES))
    few = ["--num-inference-steps", "2", "--device", "cpu"]
    arguments = [pipeline, "--num-scenes", "2", *few, "--output-dir"]
    sample.main([str(a) for a in [*arguments, tmp_path / "two", "--bev", *drawn]])
    sample.main([str(a) for a in [*arguments, tmp_path / "one", "--bev", drawn[0], "--guidance-scale", "2"]])
    for i, path in enumerate(drawn):
        folder = tmp_path / "two" / f"scene_{i:06d}"
        assert (folder / "bev.png").read_bytes() == path.read_bytes()
        assert load_scene(folder).provenance["bev"] == "bev.png"
    assert (tmp_path / "one" / "scene_000001" / "bev.png").read_bytes() == drawn[0].read_bytes()
    assert load_scene(tmp_path / "one" / "scene_000000").provenance["guidance_scale"] == 2
    first = load_scene(tmp_path / "two" / "scene_000000")
    loaded = load_pipeline(pipeline)
    alone = next(sample_scenes(loaded, tmp_path / "c", 1, num_inference_steps=2, maps=[file_map().numpy()]))
    assert torch.equal(load_scene(alone).grid.density, first.grid.density), "the command does the same"

    expect_one_sentence(sample.main, [*arguments, tmp_path / "x", "--bev", *drawn, drawn[0]], capsys, "3 maps for 2")
    command = [plain, *few, "--output-dir", tmp_path / "x"]
    expect_one_sentence(sample.main, [*command, "--bev", drawn[0]], capsys, "without BEV maps", "--condition bev")
    expect_one_sentence(sample.main, [*command, "--guidance-scale", "2"], capsys, "--condition-dropout")
    Image.new("RGB", (BEV_SIZE, BEV_SIZE), (1, 2, 3)).save(tmp_path / "wrong.png")
    command = [pipeline, *few, "--output-dir", tmp_path / "x", "--bev", tmp_path / "wrong.png"]
    expect_one_sentence(sample.main, command, capsys, "column 0, row 0", "(1, 2, 3)", "floor (160, 160, 160)")
    assert not (tmp_path / "x").exists()

    region = ["--box", "0", "0", "3", "3", *few, "--output-dir", tmp_path / "edited", "--resamplings", "1"]
    command = ["resample", tmp_path / "two" / "scene_000000", *region]
    edit.main([str(a) for a in [*command, "--bev", drawn[1]]])
    folder = tmp_path / "edited" / "scene_000000_resampled_000000"
    assert (folder / "bev.png").read_bytes() == drawn[1].read_bytes()
    grid = load_scene(folder).grid
    box = box_region(first.grid, (0, 0, 3, 3))
    unlike = resample_region(loaded, first, box, num_inference_steps=2, resamplings=1)
    assert not torch.allclose(grid.density, unlike.grid.density), "the map counts"
    assert torch.equal(grid.density[..., 0, 0], first.grid.density[..., 0, 0]), "beyond the seam nothing changes"
    expect_one_sentence(edit.main, [*command, "--pipeline", plain, "--bev", drawn[1]], capsys, "without BEV maps")
    command = ["interpolate", tmp_path / "two" / "scene_000000", tmp_path / "two" / "scene_000001", *few]
    expect_one_sentence(edit.main, command, capsys, "was sampled with a map")


@pytest.mark.parametrize("stage", ["global", "fine"])
def test_pictures_while_training_show_the_map(stage, memory, latent_autoencoder):
    seen = []
    psi = learned(new_denoiser(stage, {**DENOISER_SIZES[stage], **MAPS}, memory, latent_autoencoder)).eval()
    psi.map_encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pictures = DenoiserPictures(stage, psi, make_scheduler(), memory, latent_autoencoder, small_scene_autoencoder())
    widths = {name: image.width for name, image in pictures().items()}
    assert torch.equal(seen[0], memory.maps[:, 0].long())
    memory_without = replace(memory, maps=None)
    plain = new_denoiser(stage, DENOISER_SIZES[stage], memory_without, latent_autoencoder).eval()
    shown = DenoiserPictures(
        stage, plain, make_scheduler(), memory_without, latent_autoencoder, small_scene_autoencoder()
    )()
    assert all(widths[name] > image.width for name, image in shown.items()), "one column more"
