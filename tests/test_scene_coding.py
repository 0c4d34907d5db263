"""Scenes on disk: what is stored to the bit, what compact files round, and older and damaged files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.scene_files import (
    GeneratedScene,
    half_precision,
    in_compact_precision,
    load_generated_scene,
    renderer_of,
    write_scene_files,
)
from nfldm_ns.generated.tensor_coding import (
    STEPS,
    Coded,
    InSteps,
    decode,
    decode_in_steps,
    encode,
    encode_in_steps,
    in_steps,
    steps_of,
)
from nfldm_ns.scenes.sparse_grid import SparseGrid, readable
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from tests.small_models import small_scene_autoencoder
from tests.synthetic import AABB


def room() -> VoxelGrid:
    """Noise behind the walls of an empty room, for the models of `small_scene_autoencoder`."""
    generator = torch.Generator().manual_seed(0)
    density = 5 * torch.rand(1, 1, 4, 16, 16, generator=generator)
    density[..., 4:12, 4:12] = 0
    background = torch.randn(1, 2, 4, generator=generator)
    return VoxelGrid(density, torch.randn(1, 4, 4, 16, 16, generator=generator), torch.tensor(AABB), background)


def write(folder: Path, compact: bool) -> GeneratedScene:
    folder.mkdir()
    latents = {"coarse": torch.randn(3, 2, 2), "codes": torch.arange(5), "none": torch.zeros(0, 3)}
    scene = GeneratedScene(room(), renderer_of(small_scene_autoencoder()), None, latents, {"seed": 1})
    write_scene_files(folder, scene, compact)
    return scene


@pytest.mark.parametrize("compact", [False, True])
def test_a_scene_on_disk_is_what_its_precision_says(tmp_path, compact):
    scene = write(tmp_path / "scene", compact)
    loaded = load_generated_scene(tmp_path / "scene")
    expected = (in_compact_precision if compact else half_precision)(scene.grid)
    for name in ("density", "features", "aabb", "background"):
        assert torch.equal(getattr(loaded.grid, name), getattr(expected, name)), name
    assert torch.equal(loaded.grid.density, half_precision(scene.grid).density)
    for name, value in scene.latents.items():
        assert torch.equal(loaded.latents[name], value) and loaded.latents[name].dtype == value.dtype
    for name, value in scene.renderer.state_dict().items():
        assert torch.equal(loaded.renderer.state_dict()[name], value), name
    (tmp_path / "again").mkdir()
    write_scene_files(tmp_path / "again", loaded, compact)
    assert torch.equal(load_generated_scene(tmp_path / "again").grid.features, loaded.grid.features)


def test_compact_files_are_smaller_and_their_features_near(tmp_path):
    for name, compact in (("whole", False), ("compact", True)):
        write(tmp_path / name, compact)
    sizes = [load_file(tmp_path / name / "scene.safetensors")["features"].numel() for name in ("whole", "compact")]
    assert sizes[1] < 0.5 * sizes[0]
    grids = [load_generated_scene(tmp_path / name).grid for name in ("whole", "compact")]
    kept = readable(grids[0].density[0, 0], 0.0)
    difference = (grids[0].features - grids[1].features).abs()[0]
    largest = grids[0].features.abs().amax((0, 2, 3, 4))
    assert (difference[:, kept].amax(-1) <= largest / STEPS).all()
    assert not grids[1].features[0][:, ~kept].any() and (~kept).any()


def test_files_of_version_1_still_load(tmp_path):
    scene = write(tmp_path / "scene", False)
    grid = half_precision(scene.grid)
    tensors = {"density": grid.density[0], "features": grid.features[0], "background": grid.background[0]}
    tensors = {name: value.half() for name, value in tensors.items()}
    tensors |= {f"latents.{name}": value for name, value in scene.latents.items()}
    tensors |= {f"renderer.{name}": value for name, value in scene.renderer.state_dict().items()}
    save_file(tensors, tmp_path / "scene" / "scene.safetensors")
    path = tmp_path / "scene" / "scene.json"
    description = json.loads(path.read_text())
    del description["tensors"]
    path.write_text(json.dumps({**description, "version": 1}))
    loaded = load_generated_scene(tmp_path / "scene")
    assert torch.equal(loaded.grid.features, grid.features) and torch.equal(loaded.grid.density, grid.density)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "shape", "steps"])
def test_damaged_files_give_a_sentence(tmp_path, compact, damage):
    write(tmp_path / "scene", compact)
    tensors_path, path = tmp_path / "scene" / "scene.safetensors", tmp_path / "scene" / "scene.json"
    tensors, description = load_file(tensors_path), json.loads(path.read_text())
    features, kind = tensors["features"], description["tensors"]["features"]
    if damage == "cut":
        tensors["features"] = features[: len(features) // 2].clone()
    elif damage == "flipped":
        features[len(features) // 2] ^= 255
    elif damage == "missing":
        del tensors["features"]
    elif damage == "shape":
        kind["shape"][0] += 1
    elif compact:
        kind["steps"] = kind["steps"][:-1]
    else:
        kind["dtype"] = "float32"
    save_file(tensors, tensors_path)
    path.write_text(json.dumps(description))
    with pytest.raises(UserInputError, match="scene.safetensors does not fit scene.json .*: sample the scene again"):
        load_generated_scene(tmp_path / "scene")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 2), (3, 5, 2)])
def test_lossless_coding_is_exact(dtype, shape):
    tensor = (100 * torch.randn(shape)).to(dtype)
    coded, kind = encode(tensor)
    back = decode(coded, Coded(**kind))
    assert back.dtype == dtype and torch.equal(back, tensor)


def test_steps_are_kept_when_stored_again_and_among_smaller_values():
    features = 3 * torch.randn(200, 6)
    features[:, 2] = 0
    rounded = in_steps(features)
    assert torch.equal(in_steps(rounded), rounded)
    assert ((rounded - features).abs() <= steps_of(features) / 2 + 1e-6).all()
    assert torch.equal(in_steps(rounded[:7]), rounded[:7])
    coded, kind = encode_in_steps(rounded)
    assert torch.equal(decode_in_steps(coded, InSteps(**kind)), rounded)


def test_sparse_grids_are_exact_where_rays_read():
    grid = room()
    sparse = SparseGrid.from_dense(grid)
    dense = sparse.to_dense()
    assert (~sparse.kept).sum() == 4 * 6 * 6
    assert torch.equal(dense.features[0][:, sparse.kept], grid.features[0][:, sparse.kept])
    assert torch.equal(SparseGrid.from_dense(dense).features, sparse.features)
    assert torch.equal(dense.density, grid.density) and torch.equal(dense.background, grid.background)
    points = torch.rand(1, 4000, 3) * (grid.aabb[1] - grid.aabb[0]) + grid.aabb[0]
    (density, expected), (_, found) = grid.sample(points), dense.sample(points)
    assert torch.equal((density > 0) * expected, (density > 0) * found)


def test_sparse_grids_of_wrong_sizes_are_refused():
    sparse = SparseGrid.from_dense(room())
    with pytest.raises(ValueError, match="are not of"):
        replace(sparse, features=sparse.features[1:])
    with pytest.raises(ValueError, match="one scene at a time"):
        SparseGrid.from_dense(VoxelGrid.cat([room(), room()]))
