"""Damaged input of all kinds, drawn at random: a right result or one sentence, and nothing half-written."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from PIL import Image

from nfldm_ns.commands import collect
from nfldm_ns.diffusion.pipeline import load_pipeline
from nfldm_ns.errors import UserInputError, exit_on_bad_input
from nfldm_ns.generated.scene_files import load_generated_scene
from nfldm_ns.plugin.generated_run import write_generated_scene
from nfldm_ns.plugin.generated_scene import GeneratedScenePipelineConfig
from nfldm_ns.refine.domain_prior import ImageEmbedder, PriorDenoiser, PriorDescription, save_domain_prior
from nfldm_ns.refine.loading import load_prior
from nfldm_ns.refine.seen_maps import MapDescription
from nfldm_ns.refine.spaces import PixelSpace
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.writing import write_scene
from tests import more_formats, rgbd_formats
from tests.corruption import corrupt
from tests.pretrained import require_weights
from tests.small_models import random_grid, small_pipeline, small_scene_autoencoder
from tests.synthetic import AABB, BEV_CLASSES, BoxRoom, make_box_room_collection, surround_cameras
from tests.test_captures import change

IMPORT = ["--image-size", "8", "8", "--num-source-views", "2", "--num-target-views", "1", "--box"]
IMPORT += [str(v) for corner in AABB for v in corner]


def examples(number: int) -> Callable[[Any], Any]:
    """So many corrupted folders, the same ones every time."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.differing_executors]
    return settings(max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


@contextlib.contextmanager
def corrupted(whole: Path, data: st.DataObject) -> Iterator[Path]:
    """A copy with one or two corruptions, whose bytes must stay as they are."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "in" / whole.name
        shutil.copytree(whole, folder, copy_function=os.link)
        for _ in range(data.draw(st.integers(1, 2))):
            if any(folder.iterdir()):
                note(corrupt(folder, data.draw))
        before = content_of(folder)
        yield folder
        assert content_of(folder) == before


def content_of(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refusal(call: Callable[[], Any], folder: Path) -> str:
    """The sentence that something ends with; empty if it goes well, whatever it finds."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with exit_on_bad_input():
                call()
        except SystemExit as end:
            if end.code != 2:
                assert end.code in (0, 1, None) and "Traceback" not in out.getvalue()
                return ""
        else:
            return ""
    lines = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    note(err.getvalue())
    assert len(lines) == 1 and err.getvalue().strip().endswith(lines[0])
    sentence = lines[0].removeprefix("error: ")
    assert str(folder) in sentence and sentence.endswith("."), sentence
    return sentence


@pytest.fixture(scope="module")
def captures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """PNG with depth as 16-bit PNG and splits; JPEG of a lens, with EXIF and depth as npy."""
    root = tmp_path_factory.mktemp("captures")
    generator = torch.Generator().manual_seed(0)
    views = BoxRoom.random(generator).render(surround_cameras(4, 16, generator))
    write_scene(root / "plain", views[:3], views[3:])
    write_scene(root / "photos", views, views[:0])
    exif = Image.Exif()
    exif[0x0112] = 1

    def as_photos(content: dict[str, Any]) -> None:
        content.update(k1=0.01, applied_scale=1.0, depth_unit_scale_factor=0.001)
        for split in ("train", "val", "test"):
            content.pop(f"{split}_filenames")
        for frame in content["frames"]:
            for key in ("file_path", "depth_file_path"):
                path = root / "photos" / frame[key]
                suffix = ".jpg" if key == "file_path" else ".npy"
                with Image.open(path) as image:
                    image.save(path.with_suffix(suffix), exif=exif) if suffix == ".jpg" else np.save(
                        path.with_suffix(suffix), np.asarray(image)
                    )
                path.unlink()
                frame[key] = str(Path(frame[key]).with_suffix(suffix))

    change(root / "photos", as_photos)
    return [root / "plain", root / "photos"]


@examples(80)
@given(st.data())
def test_captures(captures: list[Path], data: st.DataObject) -> None:
    with corrupted(data.draw(st.sampled_from(captures)), data) as folder:
        root = folder.parent.parent / "out"
        command = ["import", str(root), "--scenes", str(folder), *IMPORT]
        if refusal(lambda: collect.main(command), folder):
            assert [path.name for path in root.parent.iterdir()] == ["in"]
        else:
            scene = SceneCollection.open(root).load_scene(folder.name)
            assert scene.source.shape == (2,) and scene.target.shape == (1,)
            assert not refusal(lambda: collect.main(["check", str(root)]), root)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small capture of each published format, by its sub-command."""
    root = tmp_path_factory.mktemp("published")
    generator = torch.Generator().manual_seed(0)
    room, cameras = BoxRoom.random(generator), surround_cameras(4, 16, generator)
    for kind, write in rgbd_formats.WRITERS.items():
        write(root / kind, room, cameras)
    rgbd_formats.write_gsn_vizdoom(root / "gsn-vizdoom", room, cameras)
    rgbd_formats.write_colmap(root / "colmap-text", room, cameras, binary=False, num_points=8)
    for kind, write in more_formats.WRITERS.items():
        write(root / kind / WITHIN.get(kind, ""), room, cameras)
    more_formats.write_nuscenes(root / "nuscenes", {"drive": (room, cameras)})
    more_formats.write_map_expansion(root / "nuscenes", [(-1, -1), (9, -1), (9, 9), (-1, 9)])
    return {folder.name: folder for folder in root.iterdir()}


def import_published(root: Path, name: str, folder: Path) -> None:
    kind = name.split("-")[0]
    options = [*rgbd_formats.options_of(kind, 16, 8.0), *more_formats.OPTIONS.get(kind, [])]
    collect.main([kind, str(root), "--scenes", str(folder / WITHIN.get(kind, "")), *IMPORT, *options])


WITHIN = {"kitti360": "data_2d_raw/drive"}
"""Where the capture is, of data sets whose other folders it needs."""


@pytest.mark.parametrize("name", [*rgbd_formats.WRITERS, "gsn-vizdoom", "colmap-text"])
@examples(20)
@given(st.data())
def test_published_formats(name: str, published: dict[str, Path], data: st.DataObject) -> None:
    import_corrupted(name, published[name], data, published[name].name)


@pytest.mark.parametrize("name", [*more_formats.WRITERS, "nuscenes"])
@examples(8)
@given(st.data())
def test_published_formats_of_phones_and_cars(name: str, published: dict[str, Path], data: st.DataObject) -> None:
    scene = "drive" if name in ("kitti360", "nuscenes") else name
    import_corrupted(name, published[name], data, scene)


def import_corrupted(name: str, whole: Path, data: st.DataObject, scene_id: str) -> None:
    with corrupted(whole, data) as folder:
        root = folder.parent.parent / "out"
        if refusal(lambda: import_published(root, name, folder), folder):
            assert [path.name for path in root.parent.iterdir()] == ["in"]
        else:
            scene = SceneCollection.open(root).load_scene(scene_id)
            assert scene.source.shape == (2,) and scene.target.shape == (1,)
            assert not refusal(lambda: collect.main(["check", str(root)]), root)


def test_whole_published_captures_are_used(published: dict[str, Path], tmp_path: Path) -> None:
    for name, folder in published.items():
        assert not refusal(lambda name=name, folder=folder: import_published(tmp_path / name, name, folder), folder)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("collections") / "rooms"
    make_box_room_collection(root, num_train=1, num_test=1, num_val=0, image_size=8, num_source=2, num_target=1)
    return root


@examples(80)
@given(st.data())
def test_collections(rooms: Path, data: st.DataObject) -> None:
    with corrupted(rooms, data) as folder:
        refusal(lambda: collect.main(["check", str(folder)]), folder)
        refusal(lambda: use(folder), folder)


def use(folder: Path) -> None:
    """What every consumer of a collection does."""
    collection = SceneCollection.open(folder)
    collection.require_train_and_test()
    collection.batch([collection.load_scene(scene_id) for scene_id in collection.scene_ids])
    collection.load_bev(collection.scene_ids[0])


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without what nerfstudio reads by itself: config.yml and its checkpoint."""
    folder = tmp_path_factory.mktemp("generated") / "scene_000000"
    cameras = surround_cameras(2, 16, torch.Generator().manual_seed(0))
    write_generated_scene(
        folder, random_grid(1), small_scene_autoencoder(), cameras, {"global": torch.zeros(8)}, eval_cameras=cameras
    )
    (folder / "config.yml").unlink()
    shutil.rmtree(folder / "nerfstudio_models")
    return folder


@examples(40)
@given(st.data())
def test_generated_scenes(generated: Path, data: st.DataObject) -> None:
    with corrupted(generated, data) as folder:
        refusal(lambda: show(folder), folder)
        refusal(lambda: load_generated_scene(folder), folder)


def show(folder: Path) -> None:
    """What the viewer does with a scene."""
    config = GeneratedScenePipelineConfig()
    config.datamanager.data = config.model.scene = folder
    pipeline = config.setup(device="cpu", test_mode="test")
    cameras = pipeline.datamanager.train_dataset.cameras
    assert pipeline.model.get_outputs_for_camera(cameras[:1])["rgb"].isfinite().all()
    for dataset in (pipeline.datamanager.train_dataset, pipeline.datamanager.eval_dataset):
        assert dataset[0]["image"].shape[-1] == 3


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "pipeline"
    small_pipeline(maps={"bev_classes": 2, "bev_size": (16, 16)}).save_pretrained(folder)
    return folder


@examples(40)
@given(st.data())
def test_pipelines(pipeline: Path, data: st.DataObject) -> None:
    with corrupted(pipeline, data) as folder:
        refusal(lambda: load_pipeline(folder), folder)


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_weights("lpips-alex")
    folder = tmp_path_factory.mktemp("priors") / "prior"
    sizes = {"channels": (8, 8), "attention": (False, True), "head_dim": 8, "judge_width": 8}
    dim = ImageEmbedder("alex", 16).dim
    denoiser = PriorDenoiser(image_size=16, embedding_dim=dim, bev_classes=2, **sizes)
    maps = MapDescription(BEV_CLASSES, (16, 16), 3.0)
    description = PriorDescription("alex", {"collection": "rooms"}, maps)
    save_domain_prior(folder, denoiser, PixelSpace(16), DDPMScheduler(), torch.zeros(2, dim), description)
    return folder


@examples(30)
@given(st.data())
def test_priors(prior: Path, data: st.DataObject) -> None:
    with corrupted(prior, data) as folder:
        refusal(lambda: load_prior(str(folder)), folder)


def test_whole_folders_are_used(captures, rooms, generated, pipeline, tmp_path: Path) -> None:
    """Without corruption, all of these go well: otherwise the tests above would test nothing."""
    for folder in captures:
        command = ["import", str(tmp_path / folder.name), "--scenes", str(folder), *IMPORT]
        assert not refusal(lambda command=command: collect.main(command), folder)
    use(rooms)
    show(generated)
    load_pipeline(pipeline)


def test_a_whole_prior_is_used(prior: Path) -> None:
    load_prior(str(prior))


def test_errors_are_one_line() -> None:
    assert str(UserInputError("a\nb")) == "a b"
