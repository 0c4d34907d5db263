"""nfldm-demo: stages that are skipped, continued or repeated; its numbers; and the whole of it at the smallest size."""

from __future__ import annotations

import html.parser
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console
from torch import nn

from nfldm_ns.autoencoder.novel_views import evaluate_novel_views, reconstruct
from nfldm_ns.choice import evenly
from nfldm_ns.commands.demo import Demo as DemoCommand
from nfldm_ns.commands.demo import main
from nfldm_ns.demo import pace
from nfldm_ns.demo.console import StageConsole, Timetable, clock
from nfldm_ns.demo.denoisers import load_latents, save_latents
from nfldm_ns.demo.evaluation import compare_image_sets
from nfldm_ns.demo.runner import Stage, read_marker, run_stages
from nfldm_ns.demo.scene_training import run_folder, train_command
from nfldm_ns.demo.settings import fingerprint
from nfldm_ns.diffusion.latent_memory import LatentMemory
from nfldm_ns.errors import UserInputError
from nfldm_ns.evaluation.novel_views import judge_novel_views
from nfldm_ns.generated.scene_files import load_generated_scene
from nfldm_ns.method_configs.demo_presets import DEMO_PRESETS
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.writing import write_image
from tests.pretrained import require_weights
from tests.small_models import small_latent_autoencoder, small_scene_autoencoder

COMMAND = Path(sys.executable).with_name("nfldm-demo")


def quiet(names: list[str]) -> StageConsole:
    return StageConsole(names, names, {}, Console(file=io.StringIO()))


class Steps:
    """Three stages that write one file each, and remember what was run."""

    def __init__(self, root: Path) -> None:
        self.root, self.ran, self.settings = root, [], {"a": 1, "b": 1, "c": 1}
        self.broken: str | None = None

    def run(self, redo: str | None = None) -> list[str]:
        self.ran = []
        stages = [Stage(name, name, self._action(name), self.settings[name], (f"{name}.txt",)) for name in "abc"]
        try:
            run_stages(self.root, stages, quiet(list("abc")), redo)
        except KeyboardInterrupt:
            self.ran.append("interrupted")
        return self.ran

    def _action(self, name: str):
        def action(report) -> dict[str, int]:
            self.ran.append(name)
            report(0.5, "half")
            path = self.root / f"{name}.txt"
            self.found = path.read_text() if path.exists() else ""
            path.write_text(self.found + "x")
            if self.broken == name:
                raise KeyboardInterrupt
            return {"value": len(self.found)}

        return action


@pytest.fixture
def steps(tmp_path: Path) -> Steps:
    return Steps(tmp_path / "demo")


# Running stages


def test_finished_stages_are_not_repeated(steps: Steps) -> None:
    assert steps.run() == ["a", "b", "c"]
    assert steps.run() == []
    assert read_marker(steps.root, "b").results == {"value": 0}


def test_interrupted_stage_continues_with_what_it_left(steps: Steps) -> None:
    steps.broken = "b"
    assert steps.run() == ["a", "b", "interrupted"]
    before = read_marker(steps.root, "b")
    assert not before.finished
    steps.broken = None
    assert steps.run() == ["b", "c"]
    assert (steps.root / "b.txt").read_text() == "xx"
    assert (steps.root / "c.txt").read_text() == "x"
    assert read_marker(steps.root, "b").seconds >= before.seconds


def test_changed_settings_repeat_that_stage_and_the_later_ones_from_scratch(steps: Steps) -> None:
    steps.run()
    steps.settings["b"] = 2
    assert steps.run() == ["b", "c"]
    assert (steps.root / "b.txt").read_text() == (steps.root / "c.txt").read_text() == "x"
    assert steps.run() == []


def test_changed_settings_do_not_continue_an_interrupted_stage(steps: Steps) -> None:
    steps.broken = "b"
    steps.run()
    steps.broken, steps.settings["b"] = None, 2
    assert steps.run() == ["b", "c"]
    assert (steps.root / "b.txt").read_text() == "x"


def test_a_missing_output_is_made_again_with_all_that_depends_on_it(steps: Steps) -> None:
    steps.run()
    (steps.root / "b.txt").unlink()
    assert steps.run() == ["b", "c"]
    assert steps.run(redo="c") == ["c"]


def test_a_marker_that_cannot_be_read_means_not_done(steps: Steps) -> None:
    steps.run()
    (steps.root / "stages" / "c.json").write_text("{")
    assert steps.run() == ["c"]


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("mine")
    with pytest.raises(UserInputError, match="holds no demo: choose another --output-dir"):
        run_stages(tmp_path, [Stage("a", "a", lambda report: None, None, ("data",))], quiet(["a"]))
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "thesis.txt"]


