"""The panel of generated scenes: its session without a viewer, the viewer with it, and `nfldm-studio`."""

from __future__ import annotations

import contextlib
import io
import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import studio as studio_benchmark
import torch
import trimesh
from PIL import Image

from nfldm_ns.commands import studio as command
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, load_pipeline
from nfldm_ns.editing.region import box_region, half_plane_region
from nfldm_ns.editing.scenes import load_scene
from nfldm_ns.errors import UserInputError
from nfldm_ns.exports.voxels import read_voxels
from nfldm_ns.generated.cameras import surround_cameras
from nfldm_ns.generated.scene_files import GeneratedScene, load_generated_scene
from nfldm_ns.plugin.generated_run import write_generated_scene
from nfldm_ns.plugin.scene_config import scene_run_config
from nfldm_ns.sampling.scenes import draw_scenes, sample_scenes
from nfldm_ns.studio.drawn_map import DrawnMap
from nfldm_ns.studio.generator import Generator, Settings
from nfldm_ns.studio.jobs import Job, Worker
from nfldm_ns.studio.launch import open_port, open_studio
from nfldm_ns.studio.panel import plain
from nfldm_ns.studio.session import IN_THE_BOX, StudioScene, StudioSession, free_path
from shared.chromium import find_chromium
from tests.small_models import random_grid, small_pipeline, small_scene_autoencoder
from tests.synthetic import AABB, BEV_CLASSES

PATIENCE_S = 240.0
STEPS = Settings(num_inference_steps=2)
MAPS = {"bev_classes": 2, "bev_size": (16, 16), "bev_dropout": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained generator, as far as files tell, that knows maps."""
    saved = tmp_path_factory.mktemp("generator") / "pipeline"
    small_pipeline(maps=MAPS).save_pretrained(saved)
    return saved


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> NFLDMPipeline:
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def scene(pipeline: NFLDMPipeline, folder: Path) -> GeneratedScene:
    return draw_scenes(pipeline, 1, 5, num_inference_steps=2, source=str(folder))[0]


@pytest.fixture
def session(pipeline, folder, scene, tmp_path) -> Iterator[StudioSession]:
    made = StudioSession(scene, "scene_000005", tmp_path / "kept", Generator(str(folder), "cpu", pipeline))
    yield made
    made.worker.cancel()
    assert made.worker.wait(PATIENCE_S)


def finish(session: StudioSession) -> str:
    """The sentence that a job ends with."""
    assert session.worker.wait(PATIENCE_S)
    assert not session.worker.status.failed, session.worker.status.message
    return session.worker.status.message


def same(first: GeneratedScene, second: GeneratedScene) -> bool:
    return torch.equal(first.grid.density, second.grid.density) and torch.equal(
        first.grid.features, second.grid.features
    )


class Gate:
    """Lets a job begin and stop there until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, job: Job) -> str:
        self.reached.set()
        assert self.opened.wait(PATIENCE_S)
        job.progress(0.5)
        return "Done."


def test_a_job_runs_beside_its_caller_and_alone():
    worker, gate = Worker(), Gate()
    worker.start("Waiting", gate)
    assert gate.reached.wait(PATIENCE_S) and worker.status.running and worker.status.what == "Waiting"
    with pytest.raises(UserInputError, match="Waiting is not finished: wait for it, or cancel it"):
        worker.start("More", gate)
    gate.opened.set()
    assert worker.wait(PATIENCE_S) and worker.status.message == "Done." and not worker.status.failed


def test_a_cancelled_job_stops_at_its_next_step():
    worker, gate = Worker(), Gate()
    worker.start("Waiting", gate)
    assert gate.reached.wait(PATIENCE_S)
    worker.cancel()
    gate.opened.set()
    assert worker.wait(PATIENCE_S)
    assert worker.status.failed and worker.status.message == "Waiting: cancelled, nothing changed."


