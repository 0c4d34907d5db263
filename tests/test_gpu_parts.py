"""make gpu-check: its parts at the smallest sizes on the device that is there, and what runs them."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_check
import psutil
import pytest
import torch
from bench import render_gpu, sample_gpu
from gpu import marked_tests, nccl, precision, refining, rendering, running, sampling, trainings
from gpu.findings import Bar, Findings, sentence
from gpu.parts import PARTS, Part, do_work
from gpu.sizes import Sizes

from nfldm_ns.diffusion.training import DiffusionTrainingConfig
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.training import LatentLossConfig, LatentTrainingConfig
from nfldm_ns.method_configs.latent_presets import DIFFUSION_PRESETS, LATENT_PRESETS, DiffusionPreset, LatentPreset
from nfldm_ns.method_configs.presets import SCENE_AUTOENCODER, SceneAutoencoderPreset
from nfldm_ns.training.schedule import Schedule
from tests.small_models import DENOISER_SIZES, LATENT_SIZES, small_pipeline
from tests.test_benchmarks import SMALL_NETWORK

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = Sizes(
    preset="smallest",
    room=None,
    pictures=(16, 32),
    repeats=2,
    budget_s=0.2,
    num_inference_steps=2,
    matrix=64,
    warm_steps=1,
    backend="eager",
)


@pytest.fixture(autouse=True)
def smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset of all stages."""
    schedule = Schedule(batch_size=2, warmup_steps=1)
    loss = {"lpips_views": 1, "adversarial_mult": 0.05, "depth_mult": 0.1}
    sampling = {"scenes_per_batch": 1, "num_target_views": 1}
    stage1 = SceneAutoencoderPreset(SMALL_NETWORK, loss, sampling, image_size=32, num_source_views=2)
    training = LatentTrainingConfig(schedule=schedule, losses=LatentLossConfig(lpips_mult=1.0), num_views=1)
    diffusion = {stage: DiffusionTrainingConfig(schedule=schedule) for stage in ("global", "coarse", "fine")}
    monkeypatch.setitem(SCENE_AUTOENCODER, "smallest", stage1)
    monkeypatch.setitem(LATENT_PRESETS, "smallest", LatentPreset(LATENT_SIZES, training))
    monkeypatch.setitem(DIFFUSION_PRESETS, "smallest", DiffusionPreset(DENOISER_SIZES, diffusion))


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    return Findings(tmp_path / "part.json")


# Parts


def test_rendering_compares_three_ways(findings: Findings) -> None:
    rendering.render(findings, DEVICE, SIZES)
    assert not findings.failures
    assert set(findings.numbers) == {"nerfacc", "16", "32"}
    found = findings.numbers["32"]
    assert all(found[way] > 0 for way in ("skipping", "dense", "plain", "viewer", "peak_gib"))
    assert found["ratio"] == pytest.approx(found["skipping"] / found["plain"])
    assert found["error"] <= rendering.TOLERANCE
    assert [bar.bar for bar in findings.bars] == [60.0, 5.0]


def test_the_plain_way_sees_what_the_dense_one_sees() -> None:
    grid, view = rendering.paper_scene("cpu", SIZES), rendering.camera(32)
    plain = rendering.plain(rendering.density_and_features(grid), grid, view, 16, 12, 100)
    dense = rendering.ours(grid, view, 16, False, 12)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(plain, dense, strict=True))


def test_other_renderings_fail(findings: Findings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "map_error", lambda *_: 0.5)
    rendering.render(findings, DEVICE, replace(SIZES, pictures=(16,)))
    assert findings.failures == {
        "16 pixels, agreement": "Skipping feature maps differ from dense ones by 5.0e-01, more than the 1.0e-02 that "
        "are allowed."
    }


