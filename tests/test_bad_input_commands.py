"""Bad input through the commands: one sentence on stderr, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image
from safetensors import safe_open

from nfldm_ns.commands import collect, demo, encode, sample, train_diffusion, train_latent_ae, weights
from nfldm_ns.diffusion.pipeline import NFLDMPipeline
from nfldm_ns.pretrained.weights import FOLDER_VARIABLE
from nfldm_ns.scenes.collection import SceneCollection
from tests.pretrained import require_weights
from tests.small_models import small_latent_autoencoder, small_pipeline, small_scene_autoencoder
from tests.synthetic import make_box_room_collection
from tests.test_bad_input_scenes import CASES, IMAGE, cut
from tests.test_nerfstudio_plugin import SMALL_NETWORK, small_config, train

WEIGHTS = "diffusion_pytorch_model.safetensors"
Refused = Callable[..., str]

# By the names of `tests.test_bad_input_scenes`; the broken scene is the first one for training.
BROKEN_COLLECTIONS = ["missing folder", "empty folder", "truncated collection", "one scene", "no test split"]
BROKEN_SCENES = [
    "truncated image",
    "truncated depth",
    "truncated transforms",
    "pose with NaN",
    "scaled pose",
    "mirrored pose",
    "zero focal length",
    "depth in metres",
]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each stage leaves for the next, untrained: rooms/, stage1/, voxels/, stage2/, pipeline/."""
    root = tmp_path_factory.mktemp("stages")
    make_box_room_collection(root / "rooms", num_train=2, num_test=1, num_val=0, num_source=2, num_target=1)
    small_scene_autoencoder().save_pretrained(root / "stage1")
    encode.main(["--load-config", str(root / "stage1"), "--data", str(root / "rooms"), *to(root / "voxels")])
    small_latent_autoencoder().save_pretrained(root / "stage2")
    small_pipeline().save_pretrained(root / "pipeline")
    return root


@pytest.fixture
def rooms(stages: Path, tmp_path: Path) -> Path:
    """A collection to break."""
    return Path(shutil.copytree(stages / "rooms", tmp_path / "rooms"))


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Calls something that ends with exit code 2 and returns the one line that it wrote to stderr."""

    def call(command: Callable[..., Any], *arguments: Any) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            command([str(a) for a in arguments]) if command.__name__ == "main" else command(*arguments)
        lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
        assert end.value.code == 2
        assert len(lines) == 1 and lines[0].startswith("error: ") and lines[0].endswith("."), lines
        return lines[0].removeprefix("error: ")

    return call


@pytest.fixture(params=["read-only", "in the way"])
def unwritable(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder that cannot be made: on a read-only file system, or below a file."""
    place = tmp_path / "place"
    if request.param == "in the way":
        place.write_text("a file")
        yield place / "out"
        return
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a file system")
    yield place / "out"
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def to(folder: Path) -> list[str]:
    return ["--output-dir", str(folder)]


def assert_whole(folder: Path) -> None:
    """Every file that is left can be read to its end, and no temporary one is among them."""
    for path in folder.rglob("*"):
        assert ".tmp" not in path.name, path
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                file.keys()
        elif path.suffix == ".png":
            Image.open(path).load()


# Data


@pytest.mark.parametrize("case", [*BROKEN_COLLECTIONS, *BROKEN_SCENES])
def test_encode_refuses_broken_data(case: str, stages: Path, rooms: Path, tmp_path: Path, refused: Refused) -> None:
    damage, _, file = CASES[case]
    damage(rooms)
    out = tmp_path / "voxels"
    error = refused(encode.main, "--load-config", stages / "stage1", "--data", rooms, *to(out))
    assert str(rooms / file) in error
    assert not list(out.glob("*.safetensors"))
    assert_whole(out)
    if case in BROKEN_COLLECTIONS:
        assert not out.exists()
    else:
        assert "nfldm-encode" in refused(train_latent_ae.main, "--voxels", out, *to(tmp_path / "stage2"))