FAILURES = {
    "bad input": (UserInputError("No such room: take another."), "No such room: take another."),
    "what a generator refuses": (ValueError("too hot"), "Failing is not possible: too hot."),
    "a full disk": (OSError(28, "No space left on device", "a.png"), "The disk is full while writing a.png"),
    "a bug": (KeyError("x"), "Failing ended in an error of the program (KeyError)"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_job_says_why_and_lets_another_begin(case, capfd):
    error, sentence = FAILURES[case]

    def fail(job: Job) -> str:
        raise error

    worker = Worker()
    worker.start("Failing", fail)
    assert worker.wait(PATIENCE_S)
    assert worker.status.failed and sentence in worker.status.message
    assert ("Traceback" in capfd.readouterr().err) == (case == "a bug")
    worker.start("Going on", lambda job: "Done.")
    assert worker.wait(PATIENCE_S) and worker.status.message == "Done."


def test_a_sampled_scene_is_that_of_nfldm_sample(session, pipeline, folder, tmp_path):
    session.sample(3, STEPS)
    assert finish(session) == "scene_000003 is ready." and session.on_show.name == "scene_000003"
    session.save()
    kept = Path(finish(session).removeprefix("Kept as "))
    expected = next(sample_scenes(pipeline, tmp_path / "sampled", 1, 3, num_inference_steps=2, source=str(folder)))
    found, wanted = load_generated_scene(kept), load_generated_scene(expected)
    assert same(found, wanted) and found.provenance == {**wanted.provenance, "command": "nfldm-studio"}
    assert all(torch.equal(found.latents[name], wanted.latents[name]) for name in wanted.latents)
    names = [{path.relative_to(root) for path in root.rglob("*")} for root in (kept, expected)]
    assert names[0] == names[1]


def test_progress_grows_to_the_end(pipeline, folder, scene, tmp_path):
    shares = []
    session = StudioSession(
        scene,
        "a",
        tmp_path,
        Generator(str(folder), "cpu", pipeline),
        changed=lambda: shares.append(session.worker.status.share) if session.worker.status.running else None,
    )
    session.sample(0, STEPS)
    finish(session)
    steps = list(dict.fromkeys(share for share in shares if share > 0))
    assert steps == pytest.approx([i / 6 for i in range(1, 7)])
    shares.clear()
    session.resample((-2, -2, 2, 2), 0, STEPS)
    finish(session)
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1.0)


def test_settings_reach_the_sampler(session, pipeline, folder):
    own = pipeline.scheduler
    settings = Settings(3, "DDIM", (0.5, 0.25, 0.0))
    session.sample(1, settings)
    finish(session)
    assert pipeline.scheduler is own
    record = session.on_show.scene.provenance
    assert record["scheduler"] == "DDIMScheduler" and record["temperatures"] == [0.5, 0.25, 0.0]
    with Generator(str(folder), "cpu", pipeline).with_solver("DDIM"):
        options = {"num_inference_steps": 3, "temperatures": (0.5, 0.25, 0.0)}
        expected = draw_scenes(pipeline, 1, 1, **options)[0]
    assert same(session.on_show.scene, expected)


def test_an_unknown_solver_is_refused(session):
    session.sample(1, Settings(2, "Magic"))
    assert session.worker.wait(PATIENCE_S)
    assert "There is no solver Magic: take one of DPM++" in session.worker.status.message
    assert len(session.scenes) == 1


def test_cancelled_sampling_changes_nothing(pipeline, folder, scene, tmp_path):
    shown = []

    def stop_in_the_middle() -> None:
        if session.worker.status.share > 0.4:
            session.worker.cancel()

    session = StudioSession(
        scene,
        "a",
        tmp_path,
        Generator(str(folder), "cpu", pipeline),
        show=shown.append,
        changed=stop_in_the_middle,
    )
    session.sample(0, STEPS)
    assert session.worker.wait(PATIENCE_S)
    assert session.worker.status.message == "Sampling seed 0: cancelled, nothing changed."
    assert len(session.scenes) == 1 and not shown and list(tmp_path.iterdir()) == []


def test_a_resampled_box_leaves_the_rest(session, scene):
    box = (1.0, 1.0, 2.0, 2.0)
    session.resample(box, 4, STEPS, seam_m=0.5)
    finish(session)
    edited = session.on_show
    region = box_region(scene.grid, box)
    beyond = region.weights(0.5) == 0
    assert edited.name == "scene_000005_box_000004" and edited.scene.provenance["region"]["box"] == list(box)
    difference = (edited.scene.grid.features - scene.grid.features).abs().amax(dim=(0, 1, 2))
    assert bool(beyond.any()) and float(difference[beyond].max()) == 0 and float(difference[region.columns].max()) > 0
    session.resample(box, 6, STEPS)
    finish(session)
    assert session.on_show.name == "scene_000005_box_000006"


def test_a_box_is_cut_to_the_scene(session):
    low, high = AABB
    assert session.cut((-100, -100, 100, 100)) == pytest.approx((low[0], low[1], high[0], high[1]))
    with pytest.raises(UserInputError, match="is empty"):
        session.resample((high[0] + 1, 0, high[0] + 2, 1), 0, STEPS)


def test_joined_scenes_have_their_sides(session, scene):
    session.sample(8, STEPS)
    finish(session)
    other = session.on_show.scene
    session.choose(0)
    session.combine(1, "west of", 0.5, (0, 0, 1, 1), seam_m=0.0)
    assert finish(session) == "scene_000005_with_scene_000008 is ready."
    joined = session.on_show.scene.grid.features
    west = half_plane_region(scene.grid, -1, 0, -0.5).columns
    assert torch.equal(joined[..., west], other.grid.features[..., west])
    assert torch.equal(joined[..., ~west], scene.grid.features[..., ~west])
    session.resample((1, 1, 2, 2), 0, STEPS)  # has no latents, and gets them
    finish(session)
    session.choose(0)
    session.combine(1, IN_THE_BOX, 0.0, (-1, -1, 1, 1), 0, STEPS, harmonise=0.5)
    finish(session)
    assert "harmonised" in session.on_show.scene.provenance
    with pytest.raises(UserInputError, match="another scene than the one on show"):
        session.combine(session.current, "east of", 0.0, (0, 0, 1, 1))


def test_what_is_kept_replaces_nothing(session, scene, tmp_path):
    (tmp_path / "kept/scene_000005").mkdir(parents=True)
    (tmp_path / "kept/scene_000005/mine.txt").write_text("mine")
    session.save()
    assert finish(session) == f"Kept as {tmp_path / 'kept/scene_000005_2'}"
    assert same(load_generated_scene(tmp_path / "kept/scene_000005_2"), scene)
    session.save()
    assert "It is kept already" in finish(session)
    assert (tmp_path / "kept/scene_000005/mine.txt").read_text() == "mine"
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert free_path(tmp_path / "new.png") == tmp_path / "new.png"


def test_exports_are_written(session, scene, tmp_path):
    session.export("voxels (npz)")
    path = Path(finish(session).removeprefix("Written: "))
    assert torch.equal(read_voxels(path).features, scene.grid.features)
    session.export("mesh (PLY)")
    assert len(trimesh.load(finish(session).removeprefix("Written: ")).vertices) > 0


def test_a_picture_is_written_and_delivered(session):
    colours = torch.rand(6, 9, 3)
    delivered = {}
    session.take_picture(lambda: colours, delivered.__setitem__)
    path = Path(finish(session).removeprefix("Written: "))
    assert delivered == {path.name: path.read_bytes()}
    found = np.asarray(Image.open(path))
    assert np.array_equal(found, colours.mul(255).round().byte().numpy())


def test_the_map_is_there_as_soon_as_the_generator_is(session):
    """A panel that sees a generator before any job asked for its map must not say that it knows none."""
    assert session.generator.ready and session.map is not None
    assert session.map is session.map


def test_a_map_is_followed(session, pipeline, folder):
    session.open_generator()
    finish(session)
    assert session.map is not None
    session.map.paint((-1, -1, 1, 1), "void")
    session.follow_map = True
    session.sample(2, STEPS)
    finish(session)
    cells = session.map.cells.copy()
    expected = draw_scenes(pipeline, 1, 2, num_inference_steps=2, source=str(folder), maps=[cells])[0]
    assert session.on_show.name == "scene_000002_map" and same(session.on_show.scene, expected)
    session.save()
    drawn = Image.open(Path(finish(session).removeprefix("Kept as ")) / "bev.png")
    assert np.array_equal(np.asarray(drawn), cells)


def test_scenes_of_folders_join_in(session, scene, pipeline, tmp_path):
    other = next(sample_scenes(pipeline, tmp_path, 1, 9, num_inference_steps=2))
    session.open_scene(other)
    finish(session)
    assert session.on_show.name == "scene_000009" and session.on_show.folder == other
    foreign = tmp_path / "foreign"
    write_generated_scene(foreign, random_grid(1), small_scene_autoencoder(seed=7), surround_cameras(4, (32, 32), 16.0))
    session.open_scene(foreign)
    assert session.worker.wait(PATIENCE_S)
    assert "another decoder" in session.worker.status.message and len(session.scenes) == 2


def test_without_a_generator_one_may_still_look_and_join(scene, tmp_path):
    unknown = GeneratedScene(scene.grid, scene.renderer, scene.cameras, scene.latents, {"seed": 1})
    session = StudioSession(unknown, "a", tmp_path)
    assert session.generator.why_not == "Sampling is off: the scene does not say which generator made it."
    with pytest.raises(UserInputError, match="Sampling is off"):
        session.sample(0)
    lost = Generator("nowhere/at-all")
    assert "generator nowhere/at-all, which made the scene, is not there" in lost.why_not
    session.scenes.append(StudioScene("b", scene))
    session.combine(1, "north of", 0.0, (0, 0, 1, 1))
    finish(session)


@pytest.mark.parametrize(("seed", "steps"), [(-1, 2), (0, 0)])
def test_useless_numbers_are_refused_at_once(session, seed, steps):
    with pytest.raises(UserInputError, match="give another number"):
        session.sample(seed, Settings(steps))


@pytest.fixture
def drawn() -> DrawnMap:
    return DrawnMap(BEV_CLASSES, (8, 4), np.array([[-2.0, -4.0, -1.0], [2.0, 4.0, 1.0]]))


def test_a_new_map_has_a_room_in_the_middle(drawn):
    expected = np.zeros((8, 4), dtype=np.uint8)
    expected[2:6, 1:3] = 1
    assert np.array_equal(drawn.cells, expected)


def test_painting_fills_the_cells_that_are_touched(drawn):
    drawn.paint((1.5, 3.5, 1.5, 3.5), "floor")  # north-east: first row, last column
    assert drawn.cells[0, 3] == 1 and drawn.cells.sum() == 8 + 1
    drawn.paint((9.0, -2.5, -0.5, -9.0), "floor")  # the south-east corner and beyond, corners in any order
    assert bool((drawn.cells[6:, 1:] == 1).all()) and drawn.cells[6:, 0].sum() == 0
    drawn.undo()
    drawn.undo()
    drawn.undo()
    assert drawn.cells.sum() == 8
    with pytest.raises(UserInputError, match="beside the map"):
        drawn.paint((3, 0, 5, 1), "floor")
    with pytest.raises(UserInputError, match="no class lava to draw: take one of void, floor"):
        drawn.paint((0, 0, 0, 0), "lava")


def test_maps_come_back_from_their_png(drawn):
    drawn.paint((-1.5, 3.5, -1.5, 3.5), "floor")
    again = DrawnMap(BEV_CLASSES, (8, 4), drawn.aabb)
    again.load(drawn.png(), "map.png")
    assert np.array_equal(again.cells, drawn.cells)
    picture = drawn.picture(8)
    assert picture.shape == (64, 32, 3) and tuple(picture[4, 4]) == BEV_CLASSES[1].color
    before = again.cells.copy()
    for content, sentence in ((b"no picture", "map.png is not a readable image"), (wide_png(), "map.png is 5 x 5")):
        with pytest.raises(UserInputError, match=sentence):
            again.load(content, "map.png")
    assert np.array_equal(again.cells, before)


def wide_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 5)).save(buffer, format="PNG")
    return buffer.getvalue()


