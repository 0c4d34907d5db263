"""The models that come with the package: small, whole, and used where no other is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder
from nfldm_ns.commands import edit, sample
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, load_pipeline, scene_generators
from nfldm_ns.errors import UserInputError
from nfldm_ns.models import GENERATOR, PRIOR, SCENE_AUTOENCODER, resolve_model, shipped_models
from nfldm_ns.refine.domain_prior import DomainPrior
from nfldm_ns.refine.loading import load_prior
from tests.pretrained import require_weights

SIZE_LIMIT = 40_000_000
"""Bytes: a clone and a wheel should stay quick."""
PRIOR_SIZE_LIMIT = 10_000_000


@pytest.fixture(scope="module")
def pipeline() -> NFLDMPipeline:
    return load_pipeline()


def test_the_generator_is_small_and_in_half_precision():
    files = [path for path in resolve_model(GENERATOR).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= SIZE_LIMIT
    for name, component in load_pipeline().components.items():
        if isinstance(component, torch.nn.Module):
            stored = load_file(resolve_model(GENERATOR) / name / "diffusion_pytorch_model.safetensors")
            assert {stored[key].dtype for key, _ in component.named_parameters()} == {torch.float16}, name


def test_the_prior_is_small_and_knows_renders_and_maps_of_the_generator(pipeline):
    files = [path for path in resolve_model(PRIOR).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= PRIOR_SIZE_LIMIT
    stored = load_file(resolve_model(PRIOR) / "denoiser" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    require_weights("lpips-vgg")
    require_weights("lpips-alex")
    prior = load_prior(PRIOR)
    assert isinstance(prior, DomainPrior) and prior.denoiser.config.knows_renders
    assert prior.maps is not None and prior.maps.size == tuple(pipeline.bev_size)
    assert list(prior.maps.classes) == list(pipeline.bev_classes)
    with pytest.raises(UserInputError, match=PRIOR):
        load_prior(str(resolve_model(GENERATOR) / "scheduler"))


@pytest.mark.parametrize("name", shipped_models())
def test_every_model_has_a_card(name):
    card = (resolve_model(name) / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "license: apache-2.0" in card
    for heading in ("Data", "Training", "Numbers", "Limits", "Licence"):
        assert f"\n## {heading}" in card, heading


@torch.inference_mode()
def test_same_seed_same_room_and_half_precision_is_only_storage(pipeline):
    first, second = (pipeline(1, scene_generators(3, 1), num_inference_steps=2) for _ in range(2))
    assert pipeline.coarse_denoiser.dtype == torch.float32
    assert torch.equal(first.grids.density, second.grids.density)
    assert first.grids.features.isfinite().all() and first.grids.density.isfinite().all()
    torch.testing.assert_close(first.grids.aabb, torch.tensor([[-7.5, -7.5, -2.2], [7.5, 7.5, 3.9]]))


def test_diffusers_loads_it_too(pipeline):
    loaded = NFLDMPipeline.from_pretrained(resolve_model(GENERATOR))
    state = loaded.fine_denoiser.state_dict()
    assert all(torch.equal(value, state[key].float()) for key, value in pipeline.fine_denoiser.state_dict().items())


def test_sampling_without_naming_a_model(tmp_path):
    sample.main(["--num-scenes", "1", "--num-inference-steps", "2", "--device", "cpu", "--output-dir", str(tmp_path)])
    scene = json.loads((tmp_path / "scene_000000" / "scene.json").read_text())
    assert scene["provenance"]["pipeline"] == GENERATOR
    assert (tmp_path / "contact_sheet.png").is_file()


def test_its_scenes_can_be_edited_without_naming_it(tmp_path):
    scenes, edited = tmp_path / "scenes", tmp_path / "edited"
    quick = ["--num-inference-steps", "2", "--device", "cpu"]
    sample.main(["--num-scenes", "1", *quick, "--output-dir", str(scenes)])
    box = ["--box", "0", "-7", "7", "0", "--resamplings", "1"]
    edit.main(["resample", str(scenes / "scene_000000"), *box, *quick, "--output-dir", str(edited)])
    made = json.loads(next(edited.glob("*/scene.json")).read_text())["provenance"]
    assert made["pipeline"] == GENERATOR


def test_a_folder_wins_over_the_model_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = resolve_model(GENERATOR)
    assert shipped.is_absolute() and (shipped / "model_index.json").is_file()
    Path(GENERATOR).mkdir()
    assert resolve_model(GENERATOR) == Path(GENERATOR)
    assert resolve_model("elsewhere") == Path("elsewhere")
    assert resolve_model(tmp_path / GENERATOR) == tmp_path / GENERATOR


def test_the_error_names_the_models_that_there_are():
    with pytest.raises(UserInputError, match=GENERATOR):
        load_pipeline("no-such-model")


def test_stage_1_with_refinement_is_small_and_found_by_its_name(box_room_collection):
    folder = resolve_model(SCENE_AUTOENCODER)
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2_000_000
    stage1 = load_scene_autoencoder(SCENE_AUTOENCODER)
    assert {stored[key].dtype for key, _ in stage1.named_parameters()} == {torch.float16}
    assert stage1.dtype == torch.float32 and stage1.config.refinement_steps == 2
    batch = box_room_collection.batch([box_room_collection.load_scene(box_room_collection.split("test")[0])])

    def error(steps: int) -> float:
        with torch.no_grad():
            rendered = stage1.render(stage1.encode(batch.source, steps), batch.source.cameras)
        return float((rendered.rgb - batch.source.images).abs().mean())

    assert error(2) < error(0), "rooms of another kind, too, are shown better after its steps"