@pytest.mark.parametrize("case", [*BROKEN_COLLECTIONS, *BROKEN_SCENES])
def test_stage_1_training_refuses_broken_data(case: str, rooms: Path, tmp_path: Path, refused: Refused) -> None:
    damage, _, file = CASES[case]
    damage(rooms)
    error = refused(train, small_config(rooms, tmp_path / "outputs", 1))
    assert str(rooms / file) in error
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("case", ["missing folder", "empty folder", "truncated collection"])
def test_check_refuses_what_is_no_collection(case: str, rooms: Path, refused: Refused) -> None:
    damage, _, file = CASES[case]
    damage(rooms)
    assert str(rooms / file) in refused(collect.main, "check", rooms)


def test_an_encoding_continues_once_the_data_are_repaired(stages: Path, rooms: Path, tmp_path: Path, refused) -> None:
    image = rooms / IMAGE.replace("room_000", "room_001")
    whole = image.read_bytes()
    cut(str(image.relative_to(rooms)))(rooms)
    arguments = ["--load-config", stages / "stage1", "--data", rooms, *to(tmp_path / "voxels")]
    assert str(image) in refused(encode.main, *arguments)
    assert [path.stem for path in (tmp_path / "voxels").glob("*.safetensors")] == ["room_000"]
    image.write_bytes(whole)
    encode.main([str(a) for a in arguments])
    assert len(list((tmp_path / "voxels").glob("*.safetensors"))) == 3


def test_training_refuses_voxels_whose_collection_is_gone_or_broken(
    stages: Path, rooms: Path, tmp_path: Path, refused: Refused
) -> None:
    voxels = Path(shutil.copytree(stages / "voxels", tmp_path / "voxels"))
    description = json.loads((voxels / "voxels.json").read_text())
    (voxels / "voxels.json").write_text(json.dumps({**description, "collection": str(rooms)}))
    latents = ["all", "--voxels", voxels, "--latent-autoencoder", stages / "stage2", *to(tmp_path / "stage3")]
    for scene in ("room_000", "room_001"):
        cut(f"scenes/{scene}/images/source_00.png")(rooms)
        cut(f"scenes/{scene}/images/source_01.png")(rooms)
        cut(f"scenes/{scene}/images/target_00.png")(rooms)
    arguments = ["--voxels", voxels, *to(tmp_path / "stage2"), "--max-steps", 1]
    assert "is not a readable image" in refused(train_latent_ae.main, *arguments)
    shutil.rmtree(rooms)
    assert f"There is no data folder {rooms}" in refused(train_latent_ae.main, *arguments)
    assert f"There is no data folder {rooms}" in refused(train_diffusion.main, *latents)
    assert_whole(tmp_path / "stage2")
    assert not (tmp_path / "stage2" / "latent_autoencoder").exists() and not (tmp_path / "stage3").exists()


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_training_refuses_broken_voxels(damage: str, stages: Path, tmp_path: Path, refused: Refused) -> None:
    voxels = Path(shutil.copytree(stages / "voxels", tmp_path / "voxels"))
    cut("room_000.safetensors")(voxels) if damage == "truncated" else (voxels / "room_000.safetensors").unlink()
    assert str(voxels) in refused(train_latent_ae.main, "--voxels", voxels, *to(tmp_path / "out"))
    latents = ["all", "--voxels", voxels, "--latent-autoencoder", stages / "stage2", *to(tmp_path / "out")]
    assert str(voxels) in refused(train_diffusion.main, *latents)
    assert not (tmp_path / "out").exists()


# Pipelines


def damage_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "width": 64}))


PIPELINES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing folder": (shutil.rmtree, "model_index.json"),
    "missing component": (lambda p: shutil.rmtree(p / "coarse_denoiser"), "lacks component coarse_denoiser"),
    "missing weights": (lambda p: (p / "fine_denoiser" / WEIGHTS).unlink(), f"fine_denoiser/{WEIGHTS} is missing"),
    "truncated weights": (cut(f"latent_autoencoder/{WEIGHTS}"), f"latent_autoencoder/{WEIGHTS} is damaged"),
    "truncated config": (cut("scene_autoencoder/config.json"), "scene_autoencoder/config.json is not valid JSON"),
    "truncated index": (cut("model_index.json"), "model_index.json is not valid JSON"),
    "config of other weights": (lambda p: damage_config(p / "global_denoiser"), "is of another preset or version"),
    "component of another training": (
        lambda p: small_latent_autoencoder(fine_channels=8).save_pretrained(p / "latent_autoencoder"),
        "use components of one training",
    ),
    "stage 1 as pipeline": (lambda p: (p / "model_index.json").unlink(), "model_index.json"),
}