def test_words_stay_words_in_markdown():
    assert plain("a_b {c} <d> x < 1") == r"a\_b \{c\} \<d\> x \< 1"


def test_the_model_shows_another_scene(scene, pipeline, tmp_path):
    """Pictures are those of the scene on show, and one that was begun before is wholly of the one before."""
    for i in range(2):
        write_generated_scene(
            tmp_path / f"scene_{i}", random_grid(1, seed=i), pipeline.scene_autoencoder, scene.cameras
        )
    first, second = (
        scene_run_config(tmp_path / f"scene_{i}").pipeline.setup(device="cpu", test_mode="test") for i in range(2)
    )
    camera = first.datamanager.train_dataset.cameras[:1]
    expected = [p.model.get_outputs_for_camera(camera)["rgb"] for p in (first, second)]
    assert not torch.allclose(expected[0], expected[1])
    began = first.model.shown_grid()
    first.model.show(second.model.on_show)
    assert torch.equal(first.model.get_outputs_for_camera(camera)["rgb"], expected[1])
    assert torch.equal(began.features, load_generated_scene(tmp_path / "scene_0").grid.features)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_taken_port_is_told():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        with pytest.raises(UserInputError, match=f"Port {taken} of 127.0.0.1 cannot be used .*: give another one"):
            open_port(taken, "127.0.0.1")
        assert open_port(None, "127.0.0.1") != taken
    with pytest.raises(UserInputError, match="give --port a number below 65536"):
        open_port(70000, "127.0.0.1")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--scene", "nowhere"], "nowhere is no generated scene: make some with 'nfldm-sample'."),
        (["--seed", "-1"], "--seed is -1, but must be at least 0"),
        (["--pipeline", "nowhere"], "nowhere has no model_index.json"),
    ],
)
def test_bad_input_ends_in_a_sentence(arguments, sentence, capfd):
    with pytest.raises(SystemExit) as ending:
        command.main(arguments)
    assert ending.value.code == 2 and f"error: {sentence}" in capfd.readouterr().err


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_the_panel_does_what_its_buttons_say(folder, pipeline, tmp_path):
    scenes = sample_scenes(pipeline, tmp_path, 2, 0, num_inference_steps=2, source=str(folder))
    studio = open_studio(list(scenes), tmp_path / "kept", free_port(), browser=None)
    try:
        panel, session = studio.panel, studio.panel.session
        until(lambda: session.generator.ready and not session.worker.status.running)
        until(lambda: panel.solver.options[0] == "DPM++")
        assert panel.chosen.options == ("1: scene_000000", "2: scene_000001")
        panel.steps.value, panel.seed.value = 4, 7
        panel.sample.value = True  # a click
        until(lambda: len(session.scenes) == 3)
        until(lambda: panel.chosen.value == "3: scene_000007")
        assert panel.seed.value == 8 and same(panel.pipeline.model.on_show, session.on_show.scene)
        panel.chosen.value = "1: scene_000000"
        until(lambda: session.current == 0)
        panel.resample.value = True
        until(lambda: len(session.scenes) == 4 and not session.worker.status.running)
        until(lambda: panel.status.content == plain("scene_000000_box_000001 is ready."))
        panel.other.value = panel.chosen.value
        panel.join.value = True
        until(lambda: "another scene than the one on show" in panel.status.content)
        assert panel.canvas is not None
        panel._paint((-0.1, -0.1, 0.1, 0.1))
        assert session.follow_map and session.map is not None and session.map.cells[8, 8] == 1
    finally:
        studio.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(find_chromium() is None, reason="needs chromium")