def test_a_step_of_every_network_is_measured(findings: Findings) -> None:
    trainings.train(findings, DEVICE, SIZES)
    assert not findings.failures
    networks = {"stage 1", "stage 2", "global", "coarse", "fine"}
    assert set(findings.numbers) == {*networks, "tflops_per_second"}
    for name in networks:
        found = findings.numbers[name]
        assert found["steps_per_second"] == pytest.approx(1 / found["seconds"])
        rate = findings.numbers["tflops_per_second"]
        assert found["tflops"] > 0
        assert found["of_peak"] == pytest.approx(found["tflops"] / found["seconds"] / rate)


def test_steps_change_the_weights_and_gradients_do_not() -> None:
    training = trainings.diffusion_training("coarse", SIZES, "fp32")
    before = [p.clone() for p in training.model.parameters()]
    loss, gradient = training.loss(0)
    again, same = training.loss(0)
    assert loss == again and torch.equal(gradient, same)
    assert all(torch.equal(a, b) for a, b in zip(before, training.model.parameters(), strict=True))
    (losses,) = training.step()
    assert float(losses["loss"]) == pytest.approx(loss)
    assert any(not torch.equal(a, b) for a, b in zip(before, training.model.parameters(), strict=True))


def test_bf16_is_near_single_precision(findings: Findings) -> None:
    precision.compare_bf16(findings, DEVICE, SIZES)
    assert not findings.failures
    assert set(findings.numbers) == {"stage 1", "stage 2", "coarse", "fine"}
    assert all(0 < found["error"] <= precision.LOSS_TOLERANCE for found in findings.numbers.values())