@pytest.mark.parametrize("case", PIPELINES)
def test_sample_refuses_broken_pipelines(case: str, stages: Path, tmp_path: Path, refused: Refused) -> None:
    damage, sentence = PIPELINES[case]
    pipeline = Path(shutil.copytree(stages / "pipeline", tmp_path / "pipeline"))
    damage(pipeline)
    error = refused(sample.main, pipeline, *to(tmp_path / "generated"))
    assert str(pipeline) in error and sentence in error
    assert not (tmp_path / "generated").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--num-scenes", 0], "--num-scenes is 0, but must be at least 1"),
        (["--batch-size", -1], "--batch-size is -1, but must be at least 1"),
        (["--num-inference-steps", 0], "--num-inference-steps is 0, but must be at least 1"),
        (["--seed", -1], "--seed is -1, but must be at least 0"),
        (["--seed", 2**64], "--seed is 18446744073709551616"),
    ],
)
def test_sample_refuses_what_the_pipeline_refuses(options: list, sentence: str, tmp_path, refused: Refused) -> None:
    assert sentence in refused(sample.main, *options, *to(tmp_path / "generated"))
    assert not (tmp_path / "generated").exists()


@pytest.mark.parametrize(
    ("scheduler", "sentence"),
    [
        (FlowMatchEulerDiscreteScheduler, "the flag flow of scheduler is True, but that of global_denoiser is False"),
        (EDMEulerScheduler, "scheduler_config.json does not describe a EDMEulerScheduler"),
    ],
)
def test_sample_tells_that_a_scheduler_does_not_fit(
    scheduler: type, sentence: str, stages: Path, tmp_path: Path, refused: Refused
) -> None:
    pipeline = NFLDMPipeline.from_pretrained(stages / "pipeline")
    pipeline.scheduler = scheduler()
    pipeline.save_pretrained(tmp_path / "pipeline")
    error = refused(sample.main, tmp_path / "pipeline", "--num-scenes", 1, *to(tmp_path / "generated"))
    assert str(tmp_path / "pipeline") in error and sentence in error
    assert not list((tmp_path / "generated").glob("*"))


# Other presets


def test_run_of_another_preset_or_stage_1_is_not_continued(stages: Path, tmp_path: Path, refused: Refused) -> None:
    require_weights("lpips-vgg")
    run, other = tmp_path / "stage2", tmp_path / "other"
    arguments = ["--voxels", str(stages / "voxels"), *to(run), "--max-steps", "1", "--no-evaluate"]
    train_latent_ae.main(arguments)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert "another preset" in refused(train_latent_ae.main, *arguments, "--preset", "base", "--mixed-precision", "no")
    assert "another preset" in refused(train_latent_ae.main, *arguments, "--no-quantize")
    begun = [*arguments, "--initial-weights", tmp_path]
    assert "--no-use-fine does not go with --initial-weights" in refused(train_latent_ae.main, *begun, "--no-use-fine")

    small_scene_autoencoder(seed=1).save_pretrained(other / "stage1")
    encoding = ["--load-config", str(other / "stage1"), "--data", str(stages / "rooms")]
    assert "another scene auto-encoder" in refused(encode.main, *encoding, *to(stages / "voxels"))
    encode.main([*encoding, *to(other / "voxels")])
    voxels = ["--voxels", str(other / "voxels")]
    assert "or of other data" in refused(train_latent_ae.main, *voxels, *to(run), "--no-evaluate")
    latents = ["all", *voxels, "--latent-autoencoder", run, *to(tmp_path / "stage3")]
    assert "trained on voxels of another scene auto-encoder" in refused(train_diffusion.main, *latents)

    small_latent_autoencoder(feature_channels=6).save_pretrained(other / "stage2")
    latents = ["all", *voxels, "--latent-autoencoder", other / "stage2", *to(tmp_path / "stage3")]
    assert "give the voxels it was trained on" in refused(train_diffusion.main, *latents)
    assert not (tmp_path / "stage3").exists()
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_ns_eval_refuses_a_checkpoint_of_another_preset(stages: Path, tmp_path: Path, refused: Refused) -> None:
    run = train(small_config(stages / "rooms", tmp_path / "outputs", 1))
    checkpoint = next((run / "nerfstudio_models").iterdir())
    state = torch.load(checkpoint)
    name = next(key for key in state["pipeline"] if key.endswith("weight"))
    state["pipeline"][name] = state["pipeline"][name][:1]
    torch.save(state, checkpoint)
    error = refused(eval_setup, run / "config.yml")
    assert "another preset" in error and name.removeprefix("_model.") in error
    assert SMALL_NETWORK.feature_channels == 4