def test_fingerprint_depends_on_every_setting_and_on_nothing_else() -> None:
    settings = DEMO_PRESETS["demo"]
    assert fingerprint(settings.with_seed(3)) == fingerprint(settings.with_seed(3))
    assert fingerprint(settings.with_seed(3)) != fingerprint(settings.with_seed(4))
    assert settings.with_seed(3).collection.scenes.seed == 3
    assert {t.schedule.seed for t in settings.with_seed(3).denoiser_training.values()} == {3}


# Length


def test_length_is_the_largest_that_ends_in_time() -> None:
    expected = {"collect": 100.0, "stage1": 300.0, "stage2": 100.0, "stage3": 200.0, "report": 100.0}
    assert pace.choose_length(expected, slowness=1.0, limit_s=800.0) == 1.0
    assert pace.choose_length(expected, slowness=1.25, limit_s=800.0) == 1.0, "no more than noise"
    assert pace.choose_length(expected, slowness=1.5, limit_s=800.0) == 0.5  # 300 + 0.5 * 900 = 750
    assert pace.choose_length(expected, slowness=9.0, limit_s=800.0) == min(pace.LENGTHS)


def test_length_shortens_all_trainings_and_nothing_else() -> None:
    settings = DEMO_PRESETS["demo"]
    half = settings.with_length(0.5)
    assert settings.with_length(1.0) is settings
    assert half.scene_autoencoder_steps == round(settings.scene_autoencoder_steps / 2)
    pairs = [(settings.latent_training, half.latent_training)]
    pairs += [(settings.denoiser_training[name], half.denoiser_training[name]) for name in settings.denoiser_training]
    for full, short in pairs:
        assert short.schedule.max_steps == round(full.schedule.max_steps / 2)
    start = settings.scene_autoencoder_preset["loss"]["adversarial_start"]
    assert half.scene_autoencoder_options[-2:] == ("--pipeline.model.loss.adversarial-start", str(start // 2))
    assert half.length == 0.5
    assert half.collection == settings.collection
    assert half.expected_seconds["collect"] == settings.expected_seconds["collect"]
    assert half.expected_seconds["stage1"] == settings.expected_seconds["stage1"] / 2


def test_a_continued_demo_keeps_its_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = DEMO_PRESETS["demo"]
    monkeypatch.setattr(pace, "measure_gflops", lambda: settings.reference_gflops / 10)
    slow = DemoCommand(tmp_path).training_length(settings, "cpu")
    assert slow == min(pace.LENGTHS)
    monkeypatch.setattr(pace, "measure_gflops", lambda: settings.reference_gflops * 10)
    assert DemoCommand(tmp_path).training_length(settings, "cpu") == slow
    assert DemoCommand(tmp_path, length=1.0).training_length(settings, "cpu") == 1.0
    assert DemoCommand(tmp_path).training_length(settings, "cpu") == 1.0
    (tmp_path / pace.LENGTH).write_text("{")
    assert DemoCommand(tmp_path).training_length(settings, "cpu") == 1.0
    with pytest.raises(UserInputError, match="--length is 2, but it is a share"):
        DemoCommand(tmp_path, length=2).training_length(settings, "cpu")


def test_speed_is_measured() -> None:
    assert 0.1 < pace.measure_gflops(0.05) < 1e6


# Progress


def test_remaining_time_follows_the_pace_of_this_machine() -> None:
    table = Timetable(["a", "b"], {"a": 1000.0, "b": 1000.0})
    assert table.remaining() == pytest.approx(2000)
    assert table.remaining("a", 0.5, 1000.0) == pytest.approx(1000 + 1000 * 2, rel=0.1)
    table.finish("a", 2000.0, measured=True)
    assert table.remaining() == pytest.approx(2000, rel=0.05)
    skipped = Timetable(["a", "b"], {"a": 1000.0, "b": 1000.0})
    skipped.finish("a", 1.0, measured=False)
    assert skipped.remaining() == pytest.approx(1000)
    assert clock(125.4) == "2:05"


def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = StageConsole(["a", "b"], ["Making [a]", "Making b"], {"a": 60, "b": 30}, Console(file=out, width=40))
    monkeypatch.setattr("nfldm_ns.demo.console.LINE_EVERY_S", 0.0)
    console.start("a")
    console.progress(0.25, "loss 0.5")
    console.finish(61.0, 1.25)
    console.skip("b", 3.0)
    lines = out.getvalue().splitlines()
    assert lines[0] == "[1/2] Making [a] ... about 1:30 left in all"
    assert lines[1].startswith("[1/2]    25% after 0:00, about")
    assert lines[1].endswith("loss 0.5")
    assert lines[2:] == ["[1/2] Making [a]: done in 1:01, 1.2 GiB at most", "[2/2] Making b: done before"]


# Stages


def test_stage_1_resumes_from_its_last_checkpoint(tmp_path: Path) -> None:
    first = train_command(tmp_path, tmp_path / "data", 650, seed=3)
    assert first[first.index("--max-num-iterations") + 1] == "650"
    assert "--load-dir" not in first
    checkpoints = run_folder(tmp_path) / "nerfstudio_models"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step-000000099.ckpt").touch()
    (checkpoints / "step-000000199.ckpt").touch()
    again = train_command(tmp_path, tmp_path / "data", 650, seed=3)
    assert again[again.index("--max-num-iterations") + 1] == "450"
    assert again[again.index("--load-dir") + 1] == str(checkpoints)


def test_latents_survive_the_way_to_another_process(tmp_path: Path) -> None:
    memory = LatentMemory(
        torch.randn(3, 4, 18),
        torch.randn(3, 4, 4, 2, 4, 4).half(),
        torch.randn(3, 4, 4, 2, 4, 4).half(),
        torch.randn(3, 4, 4, 16, 16).half(),
        num_cameras=2,
        intrinsics=(16.0, 16.0, 15.5, 16.5),
        image_size=(32, 32),
    )
    save_latents(tmp_path / "latents", memory)
    loaded = load_latents(tmp_path / "latents")
    for name, value in vars(memory).items():
        other = getattr(loaded, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


# Numbers


class MeanColor(nn.Module):
    """Stands for the Inception network: two moments of each channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images.mean(dim=(-2, -1)), images.std(dim=(-2, -1))], dim=-1)


class ColorDistance(nn.Module):
    """Stands for LPIPS."""

    def forward(self, a: torch.Tensor, b: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return (a - b).abs().mean(dim=(1, 2, 3))


def test_evenly() -> None:
    assert evenly(range(10), 5) == [0, 2, 4, 6, 8]
    assert evenly(range(3), 5) == [0, 1, 2]


def test_novel_views_agree_with_the_evaluation_of_stage_1(box_room_collection: SceneCollection, tmp_path: Path) -> None:
    autoencoder = small_scene_autoencoder()
    scene_ids = box_room_collection.splits["test"]
    mean, lpips = torch.full((3, 32, 32), 0.4), ColorDistance()
    found = judge_novel_views(
        box_room_collection,
        scene_ids,
        autoencoder,
        small_latent_autoencoder(),
        4,
        mean,
        lpips,
        tmp_path,
        lambda share: None,
    )
    batches = [box_room_collection.batch([box_room_collection.load_scene(i)]) for i in scene_ids]
    expected = evaluate_novel_views(lambda batch: reconstruct(autoencoder, batch), batches, mean, lpips)
    assert found["num_images"] == 8
    for name in ("psnr", "ssim", "lpips"):
        assert found["stage1"][name] == pytest.approx(expected[name], abs=1e-4)
        assert found["nearest_view"][name] == pytest.approx(expected[f"nearest_view_{name}"], abs=1e-5)
        assert found["mean_image"][name] == pytest.approx(expected[f"mean_image_{name}"], abs=1e-5)
    assert found["stage1"]["depth_mae_in_box_m"] == pytest.approx(expected["depth_mae_in_box_m"], abs=1e-4)
    assert found["without_fine"]["psnr"] != found["stage2"]["psnr"]
    assert {path.name: len(list(path.glob("*.png"))) for path in tmp_path.iterdir()} == {
        "test": 8,
        "stage1": 8,
        "stage2": 8,
    }


def test_image_sets_are_compared_at_one_size(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, count, brightness in (("test", 8, 100), ("train", 8, 100), ("stage1", 9, 110), ("stage2", 9, 150)):
        (tmp_path / name).mkdir()
        generator.manual_seed(count)
        for i in range(count):
            image = torch.randint(brightness, brightness + 50, (8, 8, 3), generator=generator).byte().numpy()
            write_image(tmp_path / name / f"{i}.png", image)
    (tmp_path / "samples").mkdir()
    for path in (tmp_path / "stage1").glob("*.png"):
        (tmp_path / "samples" / path.name).write_bytes(path.read_bytes())
    result = compare_image_sets(tmp_path, torch.full((3, 8, 8), 0.9), 20, MeanColor(), lambda share: None)
    assert result["num_images"] == 8
    assert result["fid"]["train"] == pytest.approx(0, abs=1e-9)
    assert result["fid"]["samples"] == result["fid"]["stage1"]
    assert 0 < result["fid"]["stage1"] < result["fid"]["stage2"] < result["fid"]["mean_image"]
    assert result["kid"]["stage1"] < result["kid"]["stage2"]


# All of it


REPORT_KEYS = {
    "stage1": {
        *("psnr", "ssim", "lpips", "depth_mae_m", "nearest_view", "mean_image", "seconds", "peak_rss_gib"),
        "depth_mae_all_m",
    },
    "stage2": {"psnr", "ssim", "lpips", "psnr_without_fine", "seconds"},
    "stage3": {"seconds"},
    "samples": {"fid", "kid", "num_images", "stage1_fid", "stage2_fid", "mean_image_fid", "train_vs_test_fid"},
}


class References(html.parser.HTMLParser):
    """What a page loads and shows."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]


def start(folder: Path) -> subprocess.Popen:
    command = [COMMAND, "--preset", "smoke", "--output-dir", "demo"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_demo_is_interrupted_continues_and_ends_with_a_page(tmp_path: Path) -> None:
    require_weights("lpips-vgg", "fid-inception")
    root = tmp_path / "demo"
    first = start(tmp_path)
    wait_for(root / "logs" / "stage1.log", first)
    children = psutil.Process(first.pid).children(recursive=True)
    assert any("nerfstudio.scripts.train" in child.cmdline() for child in children)
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 130
    assert "Interrupted" in output
    assert not psutil.wait_procs(children, timeout=30)[1]
    assert read_marker(root, "collect").finished
    assert not read_marker(root, "stage1").finished
    scenes = {path: path.stat().st_mtime_ns for path in root.glob("data/scenes/*/transforms.json")}

    second = start(tmp_path)
    output, _ = second.communicate(timeout=900)
    assert second.returncode == 0, output
    assert "[1/9] Collecting scenes from VizDoom: done before" in output
    assert "(continued)" in output
    assert scenes == {path: path.stat().st_mtime_ns for path in root.glob("data/scenes/*/transforms.json")}
    check_report(root)
    check_page(root)
    check_generated_scenes(root)

    page = (root / "index.html").stat().st_mtime_ns
    third = start(tmp_path)
    output, _ = third.communicate(timeout=120)
    assert third.returncode == 0
    assert output.count("done before") == 9
    assert (root / "index.html").stat().st_mtime_ns == page


def check_report(root: Path) -> None:
    report = json.loads((root / "report.json").read_text())
    for part, keys in REPORT_KEYS.items():
        assert keys <= set(report[part])
    assert {"total_seconds", "seed", "versions", "device"} <= set(report)
    assert report["length"] == 1.0
    assert {"psnr", "lpips"} <= set(report["stage1"]["nearest_view"]) & set(report["stage1"]["mean_image"])
    assert report["seed"] == 0
    assert report["data"]["scenes"] == {"train": 8, "val": 0, "test": 2}
    assert report["samples"]["num_images"] == 4
    assert report["total_seconds"] == pytest.approx(sum(s["seconds"] for s in report["stages"].values()), abs=0.1)
    assert all(0 < stage["peak_rss_gib"] < 8 for stage in report["stages"].values())


def check_page(root: Path) -> None:
    page = References()
    page.feed((root / "index.html").read_text())
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    smoke = DEMO_PRESETS["smoke"]
    assert page.counts["video"] == smoke.num_scenes + smoke.num_shipped_scenes + 2
    assert page.counts["table"] == 3
    assert page.counts["img"] >= 6


def check_generated_scenes(root: Path) -> None:
    folders, shipped = (sorted((root / name).iterdir()) for name in ("generated", "shipped"))
    assert [folder.name for folder in folders] == ["scene_000000", "scene_000001"]
    assert [folder.name for folder in shipped] == ["scene_000000"]
    for folder in (*folders, *shipped):
        assert (folder / "config.yml").is_file()
        scene = load_generated_scene(folder)
        assert scene.grid.density.isfinite().all()


def test_bad_options_are_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for options in (["--output-dir", str(tmp_path)], ["--num-scenes", "0", "--output-dir", str(tmp_path / "new")]):
        with pytest.raises(SystemExit) as exit_info:
            main(options)
        assert exit_info.value.code == 2
        error = capfd.readouterr().err.strip()
        assert error.startswith("error: ")
        assert "\n" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