def test_compiled_losses_are_near_others(findings: Findings, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = precision._networks(SIZES)
    assert set(networks) == {"stage 2", "coarse", "fine"}
    monkeypatch.setattr(precision, "_networks", lambda sizes: {"coarse": networks["coarse"]})
    precision.compare_compiled(findings, DEVICE, SIZES)
    assert not findings.failures
    assert findings.numbers["coarse"]["gain_over_bf16"] > 0
    assert 0 < findings.numbers["coarse"]["error"] <= precision.LOSS_TOLERANCE


def test_other_losses_and_gradients_fail(findings: Findings) -> None:
    ways = {
        "fp32": lambda: (1.0, torch.tensor([1.0, 0.0])),
        "bf16": lambda: (1.1, torch.tensor([1.0, 1.0])),
    }
    precision._compare(findings, "stage 2", ways, DEVICE, SIZES, 0.02, 0.95)
    assert findings.failures == {
        "stage 2": "The loss is 1.1 (bf16) instead of 1 (fp32): 10.0% apart, 2.0% are allowed.",
        "stage 2, gradient": "The gradients have a cosine of 0.7071 (bf16 to fp32), less than 0.95.",
    }
    ways["bf16"] = lambda: (float("nan"), torch.tensor([float("nan"), 1.0]))
    findings.failures.clear()
    precision._compare(findings, "stage 2", ways, DEVICE, SIZES, 0.02, 0.95)
    assert set(findings.failures) == {"stage 2", "stage 2, gradient"}, "what is not finite"


def test_rooms_are_sampled(findings: Findings) -> None:
    sampling.sample(findings, DEVICE, SIZES)
    assert not findings.failures
    (bar,) = findings.bars
    assert bar.value == min(findings.numbers[name]["seconds"] for name in ("fp32", "bf16"))
    assert bar.at_most and bar.bar == 2.0


def test_one_process_talks_to_itself(findings: Findings) -> None:
    nccl.communicate(findings, DEVICE, SIZES)
    assert not findings.failures
    assert findings.numbers["backend"] == ("nccl" if DEVICE == "cuda" else "gloo")
    assert not torch.distributed.is_initialized()


def test_refining_is_measured_with_few_steps(findings: Findings, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(options) -> dict[str, object]:
        assert options.steps == SIZES.refining_steps and options.precision == "bf16"
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore words.")

    monkeypatch.setattr(refining.refining_memory, "measure", measure)
    refining.refine(findings, DEVICE, SIZES)
    said = findings.failures["refining"]
    assert said.startswith("needs more memory than the GPU has free") and "20.00 GiB" in said and "\n" not in said


def test_tests_that_fail_or_are_skipped_are_named(findings: Findings, monkeypatch: pytest.MonkeyPatch) -> None:
    path = findings.folder / "test_some.py"
    path.write_text(
        "import pytest\npytestmark = pytest.mark.slow\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "def test_absent(): pytest.skip('there is none')\n"
    )
    marked_tests.judge_tests(findings, [path], "slow")
    assert findings.numbers["passed"] == 1
    ((name, said),) = findings.failures.items()
    assert name.endswith("::test_bad") and said.startswith("AssertionError: one is not two")
    assert list(findings.numbers["skipped"].values()) == ["there is none"]
    findings.failures.clear()
    monkeypatch.setattr(marked_tests.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=4))
    marked_tests.judge_tests(findings, [path], "slow")
    assert "pytest ran no test and ended with exit code 4" in findings.failures["tests"]


def test_files_with_gpu_tests_are_found() -> None:
    names = {path.name for path in marked_tests.marked_files(Path(__file__).parent)}
    assert {"test_gpu_check.py", "test_skipping.py", "test_pipeline.py"} <= names
    assert "test_metrics.py" not in names


# make bench


def test_bench_measures_by_the_same_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nfldm_ns.diffusion.pipeline.load_pipeline", lambda name: small_pipeline())
    monkeypatch.setattr(render_gpu, "REPEATS", 1)
    rendered = render_gpu.measure(DEVICE, SIZES)
    assert rendered["side"] == 32 and rendered["error"] <= rendering.TOLERANCE
    assert all(rendered[key] > 0 for key in ("views_per_second", "ratio", "ratio_dense", "room_views_per_second"))
    sampled = sample_gpu.measure(DEVICE, SIZES, batch=2, repeats=1)
    assert sampled["steps"] == 2 and sampled["batch"] == 2
    assert all(sampled[key] > 0 for key in ("seconds", "paper_seconds", "paper_seconds_bf16"))


# What runs them

TOYS = """
import os

def mixed(findings, device, sizes):
    from gpu.findings import Bar
    findings.numbers["preset"] = [device, sizes.preset]
    findings.bars.append(Bar("speed", 3.0, 5.0))
    with findings.attempt("first"):
        raise ValueError("no such thing")
    with findings.attempt("second"):
        findings.numbers["second"] = 2

def broken(findings, device, sizes):
    print("last words", flush=True)
    with findings.attempt("dying"):
        os.kill(os.getpid(), 9)
"""


def toy(name: str, needs_s: float = 0.0, limit_s: float = 250.0, **changes: Any) -> Part:
    return Part(name, f"a {name} part", f"toys:{name}", needs_s, limit_s, changes)


def test_parts_fail_break_off_and_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "toys.py").write_text(TOYS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    parts = [toy("mixed", preset="base"), toy("broken"), toy("late", 1e6)]
    found = running.run_parts(parts, "cpu", tmp_path, 1000.0, {"commit": "abc"})
    assert json.loads((tmp_path / "gpu_check.json").read_text()) == found
    assert found["commit"] == "abc" and not found["passed"]
    states = {name: result["state"] for name, result in found["parts"].items()}
    assert states == {"mixed": "failed", "broken": "failed", "late": "left out"}
    assert found["parts"]["mixed"]["numbers"] == {"preset": ["cpu", "base"], "second": 2}
    assert set(found["failed"]) == {"mixed, first", "broken, ended"}
    assert found["failed"]["mixed, first"] == "ValueError: no such thing"
    said = found["failed"]["broken, ended"]
    assert said.startswith("It broke off in 'dying', killed by SIGKILL (last words): see ")
    assert found["left_out"]["late"].startswith("It needs 1000000 s, and ")
    assert found["bars"] == [{"name": "speed", "value": 3.0, "at_least": 5.0, "met": False}]
    printed = capsys.readouterr().out
    assert "speed: 3, at least 5 is the aim: not met" in printed and "FAILED first: ValueError" in printed


def test_parts_end_with_their_limit_with_the_time_or_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int | None] = []

    def run(arguments: list[str], log: Path, limit_s: float) -> int | None:
        findings = Findings(Path(arguments[-2]), {"before": 1}, attempting="waiting")
        findings.write()
        log.write_text("words\nRuntimeError: not caught\n")
        return codes[0]

    monkeypatch.setattr(running, "_run", run)
    codes.append(None)
    limited = running.run_part(toy("slow", limit_s=15.0), "cpu", tmp_path, 1000.0)
    assert limited["state"] == "failed" and limited["numbers"] == {"before": 1}
    assert limited["failures"]["ended"].startswith("It was ended after its 15 s in 'waiting': see ")
    late = running.run_part(toy("slow"), "cpu", tmp_path, 15.0)
    assert late["state"] == "left out" and not late["failures"]
    assert late["said"] == "The time of the check was over in 'waiting': run it alone, with --only."
    codes[0] = 1
    broken = running.run_part(toy("slow"), "cpu", tmp_path, 1000.0)
    said = "It broke off in 'waiting', with exit code 1 (RuntimeError: not caught): see "
    assert broken["failures"]["ended"].startswith(said)