# Output folders


def test_encode_explains_unwritable_output(stages: Path, unwritable: Path, refused: Refused) -> None:
    arguments = ["--load-config", stages / "stage1", "--data", stages / "rooms", *to(unwritable)]
    assert str(unwritable.parent) in refused(encode.main, *arguments)


def test_training_explains_unwritable_output(stages: Path, unwritable: Path, refused: Refused) -> None:
    voxels = ["--voxels", stages / "voxels", *to(unwritable), "--max-steps", 1]
    assert str(unwritable.parent) in refused(train_latent_ae.main, *voxels)
    latents = ["global", *voxels, "--latent-autoencoder", stages / "stage2"]
    assert str(unwritable.parent) in refused(train_diffusion.main, *latents)
    assert str(unwritable.parent) in refused(train, small_config(stages / "rooms", unwritable, 1))


def test_sample_explains_unwritable_output_before_it_samples(
    stages: Path, unwritable: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.delattr("nfldm_ns.diffusion.pipeline.NFLDMPipeline.__call__")
    arguments = [stages / "pipeline", "--num-scenes", 1, "--num-inference-steps", 1, *to(unwritable)]
    assert str(unwritable.parent) in refused(sample.main, *arguments)


def test_collect_explains_unwritable_output(stages: Path, unwritable: Path, refused: Refused) -> None:
    assert str(unwritable.parent) in refused(collect.main, "vizdoom", unwritable, "--num-scenes", 2)
    scenes = [stages / "rooms" / "scenes" / name for name in ("room_000", "room_001")]
    views = ["--num-source-views", 1, "--num-target-views", 1]
    assert str(unwritable.parent) in refused(collect.main, "import", unwritable, "--scenes", *scenes, *views)


def test_demo_and_weights_explain_unwritable_output(
    unwritable: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    assert str(unwritable.parent) in refused(demo.main, *to(unwritable), "--preset", "smoke")
    monkeypatch.setenv("XDG_CACHE_HOME", str(unwritable))
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    assert str(unwritable.parent) in refused(weights.main, "get", "lpips-vgg")


def test_full_disk_while_encoding_training_or_sampling(stages: Path, small_disk: Path, refused: Refused) -> None:
    out = small_disk / "out"
    voxels = ["--voxels", stages / "voxels", *to(out), "--max-steps", 1]
    for command, arguments in (
        (encode.main, ["--load-config", stages / "stage1", "--data", stages / "rooms", *to(out)]),
        (train_latent_ae.main, voxels),
        (train_diffusion.main, ["global", *voxels, "--latent-autoencoder", stages / "stage2"]),
        (sample.main, [stages / "pipeline", "--num-scenes", 1, "--num-inference-steps", 1, *to(out)]),
    ):
        assert f"The disk is full while writing {out}" in refused(command, *arguments)
        assert_whole(small_disk)
        shutil.rmtree(out, ignore_errors=True)


def test_full_disk_while_collecting(box_room_collection: SceneCollection, small_disk: Path, refused: Refused) -> None:
    scenes = [box_room_collection.scene_dir(scene_id) for scene_id in box_room_collection.scene_ids]
    error = refused(collect.main, "import", small_disk / "out", "--scenes", *scenes)
    assert f"The disk is full while writing {small_disk / 'out'}" in error
    assert not list(small_disk.iterdir())
    maps = ["--maps", "freedoom2/MAP08", "freedoom2/MAP04", "--min-light", "200"]
    error = refused(collect.main, "vizdoom", small_disk / "out", "--num-scenes", 4, *maps)
    assert f"The disk is full while writing {small_disk / 'out'}" in error
    assert_whole(small_disk)
    assert not (small_disk / "out" / "collection.json").exists()


# The real command


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ns_train_prints_one_sentence(tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("ns-train"), "nfldm-scene-ae-tiny", "--data", tmp_path / "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"error: There is no data folder {tmp_path / 'nowhere'}" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())
