"""Stage 2: voxels to latents and back."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.blocks import ConditionalGroupNorm
from nfldm_ns.latents.equivariance import PlaneChange, change_grid, change_items, draw_changes, equal_sizes
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder, load_latent_autoencoder
from nfldm_ns.latents.quantizer import CodebookUsage, VectorQuantizer
from nfldm_ns.latents.round_trip import evaluate_round_trip
from nfldm_ns.latents.scene_latents import SceneLatents
from nfldm_ns.latents.training import (
    LatentLossConfig,
    LatentTrainingConfig,
    equivariance_loss,
    public_config,
    train_latent_autoencoder,
    voxel_loss,
)
from nfldm_ns.latents.voxel_code import MAX_ALPHA, VoxelCode, linear_code
from nfldm_ns.latents.voxel_store import VoxelStore, encode_collection
from nfldm_ns.method_configs.latent_presets import LATENT_PRESETS
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.training.draws import ItemDraws, batch_indices
from nfldm_ns.training.identity import model_hash, own_config
from nfldm_ns.training.run import read_metrics
from nfldm_ns.training.schedule import Schedule
from tests.interruption import Interrupted, interrupt
from tests.small_models import (
    LATENT_SIZES,
    random_grid,
    small_latent_autoencoder,
    small_scene_autoencoder,
)
from tests.synthetic import AABB, make_box_room_collection

TRAINING = LatentTrainingConfig(
    schedule=Schedule(max_steps=6, batch_size=2, log_every=2, checkpoint_every=3), num_views=2
)


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return make_box_room_collection(tmp_path_factory.mktemp("rooms"), num_train=4, num_test=2)


@pytest.fixture(scope="module")
def store(collection, tmp_path_factory):
    return encode_collection(collection, small_scene_autoencoder(), tmp_path_factory.mktemp("voxels"))


# The normalised voxels


@pytest.mark.parametrize("transform", ["none", "log", "alpha"])
def test_voxel_code_inverts(transform):
    grid = random_grid()
    code = VoxelCode(4, (4, 16, 16), AABB, transform, gate_alpha=0)
    code.fit([grid])
    back = code.denormalise(code.normalise(grid), grid.aabb)
    limit = -math.log(1 - MAX_ALPHA) / code.voxel_height if transform == "alpha" else torch.inf
    torch.testing.assert_close(back.density, grid.density.clamp(max=limit), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(back.features, grid.features, atol=1e-4, rtol=1e-4)


def test_voxel_code_statistics_are_those_of_occupied_voxels():
    grid = random_grid()
    shifted = VoxelGrid(grid.density, torch.where(grid.density > 0, grid.features * 3 + 5, 100.0), grid.aabb)
    code = VoxelCode(4, (4, 16, 16), AABB)
    code.fit([shifted[0], shifted[1]])
    torch.testing.assert_close(code.feature_mean, torch.full((4,), 5.0), atol=0.3, rtol=0)
    normalised = code.normalise(shifted).unflatten(1, (5, 4))
    torch.testing.assert_close(normalised[:, :1].square().mean(), torch.tensor(1.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(normalised[:, 1:].square().mean(), torch.tensor(1.0), atol=1e-3, rtol=0)
    empty = (grid.density == 0).expand_as(normalised[:, 1:])
    assert bool((normalised[:, 1:][empty] == 0).all()), "empty voxels carry no features"


def test_dilated_gate_keeps_what_interpolation_reads():
    density = torch.zeros(1, 1, 5, 5, 5)
    density[..., 2, 2, 2] = 10.0
    code = VoxelCode(4, (5, 5, 5), AABB)
    assert int((code.gate(density) > 0.5).sum()) == 1
    assert int((code.gate(density, dilate=True) > 0.5).sum()) == 27


@pytest.mark.parametrize("size", [12, 1100])
def test_linear_code_is_the_best_in_the_weighted_error(size):
    x = torch.randn(2000, size) * (0.7 ** torch.arange(size)) + 1
    weights = torch.rand(size) + 0.5
    encoder, decoder, mean, target_mean = linear_code(x, x, 5, weights)
    torch.testing.assert_close(mean, target_mean)
    codes = (x - mean) @ encoder.T
    torch.testing.assert_close(codes.square().mean(), torch.tensor(1.0), atol=1e-3, rtol=0)
    error = ((x - codes @ decoder.T - mean).square() * weights).sum(1).mean()
    centred = (x - mean) * weights.sqrt()
    discarded = torch.linalg.svdvals(centred)[5:].square().sum() / len(x)
    torch.testing.assert_close(error, discarded, rtol=1e-3, atol=1e-5)


def test_linear_code_channels_share_the_variance():
    x = torch.randn(5000, 16) * torch.linspace(3, 0.01, 16)
    encoder, _, mean, _ = linear_code(x, x, 8, torch.ones(16))
    variance = ((x - mean) @ encoder.T).var(dim=0)
    assert float(variance.max() / variance.min()) < 3


def test_linear_code_reads_targets_that_differ_from_inputs():
    x = torch.randn(5000, 6)
    mixing = torch.randn(6, 6)
    encoder, decoder, mean, target_mean = linear_code(x, x @ mixing + 3, 6, torch.ones(6))
    torch.testing.assert_close((x - mean) @ encoder.T @ decoder.T + target_mean, x @ mixing + 3, atol=1e-3, rtol=1e-3)


def test_voxel_loss_weighs_density_and_ignores_negative_estimates_of_empty_voxels():
    grid = random_grid()
    code = VoxelCode(4, (4, 16, 16), AABB)
    target = code.normalise(grid)
    config = LatentLossConfig()
    assert float(voxel_loss(target, target, grid, code, config)) == 0
    below = target.clone()
    below[:, :4] = torch.where(target[:, :4] <= 0, -1.0, target[:, :4])
    assert float(voxel_loss(below, target, grid, code, config)) == 0
    density, features = target.clone(), target.clone()
    density[:, :4] += 0.1
    features[:, 4:] += 0.1
    ratio = voxel_loss(density, target, grid, code, config) / voxel_loss(features, target, grid, code, config)
    assert float(ratio) == pytest.approx(2.5, rel=1e-4)


# Vector quantisation


def test_nearest_code_is_the_nearest():
    quantizer = VectorQuantizer(3, 20)
    vectors = torch.randn(100, 3)
    expected = torch.cdist(vectors, quantizer.codes).argmin(dim=1)
    assert torch.equal(quantizer.nearest(vectors), expected)


def test_quantised_groups_are_codes_and_gradients_pass_straight_through():
    quantizer = VectorQuantizer(2, 10).eval()
    latent = torch.randn(2, 6, 4, 5, requires_grad=True)
    quantised, indices, loss = quantizer(latent)
    assert indices.shape == (2, 3, 4, 5)
    torch.testing.assert_close(quantised[1, 2:4, 3, 2], quantizer.codes[indices[1, 1, 3, 2]])
    torch.testing.assert_close(loss, (latent - quantised).square().mean())
    upstream = torch.randn_like(quantised)
    quantised.backward(upstream)
    torch.testing.assert_close(latent.grad, upstream)
    again = quantizer(quantised.detach())[0]
    torch.testing.assert_close(again, quantised)


def test_codes_follow_the_data_and_all_are_used():
    torch.manual_seed(0)
    centres = torch.randn(16, 2) * 5
    quantizer = VectorQuantizer(2, 24, decay=0.8).train()

    def batch():
        return (centres[torch.randint(16, (64,))] + 0.05 * torch.randn(64, 2)).T.reshape(1, 2, 8, 8)

    for _ in range(100):
        quantizer(batch())
    assert float(torch.cdist(centres, quantizer.codes).amin(dim=1).median()) < 0.1
    used = quantizer.nearest(torch.cat([batch()[0].flatten(1).T for _ in range(8)])).unique()
    assert len(used) > 20, "codes nobody used were moved to where data is"


def test_kmeans_start_beats_random_codes():
    torch.manual_seed(0)
    latent = torch.randn(4, 4, 16, 16) * 3 + 1
    quantizer = VectorQuantizer(2, 64).eval()
    before = float(quantizer(latent)[2])
    quantizer.fit(latent)
    assert float(quantizer(latent)[2]) < 0.25 * before


def test_codes_are_chosen_in_single_precision_under_autocast():
    quantizer = VectorQuantizer(4, 1024).eval()
    latent = 30 + torch.randn(2, 4, 16, 16)
    expected, indices, loss = quantizer(latent)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = quantizer(latent)
    assert torch.equal(found[1], indices) and torch.equal(found[0], expected) and torch.equal(found[2], loss)


def test_usage_and_perplexity_of_known_frequencies():
    quantizer = VectorQuantizer(2, 8)
    usage = CodebookUsage(window=2)
    usage.add(quantizer.count(torch.tensor([[0, 0], [0, 0]])))
    assert float(usage.share) == 1 / 8 and float(usage.perplexity) == pytest.approx(1)
    usage.add(quantizer.count(torch.arange(4)))
    share = torch.tensor([5.0, 1, 1, 1]) / 8
    assert float(usage.share) == 1 / 2
    assert float(usage.perplexity) == pytest.approx(float((-share * share.log()).sum().exp()))
    usage.add(quantizer.count(torch.arange(8)))
    usage.add(quantizer.count(torch.arange(8)))
    assert float(usage.share) == 1 and float(usage.perplexity) == pytest.approx(8), "older batches are forgotten"


# The latent auto-encoder


def watch_shapes(modules):
    """Shapes of each module's input and output, without the batch, from its next call on."""
    shapes = {}

    def remember(name):
        return lambda module, inputs, output: shapes.__setitem__(
            name, (tuple(inputs[0].shape[1:]), tuple(output.shape[1:]))
        )

    for name, module in modules.items():
        module.register_forward_hook(remember(name))
    return shapes