def ended(pid: int) -> bool:
    """Whether a process is gone within ten seconds, but for its entry in the system's table."""
    for _ in range(100):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


def test_a_part_that_does_not_end_is_ended_with_all_it_started(tmp_path: Path) -> None:
    child = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    log = tmp_path / "log"
    begun = time.monotonic()
    assert running._run(["-S", "-c", child], log, 10.0) is None
    assert time.monotonic() - begun < 60
    assert ended(int(log.read_text()))
    assert running._run(["-S", "-c", "raise SystemExit(3)"], log, 60.0) == 3


def test_all_parts_have_work_and_fit_the_time() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert sum(part.needs_s for part in PARTS) < 8 * 60
    for part in PARTS:
        module, function = part.work.split(":")
        assert callable(getattr(sys.modules.get(module) or __import__(module, fromlist=["x"]), function))
        assert replace(Sizes(), **part.changes).preset in DIFFUSION_PRESETS


def test_work_gets_its_sizes(findings: Findings, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    monkeypatch.setattr(nccl, "communicate", lambda *args: given.extend(args))
    do_work("gpu.nccl:communicate", findings, "cpu", {"preset": "base"})
    assert given[1:] == ["cpu", replace(Sizes(), preset="base")] and findings.done


def test_without_a_gpu_it_says_so_and_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu_check.main(gpu_check.Options(tmp_path))
    said = capsys.readouterr().out.strip()
    assert said.startswith("skipped: there is no CUDA device") and "\n" not in said
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserInputError, match="no part speed: choose one of tests, rendering"):
        gpu_check.main(gpu_check.Options(tmp_path, only=("speed",)))


def test_failures_are_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "device_info", lambda: {"gpu": "a card"})
    asked: list[str] = []

    def run_parts(parts, device, folder, budget_s, head):
        asked.extend(part.name for part in parts)
        assert budget_s == 120 and head["device"] == {"gpu": "a card"}
        return {"passed": False, "failed": {"nccl, start": "no"}, "left_out": {}}

    monkeypatch.setattr(gpu_check, "run_parts", run_parts)
    with pytest.raises(SystemExit) as exit_info:
        gpu_check.main(gpu_check.Options(tmp_path, only=("nccl", "rendering"), minutes=2))
    assert exit_info.value.code == 1 and asked == ["rendering", "nccl"]


def test_errors_are_one_sentence() -> None:
    assert sentence(UserInputError("This: do that.")) == "This: do that."
    assert sentence(ValueError("one\ntwo")) == "ValueError: one"
    assert sentence(KeyError()) == "KeyError"
    assert not Bar("seconds", 3.0, 2.0, at_most=True).met and Bar("seconds", 1.0, 2.0, at_most=True).met
