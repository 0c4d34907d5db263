"""The scripts in examples/ run, and leave what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from nfldm_ns.autoencoder.checkpoints import save_scene_autoencoder
from nfldm_ns.generated.scene_files import load_generated_scene
from tests.pretrained import require_weights
from tests.small_models import small_pipeline, small_scene_autoencoder
from tests.synthetic import make_box_room_collection

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pipeline")
    small_pipeline().save_pretrained(folder)
    return str(folder)


def test_rooms_are_sampled_and_edited(pipeline, tmp_path, capsys):
    rooms = tmp_path / "rooms"
    example("sample_rooms").main(num_scenes=2, seed=5, num_inference_steps=2, output_dir=rooms, pipeline=pipeline)
    assert (rooms / "scene_000006" / "config.yml").is_file()
    with Image.open(rooms / "rooms.png") as picture:
        assert min(picture.size) > 100
    example("edit_room").main(
        rooms / "scene_000005",
        rooms / "scene_000006",
        num_inference_steps=2,
        pipeline=pipeline,
        output_dir=tmp_path / "edited",
    )
    before, second = (load_generated_scene(rooms / f"scene_00000{i}").grid for i in (5, 6))
    resampled, combined = (load_generated_scene(tmp_path / "edited" / n).grid for n in ("resampled", "combined"))
    south_west = (..., slice(0, 4), slice(0, 4))
    assert resampled.density[south_west].equal(before.density[south_west])
    assert not resampled.density.equal(before.density)
    assert combined.density[..., -4:].equal(before.density[..., -4:])
    assert combined.density[..., :4].equal(second.density[..., :4])
    told = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert len(told) == 4 and all(Path(path).is_file() for path in told)


def test_schedulers_are_swapped(pipeline, capsys):
    example("schedulers_and_callbacks").main(pipeline=pipeline, num_inference_steps=3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "DDIMScheduler",
    ]


def test_a_place_is_encoded(box_room_collection, tmp_path, capsys):
    save_scene_autoencoder(small_scene_autoencoder(), tmp_path / "run", {"step": 0})
    output = tmp_path / "place.png"
    example("encode_place").main(box_room_collection.root, scene_autoencoder=tmp_path / "run", output=output)
    told = capsys.readouterr().out
    assert "V (1, 4, 4, 16, 16) of 8 views" in told and "dB" in told and "error of depth" in told
    with Image.open(output) as picture:
        assert min(picture.size) > 100


@pytest.mark.slow
def test_all_stages_are_trained(tmp_path, capsys):
    require_weights("lpips-vgg")
    collection = make_box_room_collection(tmp_path / "rooms", num_train=2, num_test=1, num_val=0)
    example("train_on_your_folder").main(collection.root, tmp_path / "out", steps=2)
    told = capsys.readouterr().out.splitlines()[-1].split()[-1]
    assert Path(told).is_file() and load_generated_scene(Path(told).parent).grid.density.isfinite().all()


def test_every_example_is_run_here():
    source = Path(__file__).read_text()
    assert all(f'example("{path.stem}")' in source for path in EXAMPLES.glob("*.py"))