def test_shapes_of_table_8_at_paper_size():
    """Every line of Table 8, from V's 1024 folded channels to c, f and g and back."""
    preset = LATENT_PRESETS["paper"].model
    with torch.device("meta"):
        model = LatentAutoencoder(**preset, grid_shape=(32, 128, 128), feature_channels=31).eval()
        grid = VoxelGrid(torch.rand(1, 1, 32, 128, 128), torch.rand(1, 31, 32, 128, 128), torch.zeros(2, 3))
        decoder = model.decoder
        encoders = {"g": model.global_encoder, "c": model.coarse_encoder, "f": model.fine_encoder}
        parts = {"conv_in": decoder.conv_in, "mid": decoder.mid, "conv_out": decoder.conv_out}
        parts |= {f"lowest {i}": block for i, block in enumerate(decoder.lowest)}
        for level, (blocks, upsample) in enumerate(zip(decoder.levels, decoder.upsamples, strict=True)):
            parts |= {f"level {level}, block {i}": block for i, block in enumerate(blocks)}
            parts[f"level {level}, upsample"] = upsample
        shapes = watch_shapes(encoders | parts)
        latents = model.encode(grid)
        decoded = model.decode(latents)
    assert latents.global_latent.shape == (1, 128)
    assert latents.coarse.shape == (1, 4, 8, 32, 32) == (1, *model.coarse_shape)
    assert latents.fine.shape == (1, 4, 128, 128) == (1, *model.fine_shape)
    lowest, middle, finest = (512, 32, 32), (512, 64, 64), (512, 128, 128)
    assert shapes == {
        "g": ((1024, 128, 128), (256, 32, 32)),  # mean and log variance, before the mean over cells
        "c": ((1024, 128, 128), (32, 32, 32)),
        "f": ((1024, 128, 128), (4, 128, 128)),
        "conv_in": ((32, 32, 32), lowest),  # z of c folded
        "mid": (lowest, lowest),
        **{f"lowest {i}": (lowest, lowest) for i in range(3)},
        **{f"level 0, block {i}": (lowest, lowest) for i in range(3)},
        "level 0, upsample": (lowest, middle),
        **{f"level 1, block {i}": (middle, middle) for i in range(3)},
        "level 1, upsample": (middle, finest),
        "conv_out": ((512 + 4, 128, 128), (1024, 128, 128)),  # f concatenated
    }
    norms = [module for module in decoder.modules() if isinstance(module, ConditionalGroupNorm)]
    assert all(norm.modulation.in_features == 128 for norm in norms), "all group norms are conditioned on g"
    assert decoded.density.shape == (1, 1, 32, 128, 128) and decoded.features.shape == (1, 31, 32, 128, 128)
    assert decoded.background.shape == (1, 8, 4)
    assert model.coarse_codebook.codes.shape == (1024, 4) and model.fine_codebook.codes.shape == (128, 4)


