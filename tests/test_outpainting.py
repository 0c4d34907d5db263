"""Denoisers that are told a part of the scene: masks, zero weights, training, inpainting, worlds and the command."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from nfldm_ns.commands import train_diffusion
from nfldm_ns.diffusion.inpainting import Inpainting
from nfldm_ns.diffusion.outpainting import KINDS, draw_known_cells, drawn_for, to_columns
from nfldm_ns.diffusion.pipeline import check_agreement, load_pipeline, scene_generators
from nfldm_ns.diffusion.training import (
    DiffusionLosses,
    DiffusionTrainingConfig,
    load_initial_denoiser,
    new_denoiser,
    save_pipeline,
    train_denoiser,
)
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.voxel_store import encode_collection
from nfldm_ns.sampling.world_folders import extend_world, make_world
from nfldm_ns.sampling.worlds import WorldSettings
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.training.draws import ItemDraws
from nfldm_ns.training.identity import model_hash
from nfldm_ns.training.schedule import Schedule
from tests.interruption import Interrupted, interrupt
from tests.small_models import (
    DENOISER_SIZES,
    small_pipeline,
    small_scene_autoencoder,
)
from tests.synthetic import make_box_room_collection
from tests.test_benchmarks import script

SCHEDULE = Schedule(max_steps=6, batch_size=2, log_every=2, checkpoint_every=3)
PLAIN = DiffusionTrainingConfig(schedule=SCHEDULE)
TRAINING = replace(PLAIN, known_share=0.75)
STEPS = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    collection = make_box_room_collection(root / "rooms", num_train=3, num_test=3)
    return encode_collection(collection, small_scene_autoencoder(), root / "voxels")


def train(stage, memory, latent_autoencoder, folder, config=TRAINING, **others):
    return train_denoiser(stage, memory, latent_autoencoder, folder, DENOISER_SIZES[stage], config, **others)


def outpainter(seed: int = 0):
    """A pipeline of outpainters with random weights, which answer to what they see."""
    pipeline = small_pipeline(seed)
    torch.manual_seed(seed)
    for name in ("coarse_denoiser", "fine_denoiser"):
        plain = getattr(pipeline, name)
        told = type(plain)(**{k: v for k, v in plain.config.items() if not k.startswith("_")} | {"known_share": 0.5})
        torch.nn.init.normal_(told.unet.conv_out.weight, std=0.1)
        torch.nn.init.normal_(told.unet.conv_in.further.weight, std=0.3)
        told.latent.mean.copy_(0.5 * torch.randn_like(told.latent.mean))
        pipeline.register_modules(**{name: told.eval()})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def random_condition(denoiser, share_known: float = 0.5):
    """A sample, what a denoiser of c or f gets beside it, and a known part."""
    generator = torch.Generator().manual_seed(0)
    sample, known = (torch.randn(2, *denoiser.sample_shape, generator=generator) for _ in range(2))
    cells = torch.rand(2, *denoiser.sample_shape[1:], generator=generator) < share_known
    conditions = {"scene_code": torch.randn(2, denoiser.config.code_dim, generator=generator)}
    if hasattr(denoiser, "coarse"):
        conditions["coarse"] = torch.randn(2, *denoiser.config.coarse_shape, generator=generator)
    return (sample, torch.tensor([3, 700])), conditions, {"known": known, "known_cells": cells}


# Masks


def is_a_rectangle(cells) -> bool:
    rows, columns = cells.any(1), cells.any(0)
    whole = rows[:, None] & columns[None, :]
    runs = all(int((line[1:] != line[:-1]).sum()) <= 2 - int(line[0]) for line in (rows, columns))
    return bool((cells == whole).all()) and runs


@pytest.mark.parametrize("size", [(4, 4), (12, 12), (5, 7), (2, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_known_parts_are_of_the_kinds_named(kind, size):
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        cells = draw_known_cells(size, generator, kind)
        assert cells.shape == size and bool(cells.any()) and not bool(cells.all())
        full_rows, full_columns = cells.all(1), cells.all(0)
        corners = int(cells[0, 0]) + int(cells[0, -1]) + int(cells[-1, 0]) + int(cells[-1, -1])
        if kind == "side":
            assert is_a_rectangle(cells) and bool(full_rows.any()) != bool(full_columns.any()) and corners == 2
        elif kind == "corner":
            assert is_a_rectangle(cells) and not full_rows.any() and not full_columns.any() and corners == 1
        elif kind == "l_shape":
            assert is_a_rectangle(~cells) and bool(full_rows.any()) and bool(full_columns.any()) and corners == 3
        else:
            assert is_a_rectangle(~cells)


def test_all_kinds_sides_and_widths_are_drawn():
    generator = torch.Generator().manual_seed(0)
    drawn = {tuple(draw_known_cells((3, 3), generator).flatten().tolist()) for _ in range(2000)}
    sides, corners, boxes_inside = 4 * 2, 4 * 4, 9  # and as many L-shapes as corners
    assert len(drawn) == sides + 2 * corners + boxes_inside


def test_a_share_of_scenes_is_told_nothing():
    draw = drawn_for((4, 4), 0.25)
    generator = torch.Generator().manual_seed(0)
    told = sum(bool(draw(generator).any()) for _ in range(2000))
    assert 0.22 < told / 2000 < 0.28
    assert to_columns(torch.eye(2, dtype=torch.bool), 2).int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 1],
        [0, 0, 1, 1],
    ]


# Denoisers


@pytest.mark.parametrize("stage", ["coarse", "fine"])
def test_new_channels_leave_the_bare_model_to_the_bit(stage, memory, latent_autoencoder, tmp_path):
    bare = train(stage, memory, latent_autoencoder, tmp_path / "bare", PLAIN)
    told = new_denoiser(stage, {**DENOISER_SIZES[stage], "known_share": 0.75}, memory, latent_autoencoder).eval()
    untold = new_denoiser(stage, DENOISER_SIZES[stage], memory, latent_autoencoder)
    assert set(told.state_dict()) - set(untold.state_dict()) == {"unet.conv_in.further.weight"}
    told.load_state_dict(bare.state_dict(), strict=False)
    told.unet.set_attn_processor(AttnProcessor())  # as training does on a CPU
    given, conditions, known = random_condition(bare)
    expected = bare(*given, **conditions)
    assert expected.abs().max() > 0
    assert torch.equal(told(*given, **conditions), expected), "told nothing"
    assert torch.equal(told(*given, **conditions, **known), expected), "told something, with weights of zero"
    with pytest.raises(ValueError, match="was not trained with known parts"):
        bare(*given, **conditions, **known)


def test_what_is_told_counts_where_it_is_known_alone():
    denoiser = outpainter().coarse_denoiser
    given, conditions, known = random_condition(denoiser)
    found = denoiser(*given, **conditions, **known)
    other = torch.where(known["known_cells"][:, None], known["known"], 100.0)
    assert torch.equal(denoiser(*given, **conditions, known=other, known_cells=known["known_cells"]), found)
    assert not torch.allclose(denoiser(*given, **conditions), found)
    nothing = torch.zeros_like(known["known_cells"])
    assert torch.equal(
        denoiser(*given, **conditions, known=other, known_cells=nothing), denoiser(*given, **conditions)
    ), "nothing known is as if nothing had been said"
    mean = denoiser.latent.mean.expand_as(other)
    told = denoiser(*given, **conditions, known=mean, known_cells=known["known_cells"])
    assert not torch.allclose(told, denoiser(*given, **conditions)), "the mask itself is seen"


def test_a_bare_model_has_the_fingerprint_it_had():
    pipeline = small_pipeline()
    digest = model_hash(pipeline.coarse_denoiser)
    pipeline.coarse_denoiser.register_to_config(known_share=0.0)
    assert model_hash(pipeline.coarse_denoiser) == digest
    assert model_hash(outpainter().coarse_denoiser) != digest


# Training


@pytest.mark.parametrize("stage", ["coarse", "fine"])
def test_training_tells_the_clean_latent_of_a_share_of_scenes(stage, memory, latent_autoencoder):
    denoiser = new_denoiser(stage, {**DENOISER_SIZES[stage], "known_share": 0.75}, memory, latent_autoencoder)
    losses = DiffusionLosses(stage, denoiser, denoiser, memory, TRAINING, torch.device("cpu"))
    count = 64
    clean, conditions = losses.sample_and_conditions([0] * count, ItemDraws(0, range(count)))
    cells = conditions["known_cells"]
    assert cells.shape == (count, *clean.shape[2:])
    assert 0.5 < float(cells.flatten(1).any(1).float().mean()) < 0.95
    torch.testing.assert_close(denoiser.latent(conditions["known"]), clean, atol=0, rtol=0)
    scale = clean.shape[-1] // 4
    assert torch.equal(to_columns(cells[:, ::scale, ::scale], scale), cells), "whole cells of c"
    _, judged = losses.sample_and_conditions([0], ItemDraws(0, range(1)), augment=False)
    assert "known" not in judged, "errors that are compared are those of whole scenes"


@pytest.mark.parametrize("stage", ["coarse", "fine"])
def test_what_is_known_is_not_learned_again(stage, memory, latent_autoencoder):
    denoiser = new_denoiser(stage, {**DENOISER_SIZES[stage], "known_share": 0.75}, memory, latent_autoencoder)

    def loss(wrong: str) -> float:
        def predict(noisy, timestep, known_cells, **conditions):
            cells = {"known": known_cells, "unknown": ~known_cells, "none": torch.zeros_like(known_cells)}[wrong]
            return torch.where(cells[:, None], 100.0, 0.0).expand_as(noisy)

        losses = DiffusionLosses(stage, predict, denoiser, memory, TRAINING, torch.device("cpu"))
        return float(losses.loss([0] * 8, torch.full((8,), 500), ItemDraws(3, range(8))))

    assert loss("known") == loss("none")
    assert loss("unknown") > 1000 * loss("none")
    assert loss("none") == pytest.approx(1, rel=0.5), "a mean over the cells that count: v has variance 1"


@pytest.mark.parametrize("stage", ["coarse", "fine"])
def test_resumed_training_is_equal_to_the_bit(stage, memory, latent_autoencoder, tmp_path):
    whole = train(stage, memory, latent_autoencoder, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(stage, memory, latent_autoencoder, tmp_path / "parts", on_progress=interrupt)
    parts = train(stage, memory, latent_autoencoder, tmp_path / "parts")
    assert whole.unet.conv_in.further.weight.any(), "the new channels learn"
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    with pytest.raises(UserInputError, match="known_share"):
        train(stage, memory, latent_autoencoder, tmp_path / "parts", replace(TRAINING, known_share=0.5))


def test_a_bare_denoiser_is_extended_by_zeros(memory, latent_autoencoder, tmp_path):
    still = replace(TRAINING, schedule=replace(SCHEDULE, learning_rate=0.0, weight_decay=0.0))
    bare = train("coarse", memory, latent_autoencoder, tmp_path / "bare" / "coarse", PLAIN)
    initial = load_initial_denoiser(tmp_path / "bare", "coarse")
    told = train("coarse", memory, latent_autoencoder, tmp_path / "told" / "coarse", still, initial=initial)
    assert told.config.known_share == 0.75 and not told.unet.conv_in.further.weight.any()
    for name, value in bare.state_dict().items():
        assert torch.equal(told.state_dict()[name], value), name
    learned = train("coarse", memory, latent_autoencoder, tmp_path / "learned" / "coarse", TRAINING, initial=initial)
    again = train(
        "coarse",
        memory,
        latent_autoencoder,
        tmp_path / "again" / "coarse",
        replace(still, known_share=0.5),
        initial=learned,
    )
    assert torch.equal(again.unet.conv_in.further.weight, learned.unet.conv_in.further.weight), "another share will do"
    with pytest.raises(UserInputError, match=r"does not fit .*known_share"):
        train("coarse", memory, latent_autoencoder, tmp_path / "other" / "coarse", PLAIN, initial=learned)


def test_only_outpainters_of_both_latents_become_a_pipeline(memory, latent_autoencoder, tmp_path):
    for stage in ("global", "coarse", "fine"):
        train(stage, memory, latent_autoencoder, tmp_path / "run" / stage)
    saved = save_pipeline(tmp_path / "run", small_scene_autoencoder(), latent_autoencoder)
    assert load_pipeline(saved).outpaints
    shutil.rmtree(tmp_path / "run" / "fine")
    train("fine", memory, latent_autoencoder, tmp_path / "run" / "fine", PLAIN)
    with pytest.raises(UserInputError, match="that of f is no outpainter"):
        save_pipeline(tmp_path / "run", small_scene_autoencoder(), latent_autoencoder)
    mixed = small_pipeline()
    mixed.register_modules(fine_denoiser=outpainter().fine_denoiser)
    with pytest.raises(UserInputError, match="flag of outpainters"):
        check_agreement(mixed)


def test_an_outpainter_learns_to_continue_what_it_is_told(memory, latent_autoencoder, tmp_path):
    """With pure noise as the sample, only what is told says which scene it is."""
    schedule = replace(SCHEDULE, max_steps=200, batch_size=8, learning_rate=5e-3, checkpoint_every=1000)
    config = replace(TRAINING, schedule=schedule, known_share=1.0, code_noise=0.0)
    hidden = replace(memory, scene_code=torch.zeros_like(memory.scene_code))
    denoiser = train("coarse", hidden, latent_autoencoder, tmp_path / "run", config)
    clean = hidden.coarse[:, 0].float().flatten(1, 2)
    cells = torch.zeros(len(clean), 4, 4, dtype=torch.bool)
    cells[..., :2] = True
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    given = (noise, torch.full((len(clean),), 999), hidden.scene_code[:, 0])
    errors = []
    for known in (clean, clean.roll(1, 0)):  # of the scene itself, and of another one
        with torch.no_grad():
            estimate = -denoiser(*given, known=known, known_cells=cells)  # v of pure noise is minus the clean sample
        errors.append(float((estimate - denoiser.latent(clean))[..., 2:].square().mean()))
    assert errors[0] < 0.9 * errors[1], errors


# Sampling


def test_the_pipeline_tells_what_is_kept_and_keeps_it():
    pipeline = outpainter()
    scene = pipeline(1, scene_generators(1, 1), num_inference_steps=STEPS)
    cells = torch.zeros(4, 4, dtype=torch.bool)
    cells[:, 2:] = True
    columns = to_columns(cells, 4)
    inpainting = Inpainting(scene.latents, cells, columns, resamplings=1)
    seen = []

    def watch(module, args, kwargs):
        seen.append(kwargs)

    hook = pipeline.coarse_denoiser.register_forward_pre_hook(watch, with_kwargs=True)
    code = torch.cat([scene.latents.global_latent, torch.zeros(1, 10)], dim=1)
    output = pipeline(
        2, scene_generators(2, 2), num_inference_steps=STEPS, scene_code=code.expand(2, -1), inpainting=inpainting
    )
    hook.remove()
    assert len(seen) == STEPS
    for kwargs in seen:
        assert torch.equal(kwargs["known_cells"], (~cells).expand(2, 4, 4))
        assert torch.equal(kwargs["known"], scene.latents.coarse.flatten(1, 2).expand(2, -1, -1, -1))
    assert torch.equal(output.latents.coarse[..., :2], scene.latents.coarse[..., :2].expand(2, -1, -1, -1, -1))
    assert torch.equal(output.latents.fine[..., :8], scene.latents.fine[..., :8].expand(2, -1, -1, -1))
    assert not torch.allclose(output.latents.coarse[..., 2:], scene.latents.coarse[..., 2:])
    assert pipeline.default_resamplings(3) == 1 and small_pipeline().default_resamplings(3) == 3


def test_sampling_everything_is_sampling_a_whole_scene():
    pipeline = outpainter()
    scene = pipeline(1, scene_generators(1, 1), num_inference_steps=STEPS, output_type="latent")
    everything = Inpainting(scene.latents, torch.ones(4, 4, dtype=torch.bool), torch.ones(16, 16, dtype=torch.bool))
    code = torch.cat([scene.latents.global_latent, torch.zeros(1, 10)], dim=1)
    common = {"num_inference_steps": STEPS, "scene_code": code, "output_type": "latent"}
    whole = pipeline(1, scene_generators(2, 1), **common).latents
    told = pipeline(1, scene_generators(2, 1), inpainting=everything, **common).latents
    assert torch.equal(whole.coarse, told.coarse) and torch.equal(whole.fine, told.fine)


@pytest.mark.parametrize("method", ["outpaint", "joint"])
def test_worlds_are_outpainted_and_extended(method, tmp_path):
    pipeline = outpainter()
    widths = []

    def watch(module, args, kwargs):
        if "known_cells" in kwargs:
            widths.append(int(kwargs["known_cells"].sum()))

    hook = pipeline.coarse_denoiser.register_forward_pre_hook(watch, with_kwargs=True)
    settings = WorldSettings(seed=5, num_inference_steps=STEPS, method=method, fill_floor=False)
    make_world(pipeline, tmp_path / "world", (12.0, 6.0), settings)
    made = json.loads((tmp_path / "world" / "world.json").read_text())["settings"]
    assert made["resamplings"] == 1, "an outpainter walks once"
    known = 8 if method == "outpaint" else None  # windows of 4 x 4 cells, 2 apart
    assert set(widths) == ({known} if known else set())
    before = len(widths)
    extend_world(pipeline, tmp_path / "world", "east", 3.0)
    assert len(widths) > before and all(width > 0 for width in widths[before:])
    hook.remove()


# The command


def test_the_command_says_what_it_cannot_do(capsys):
    for arguments, words in (
        (["--known-share", "0.5"], "--outpainting"),
        (["--outpainting", "--known-share", "0"], "above 0 and at most 1"),
        (["--outpainting", "--known-share", "1.5"], "above 0 and at most 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            train_diffusion.main(
                ["coarse", "--voxels", "v", "--latent-autoencoder", "l", "--output-dir", "o", *arguments]
            )
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err


def test_the_benchmark_compares_it_with_resampling(store, tmp_path, capsys):
    told, plain = outpainter(), small_pipeline()
    for name, pipeline in (("told", told), ("plain", plain)):
        pipeline.save_pretrained(tmp_path / name)
    outpainting = script("outpainting")
    options = outpainting.Options(
        store.root, tmp_path / "told", tmp_path / "out", tmp_path / "plain", 3, 2, walks=(1, 2)
    )
    outpainting.main(options)
    found = json.loads((tmp_path / "out" / "outpainting.json").read_text())
    assert [*found["methods"]] == ["not told, 1 walks", "not told, 2 walks", "told, 1 walk"]
    assert found["velocity_error"]["outpainter, told"] != found["velocity_error"]["outpainter, untold"]
    values = [value for row in found["methods"].values() for value in row.values()]
    assert all(math.isfinite(value) and value >= 0 for value in values)
    errors = [row["error at the seam"] for row in found["methods"].values()]
    assert len(set(errors)) == 3, "told, or walked twice, is another scene"
    assert "held-out places" in capsys.readouterr().out and (tmp_path / "out" / "outpainting.png").is_file()
    with pytest.raises(UserInputError, match="at least 2"):
        outpainting.main(replace(options, num_scenes=1))
    options.pipeline = tmp_path / "plain"
    with pytest.raises(UserInputError, match="is no outpainter"):
        outpainting.main(options)


def test_a_step_at_the_seam_is_that_of_the_voxels(store):
    outpainting = script("outpainting")
    density = torch.zeros(1, 1, 2, 4, 4)
    density[..., 2:] = 1e6
    grid = VoxelGrid(density, torch.zeros(1, 1, 2, 4, 4), torch.tensor([[0.0, 0, 0], [1, 1, 1]]))
    left = torch.tensor([[True, False], [True, False]])
    assert outpainting.seam_step(grid, left, 2) == pytest.approx(4 * 2)
    assert outpainting.seam_step(grid, left.T, 2) == 0
    assert outpainting.beside(torch.tensor([[True, False, False]])).tolist() == [[False, True, False]]