def test_the_panel_in_a_browser(folder, tmp_path):
    """The script behind the numbers and the animation samples, cancels, marks a box, draws a map by clicks alone."""
    studio_benchmark.main(
        studio_benchmark.Options(tmp_path, folder, num_inference_steps=4, answers=1, threads=1, settle_s=0.3)
    )
    found = json.loads((tmp_path / "studio.json").read_text())
    assert all(math.isfinite(value) for value in found["sample"].values())
    assert len(found["answers_ms"]["while sampling"]["page_ms"]) == 1
    with Image.open(tmp_path / "studio.gif") as film:
        assert film.size == studio_benchmark.GIF_SIZE and film.n_frames >= 8
    colours = [
        np.asarray(Image.open(path))[:, : studio_benchmark.WINDOW[0] // 2] for path in sorted(tmp_path.glob("*.png"))
    ]
    assert all(picture.std() > 5 for picture in colours)
    names = [path.stem.partition("_")[2] for path in sorted(tmp_path.glob("*.png"))]
    drawn = colours[names.index("drawn") + 1]
    floor = np.array(BEV_CLASSES[1].color)
    assert 0.01 < (np.abs(drawn - floor.astype(int)).max(axis=-1) < 12).mean() < 0.9


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_samples_opens_and_closes(folder, tmp_path):
    port = free_port()
    options = ["--pipeline", folder, "--output-dir", tmp_path, "--port", port, "--num-inference-steps", 2]
    arguments = [sys.executable, "-m", "nfldm_ns.commands.studio", *map(str, options)]
    running = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        assert running.stdout is not None
        lines = []
        for line in running.stdout:
            lines.append(line)
            if "The studio is open" in line:
                break
        assert f"http://127.0.0.1:{port}" in lines[-1], "".join(lines)
        assert load_scene(tmp_path / "scene_000000").provenance["command"] == "nfldm-studio"
        running.send_signal(signal.SIGINT)
        rest = running.stdout.read()
        assert running.wait(PATIENCE_S) == 0 and "Closing the viewer." in rest and "Traceback" not in rest
    finally:
        with contextlib.suppress(ProcessLookupError):
            running.kill()
        running.wait()