@pytest.mark.parametrize(
    ("grid_shape", "factor"),
    [((4, 16, 16), 2), ((4, 16, 16), 4), ((8, 32, 48), 8), ((2, 64, 32), 16), ((16, 48, 48), 16), ((3, 4, 20), 4)],
)
@pytest.mark.parametrize("linear_paths", [True, False])
def test_shapes_of_any_grid_and_downsampling(grid_shape, factor, linear_paths):
    z, y, x = grid_shape
    widths = (8, 8, 16, 16, 24)[: factor.bit_length()]
    model = small_latent_autoencoder(
        grid_shape=grid_shape, encoder_channels=widths, decoder_channels=widths[::-1], linear_paths=linear_paths
    )
    shapes = watch_shapes({"mid": model.decoder.mid, "conv_out": model.decoder.conv_out})
    grid = random_grid(shape=grid_shape)
    latents = model.encode(grid)
    decoded = model.decode(latents)
    assert model.downsampling == factor
    assert latents.coarse.shape == (2, 4, 2, y // factor, x // factor) == (2, *model.coarse_shape)
    assert latents.fine.shape == (2, 4, y, x) == (2, *model.fine_shape)
    assert shapes["mid"][1] == (widths[-1], y // factor, x // factor)
    assert shapes["conv_out"][1] == (5 * z, y, x)
    assert decoded.density.shape == grid.density.shape and decoded.features.shape == grid.features.shape


LEVELS = [(False, False), (True, False), (False, True)]


@pytest.mark.parametrize(("use_fine", "use_global"), LEVELS)
def test_levels_that_are_left_out_leave_nothing(use_fine, use_global, tmp_path):
    model = small_latent_autoencoder(use_fine=use_fine, use_global=use_global, fusion_blocks=0)
    grids = [random_grid(4), random_grid(4, seed=1)]
    model.fit(grids)
    latents = model.encode(grids[0])
    assert latents.fine.shape == (4, 4 * use_fine, 16, 16) and latents.global_latent.shape == (4, 8 * use_global)
    assert not [name for name in model.state_dict() if not use_fine and "fine" in name]
    assert not [name for name in model.state_dict() if not use_global and ("global" in name or "modulation" in name)]
    assert model.decoder.conv_out.in_channels == 8 + 4 * use_fine, "nothing is concatenated"
    assert set(model.code_counts(latents)) == {"coarse", *["fine"] * use_fine}
    background = model.decode(latents).background
    if not use_global:
        mean = torch.cat([grid.background for grid in grids]).mean(0)
        mean[:, 1:3] = 0  # whichever way scenes are turned
        torch.testing.assert_close(background, mean.expand(4, -1, -1), atol=1e-5, rtol=1e-5)
    else:
        assert not torch.allclose(background[0], background[1])
    model.save_pretrained(tmp_path)
    loaded = load_latent_autoencoder(tmp_path)
    latents.save(tmp_path / "latents.safetensors")
    restored = SceneLatents.load(tmp_path / "latents.safetensors")
    assert torch.equal(loaded.decode(restored).features, model.decode(latents).features)


@pytest.mark.parametrize(("use_fine", "use_global"), LEVELS)
def test_every_weight_learns_whatever_levels_there_are(use_fine, use_global):
    model = small_latent_autoencoder(use_fine=use_fine, use_global=use_global).train()
    for parameter in model.parameters():  # nothing starts at zero
        torch.nn.init.normal_(parameter, std=0.1)
    result = model(random_grid())
    (result.reconstruction.square().sum() + result.background.square().sum() + result.kl).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert use_global or float(result.kl) == 0


def test_fitted_model_starts_at_the_linear_codes():
    """Every 4 x 4 block of columns is one of 8 patterns, plus detail in 4 directions: c and f hold all of it."""
    torch.manual_seed(0)
    patterns = torch.rand(7, 5, 4, 4, 4)
    blocks = torch.einsum("nbij,bczyx->nczyxij", torch.rand(4, 7, 4, 4) - 0.5, patterns)
    coarse = blocks.permute(0, 1, 2, 5, 3, 6, 4).reshape(4, 5, 4, 16, 16)
    detail = torch.einsum("ndyx,dcz->nczyx", 0.1 * (torch.rand(4, 3, 16, 16) - 0.5), torch.rand(3, 5, 4))
    voxels = 3 + coarse + detail
    grid = VoxelGrid(voxels[:, :1], voxels[:, 1:], torch.tensor(AABB))
    model = small_latent_autoencoder(quantize=False, gate_alpha=0.0, density_transform="none")
    model.fit([grid])  # further batches would be turned
    target = model.voxel_code.normalise(grid)
    with torch.no_grad():
        both = model(grid, sample=False).reconstruction
        codes = model.encode(grid)
        only_coarse = model._decode(replace(codes, fine=torch.zeros_like(codes.fine)))
    centred = target - target.mean(dim=(0, 2, 3), keepdim=True)
    assert float((both - target).square().mean()) < 0.02 * float(centred.square().mean())
    assert float((only_coarse - target).square().mean()) > 3 * float((both - target).square().mean())


def test_global_latent_steers_the_decoder():
    model = small_latent_autoencoder()
    for norm in (model.decoder.mid.before.norm1, model.decoder.lowest[0].norm1):
        torch.nn.init.normal_(norm.modulation.weight)
        torch.nn.init.normal_(model.decoder.lowest[0].conv2.weight)
    latents = model.encode(random_grid())
    other = replace(latents, global_latent=latents.global_latent + 1)
    assert not torch.allclose(model.decode(latents).features, model.decode(other).features)


def test_decode_quantises_first():
    model = small_latent_autoencoder()
    latents = model.encode(random_grid())
    codes = model.quantise(latents)
    assert not torch.allclose(codes.fine, latents.fine)
    torch.testing.assert_close(model.decode(latents).density, model.decode(codes, quantise=False).density)
    torch.testing.assert_close(model.quantise_coarse(latents.coarse), codes.coarse)
    torch.testing.assert_close(model.decode(codes).features, model.decode(latents).features)


def test_sampled_global_latent_varies_around_the_mean():
    model = small_latent_autoencoder()
    grid = random_grid()
    torch.manual_seed(0)
    a, b = model.encode(grid, sample=True), model.encode(grid, sample=True)
    assert not torch.equal(a.global_latent, b.global_latent)
    assert torch.equal(a.coarse, b.coarse)


def test_model_and_latents_survive_the_disk(tmp_path):
    model = small_latent_autoencoder()
    model.fit([random_grid(4)])
    model.save_pretrained(tmp_path / "latent_autoencoder")
    loaded = load_latent_autoencoder(tmp_path)
    assert model_hash(loaded) == model_hash(model) != model_hash(small_latent_autoencoder(1))
    latents = model.encode(random_grid())
    latents.save(tmp_path / "latents.safetensors")
    restored = SceneLatents.load(tmp_path / "latents.safetensors")
    assert torch.equal(loaded.decode(restored).features, model.decode(latents).features)
    assert SceneLatents.cat([latents[0], latents[1]]).fine.equal(latents.fine)


def test_broken_latent_autoencoder_is_one_sentence(tmp_path):
    with pytest.raises(UserInputError, match="nfldm-train-latent-ae"):
        load_latent_autoencoder(tmp_path)
    small_latent_autoencoder().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserInputError, match="damaged"):
        load_latent_autoencoder(tmp_path)
    small_latent_autoencoder(fine_channels=8).save_pretrained(tmp_path / "other")
    small_latent_autoencoder().save_config(tmp_path / "other")
    with pytest.raises(UserInputError, match="another preset"):
        load_latent_autoencoder(tmp_path / "other")


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="downsampled"):
        small_latent_autoencoder(grid_shape=(4, 18, 18))
    with pytest.raises(ValueError, match="codes of 3"):
        small_latent_autoencoder(fine_code_dim=3)


# The store


def test_encode_is_what_stage_1_says_and_resumes(collection, store, tmp_path):
    model = small_scene_autoencoder()
    scene = collection.load_scene("room_000")
    with torch.no_grad():
        expected = model.encode(collection.batch([scene]).source)
    voxels = store.grid(["room_000"])
    torch.testing.assert_close(voxels.density, expected.density, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(voxels.features, expected.features, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(voxels.background, expected.background, atol=1e-6, rtol=1e-3)
    assert store.scene_ids == collection.scene_ids

    again = encode_collection(collection, model, tmp_path / "voxels")
    kept = again.path("room_001").stat().st_mtime_ns
    again.path("room_000").unlink()
    again.path("room_002").write_bytes(b"cut")
    with pytest.raises(UserInputError, match="lacks 1 of"):
        VoxelStore.open(tmp_path / "voxels")
    again = encode_collection(collection, model, tmp_path / "voxels")
    assert again.path("room_001").stat().st_mtime_ns == kept, "what is there is kept"
    assert load_file(again.path("room_000"))["density"].equal(load_file(store.path("room_000"))["density"])
    assert again.load("room_002")["features"].dtype == torch.float16
    assert model_hash(again.load_autoencoder()) == again.autoencoder_hash == store.autoencoder_hash


def test_stage_1_has_no_option_that_makes_older_voxels_strange():
    """A new option goes to `LATER_OPTIONS` of `training/identity.py`, or voxels encoded without it are refused."""
    assert set(own_config(SceneAutoencoder())) == {
        *("aabb", "near", "far", "image_size", "focal_length", "grid_shape", "feature_channels", "feature_stride"),
        *("num_depth_bins", "depth_spacing", "encoder_input", "density_from", "fusion", "splatting"),
        *("background_channels", "background_implementation", "num_samples", "num_feature_samples"),
        *("encoder_channels", "encoder_blocks", "decoder_channels", "decoder_blocks"),
        *("refinement_channels", "refinement_steps"),
    }


def test_store_of_another_stage_1_is_refused(collection, store, tmp_path):
    with pytest.raises(UserInputError, match="another scene auto-encoder"):
        encode_collection(collection, small_scene_autoencoder(seed=1), store.root)
    with pytest.raises(UserInputError, match="another scene auto-encoder"):
        store.require(small_scene_autoencoder(seed=1))
    with pytest.raises(UserInputError, match="nfldm-encode"):
        VoxelStore.open(tmp_path)
    (tmp_path / "voxels.json").write_text(json.dumps({"format": "something"}))
    with pytest.raises(UserInputError, match="format"):
        VoxelStore.open(tmp_path)


def test_memory_holds_the_scenes_of_a_split(store):
    memory = store.load_all("train")
    assert memory.scene_ids == store.splits["train"] and len(memory) == 4
    batches = memory.batches(3)
    assert len(batches) == 2 and [grid.batch_size for grid in batches] == [3, 1]
    expected = store.grid([memory.scene_ids[3]])
    assert torch.equal(batches[1].features, expected.features)
    assert torch.equal(batches[1].background, expected.background)


def test_store_that_lacks_the_background_is_refused(collection, store, tmp_path):
    root = shutil.copytree(store.root, tmp_path / "voxels")
    path = root / "room_000.safetensors"
    whole = load_file(path)
    save_file({name: value for name, value in whole.items() if name != "background"}, path)
    with pytest.raises(UserInputError, match="a background of another shape"):
        VoxelStore.open(root).load("room_000")
    encode_collection(collection, small_scene_autoencoder(), root)
    assert torch.equal(load_file(path)["background"], whole["background"]), "such a file is made again"
    description = json.loads((root / "voxels.json").read_text())
    (root / "voxels.json").write_text(json.dumps({**description, "version": 1}))
    for read in (VoxelStore.open, partial(encode_collection, collection, small_scene_autoencoder())):
        with pytest.raises(UserInputError, match="encode the scenes again"):
            read(root)


# Training


def train(store, folder, config=TRAINING, sizes=LATENT_SIZES, **kwargs):
    return train_latent_autoencoder(store, folder, sizes, config, on_progress=lambda share, losses: None, **kwargs)


def test_every_scene_comes_once_per_epoch_in_an_order_that_only_the_seed_decides():
    epochs = [index for step in range(10) for index in batch_indices(5, 2, step, seed=3)]
    assert all(sorted(epochs[i : i + 5]) == list(range(5)) for i in range(0, 20, 5))
    shared = [batch_indices(8, 2, 1, 3, rank, world_size=2) for rank in range(2)]
    assert shared[0] + shared[1] == batch_indices(8, 4, 1, seed=3)


def test_resumed_training_is_equal_to_the_bit(store, tmp_path):
    whole = train(store, tmp_path / "whole")

    with pytest.raises(Interrupted):
        train_latent_autoencoder(store, tmp_path / "parts", LATENT_SIZES, TRAINING, on_progress=interrupt)
    assert not (tmp_path / "parts" / "latent_autoencoder").exists(), "an unfinished run has no model"
    assert (tmp_path / "parts" / "checkpoint-00000003").exists()
    resumed = train(store, tmp_path / "parts")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    steps = [line["step"] for line in read_metrics(tmp_path / "parts")]
    assert steps == [2, 4, 6], "every step is logged once"
    for line in read_metrics(tmp_path / "whole"):
        for name in ("coarse", "fine"):
            assert 0 < line[f"{name}_codebook_usage"] <= 1
            assert 1 <= line[f"{name}_codebook_perplexity"] <= 16 * line[f"{name}_codebook_usage"] + 1e-4
    assert [p.name for p in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-00000006"]
    finished = train(store, tmp_path / "parts")
    assert model_hash(finished) == model_hash(resumed), "a finished run is only read"


@pytest.mark.parametrize(("use_fine", "use_global"), [*LEVELS, (True, True)])
def test_a_decoder_trained_alone_leaves_latents_and_codes(store, tmp_path, use_fine, use_global):
    sizes = {**LATENT_SIZES, "use_fine": use_fine, "use_global": use_global}
    first = train(store, tmp_path / "first", sizes=sizes)
    alone = replace(TRAINING, decoder_only=True)
    tuned = train_latent_autoencoder(store, tmp_path / "tuned", sizes, alone, initial=first)
    grid = store.grid(store.splits["test"])
    with torch.no_grad():
        before, after = first.encode(grid).state_dict(), tuned.encode(grid).state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert not torch.equal(first.decode(first.encode(grid)).density, tuned.decode(tuned.encode(grid)).density)
    assert all(torch.equal(book.codes, tuned.codebooks[name].codes) for name, book in first.codebooks.items())
    assert model_hash(first, first.encoding) == model_hash(tuned, tuned.encoding)
    assert model_hash(first) != model_hash(tuned)


def test_training_begins_from_a_given_model(store, tmp_path):
    train(store, tmp_path / "first")
    first = load_latent_autoencoder(tmp_path / "first")
    still = replace(TRAINING, schedule=replace(TRAINING.schedule, learning_rate=0.0), decoder_only=True)
    again = train_latent_autoencoder(store, tmp_path / "again", LATENT_SIZES, still, initial=first)
    assert model_hash(again) == model_hash(first)
    onwards = train_latent_autoencoder(store, tmp_path / "onwards", LATENT_SIZES, TRAINING, initial=first)
    assert model_hash(onwards, onwards.encoding) != model_hash(first, first.encoding)


def test_a_model_to_begin_from_may_be_of_another_box(store, tmp_path):
    train(store, tmp_path / "first")
    first = load_latent_autoencoder(tmp_path / "first")
    elsewhere = LatentAutoencoder(**{**public_config(first), "aabb": ((-9, -9, -1), (9, 9, 3))})
    elsewhere.load_state_dict(first.state_dict())
    still = replace(TRAINING, schedule=replace(TRAINING.schedule, learning_rate=0.0))
    moved = train_latent_autoencoder(store, tmp_path / "moved", LATENT_SIZES, still, initial=elsewhere)
    assert torch.equal(moved.aabb, store.aabb)
    alone = replace(still, decoder_only=True)
    with pytest.raises(UserInputError, match="does not fit"):
        train_latent_autoencoder(store, tmp_path / "alone", LATENT_SIZES, alone, initial=elsewhere)


def test_a_model_to_begin_from_must_fit(store, tmp_path):
    alone = replace(TRAINING, decoder_only=True)
    with pytest.raises(UserInputError, match="can be trained alone"):
        train_latent_autoencoder(store, tmp_path, LATENT_SIZES, alone)
    other = small_latent_autoencoder(density_transform="alpha")
    with pytest.raises(UserInputError, match="does not fit"):
        train_latent_autoencoder(store, tmp_path, LATENT_SIZES, alone, initial=other)
    assert not list(tmp_path.glob("*/"))


def test_training_of_another_preset_in_the_same_folder_is_refused(store, tmp_path):
    train(store, tmp_path)
    with pytest.raises(UserInputError, match="fine_channels"):
        train(store, tmp_path, sizes={**LATENT_SIZES, "fine_channels": 8})
    checkpoint = next(tmp_path.glob("checkpoint-*"))
    (checkpoint / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserInputError, match="checkpoint"):
        train(store, tmp_path)


def test_training_overfits_one_scene(collection, tmp_path):
    model = small_scene_autoencoder()
    one = replace(collection, splits={"train": ["room_000"], "val": [], "test": ["room_000"]})
    store = encode_collection(one, model, tmp_path / "voxels")
    config = LatentTrainingConfig(
        schedule=Schedule(max_steps=80, batch_size=1, learning_rate=3e-3, log_every=10),
        losses=LatentLossConfig(rgb_mult=0, depth_mult=0),
        fine_dropout=0.0,
        quarter_turns=False,
    )
    trained = train(store, tmp_path / "run", config, {**LATENT_SIZES, "quantize": False})
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["voxel_loss"] < 0.6 * lines[0]["voxel_loss"]
    metrics = evaluate_round_trip(model, trained, store, collection, ["room_000"])
    assert metrics["stage2"]["psnr"] > metrics["without_fine"]["psnr"]
    assert "not_quantised" not in metrics


def test_round_trip_metrics_of_all_variants(collection, store):
    model = small_latent_autoencoder()
    model.fit(list(store.load_all("train").batches(2)))
    metrics = evaluate_round_trip(small_scene_autoencoder(), model, store, collection, store.splits["test"])
    without = {"without_fine", "without_coarse", "without_global"}
    assert set(metrics) == {"stage1", "stage2", *without, "not_quantised", "codebooks"}
    counts = model.code_counts(model.encode(store.grid(store.splits["test"])))
    for name, found in counts.items():
        assert metrics["codebooks"][f"{name}_usage"] == pytest.approx(float((found > 0).float().mean()))
        share = found[found > 0] / found.sum()
        perplexity = float((-share * share.log()).sum().exp())
        assert metrics["codebooks"][f"{name}_perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert all(np.isfinite(list(values.values())).all() for values in metrics.values())
    assert metrics["stage2"]["psnr"] <= metrics["stage1"]["psnr"] + 0.5


@pytest.mark.parametrize(("use_fine", "use_global"), LEVELS)
def test_round_trip_of_fewer_levels(collection, store, tmp_path, use_fine, use_global):
    sizes = {**LATENT_SIZES, "use_fine": use_fine, "use_global": use_global}
    short = replace(TRAINING, schedule=replace(TRAINING.schedule, max_steps=2))
    model = train(store, tmp_path, short, sizes)
    assert [line["step"] for line in read_metrics(tmp_path)] == [2]
    metrics = evaluate_round_trip(small_scene_autoencoder(), model, store, collection, store.splits["test"])
    levels = {"without_coarse", *["without_fine"] * use_fine, *["without_global"] * use_global}
    assert set(metrics) == {"stage1", "stage2", *levels, "not_quantised", "codebooks"}


def test_box_that_cannot_be_turned_is_refused(store, tmp_path):
    wide = replace(store, description={**store.description, "aabb": [[-4, -3, -2], [4, 3, 2]]})
    with pytest.raises(UserInputError, match="quarter-turns"):
        train(wide, tmp_path)


# Latents that change with their scenes

CHANGES = [
    PlaneChange(mirrored, turns, factor) for mirrored in (False, True) for turns in range(4) for factor in (1, 2)
]


class _MeansAndRest(torch.nn.Module):
    """Encoders and decoder that commute with all changes: c has the mean over the plane, f the rest."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part, self.gain = part, torch.nn.Parameter(torch.ones(()))

    def forward(self, voxels, *latents):
        if self.part == "decoder":
            coarse, fine = latents
            return self.gain * torch.nn.functional.interpolate(coarse, scale_factor=4) + fine
        means = torch.nn.functional.adaptive_avg_pool2d(voxels, 1).expand(-1, -1, 4, 4)
        rest = voxels - torch.nn.functional.interpolate(means, scale_factor=4)
        return self.gain * (means if self.part == "coarse" else rest)


def equivariant_autoencoder():
    sizes = {"coarse_channels": 10, "fine_channels": 20, "linear_paths": False, "quantize": False, "gate_alpha": 0.0}
    model = small_latent_autoencoder(**sizes).train()
    model.coarse_encoder, model.fine_encoder = _MeansAndRest("coarse"), _MeansAndRest("fine")
    model.decoder = _MeansAndRest("decoder")
    return model


def test_changes_are_those_of_voxel_grids_and_keep_means():
    grid = random_grid(1)
    for turns in range(4):
        turned = change_grid(grid, [PlaneChange(False, turns)], [0])
        assert torch.equal(turned.features, grid.rotate90(turns).features)
    mirrored = change_grid(grid, [PlaneChange(True)], [0])
    assert torch.equal(mirrored.density, grid.density.flip(-1))
    half = change_grid(grid, [PlaneChange(factor=2)], [0])
    expected = torch.nn.functional.avg_pool2d(grid.features.flatten(1, 2), 2).unflatten(1, (4, 4))
    torch.testing.assert_close(half.features, expected)
    wide = torch.rand(1, 3, 8, 4)
    assert change_items(wide, [PlaneChange(True, 1, 2)], [0]).shape == (1, 3, 2, 4)


def test_equivariant_autoencoders_cost_nothing_and_others_do():
    model, grid = equivariant_autoencoder(), random_grid(len(CHANGES))
    config = LatentLossConfig()

    @torch.no_grad()
    def loss():
        result = model(grid, sample=False, changes=CHANGES)
        return float(equivariance_loss(result, grid, CHANGES, model.voxel_code, config))

    assert loss() < 1e-5
    plain = model.decoder.forward
    model.decoder.forward = lambda *latents: plain(*latents).roll(1, -1)
    assert loss() > 0.1
    scenes = [[i for i, change in enumerate(CHANGES) if change.factor == factor] for factor in (1, 2)]
    assert equal_sizes(CHANGES) == scenes


def test_the_loss_of_a_batch_is_the_mean_of_its_scenes():
    model, grid = small_latent_autoencoder(), random_grid(4)
    changes = [CHANGES[i] for i in (1, 2, 5, 15)]
    config = LatentLossConfig()

    @torch.no_grad()
    def loss(scenes, own):
        result = model(scenes, sample=False, changes=own)
        return float(equivariance_loss(result, scenes, own, model.voxel_code, config))

    alone = [loss(grid[i], [change]) for i, change in enumerate(changes)]
    assert loss(grid, changes) == pytest.approx(sum(alone) / 4, rel=1e-4)


@pytest.mark.parametrize(("use_fine", "use_global"), [*LEVELS, (True, True)])
def test_equivariance_teaches_the_encoders_and_leaves_the_codes(use_fine, use_global):
    model = small_latent_autoencoder(use_fine=use_fine, use_global=use_global).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grid, codebooks = random_grid(), {}
    for changes in ([], [PlaneChange(True, 1, 2), PlaneChange(False, 2)]):
        model.load_state_dict(before)
        torch.manual_seed(0)
        result = model(grid, sample=False, changes=changes)
        codebooks[len(changes)] = {name: book.codes.clone() for name, book in model.codebooks.items()}
    equivariance_loss(result, grid, changes, model.voxel_code, LatentLossConfig()).backward()
    encoders = {"coarse": model.coarse_encoder, "fine": model.fine_encoder, "global": model.global_encoder}
    for name, encoder in encoders.items():
        gradients = [parameter.grad for parameter in encoder.parameters()] if encoder is not None else []
        assert all(grad is not None and bool(grad.isfinite().all()) for grad in gradients), name
        assert encoder is None or any(float(grad.abs().max()) > 0 for grad in gradients), name
    assert all(torch.equal(codes, codebooks[2][name]) for name, codes in codebooks[0].items())


def test_changes_of_a_batch_are_those_of_its_parts():
    whole = draw_changes(ItemDraws(3, range(40)))
    assert whole == draw_changes(ItemDraws(3, range(25))) + draw_changes(ItemDraws(3, range(25, 40)))
    assert len(set(whole)) > 10
    assert {change.quarter_turns for change in draw_changes(ItemDraws(3, range(40)), square=False)} == {0, 2}


def test_resumed_equivariant_training_is_equal_to_the_bit(store, tmp_path):
    config = replace(TRAINING, losses=replace(TRAINING.losses, equivariance_mult=0.5))
    whole = train(store, tmp_path / "whole", config)
    assert all(line["equivariance_loss"] > 0 for line in read_metrics(tmp_path / "whole"))
    with pytest.raises(Interrupted):
        train_latent_autoencoder(store, tmp_path / "parts", LATENT_SIZES, config, on_progress=interrupt)
    resumed = train(store, tmp_path / "parts", config)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    with pytest.raises(UserInputError, match="equivariance_mult"):
        train(store, tmp_path / "parts")


def test_runs_that_know_nothing_of_equivariance_go_on(store, tmp_path):
    train(store, tmp_path)
    assert "equivariance_mult" not in json.loads((tmp_path / "run.json").read_text())["losses"]


def test_equivariance_that_cannot_be_is_refused(store, tmp_path):
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserInputError, match="finite number of at least 0"):
            train(store, tmp_path, replace(TRAINING, losses=replace(TRAINING.losses, equivariance_mult=weight)))
    deep = {**LATENT_SIZES, "encoder_channels": (8,) * 5, "decoder_channels": (8,) * 5}
    with pytest.raises(UserInputError, match="c has 1 x 1 cells"):
        train(store, tmp_path, replace(TRAINING, losses=replace(TRAINING.losses, equivariance_mult=1.0)), deep)
    assert not (tmp_path / "run.json").exists()
