"""`make bench`: finds what can be measured, keeps results, and says what went wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bench.__main__ as runner
import pytest
import sampler_steps
import torch
from bench import render_gpu, sample_gpu, startup, two_processes

from nfldm_ns.errors import UserInputError
from tests.small_models import small_pipeline


@pytest.fixture
def measurements(tmp_path, monkeypatch):
    """A package `bench` with one module that measures, one that cannot, and one that fails."""
    folder = tmp_path / "bench"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "__main__.py").write_text(Path(runner.__file__).read_text())
    (folder / "quick.py").write_text("KEY = 'quick'\ndef measure():\n    print('words')\n    return {'seconds': 0.5}\n")
    (folder / "missing.py").write_text("KEY = 'gpu'\ndef measure():\n    return {'absent': 'no device'}\n")
    (folder / "broken.py").write_text("KEY = 'broken'\ndef measure():\n    raise ValueError('too bad')\n")
    monkeypatch.setattr(runner, "MODULES", folder)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("bench.") and name != "bench.__main__"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys.modules["bench"], "__path__", [str(folder)])
    yield folder
    for name in ("quick", "missing", "broken"):
        sys.modules.pop(f"bench.{name}", None)


def test_results_are_measured_kept_and_described(measurements, tmp_path, capsys):
    output = tmp_path / "out" / "results.json"
    assert runner.main(runner.Options(only=("quick", "gpu"), output=output)) == 0
    results = json.loads(output.read_text())
    assert results["quick"]["seconds"] == 0.5 and results["gpu"]["absent"] == "no device"
    assert results["quick"]["peak_memory_gib"] > 0 and results["quick"]["device"]["processor"]
    assert {"commit", "versions", "took_seconds"} <= results["quick"].keys()
    assert runner.main(runner.Options(only=("broken",), output=output)) == 1
    results = json.loads(output.read_text())
    assert results["broken"]["error"] == "ValueError: too bad" and results["quick"]["seconds"] == 0.5
    printed = capsys.readouterr().out
    assert "quick: seconds 0.5" in printed and "gpu: absent: no device" in printed
    assert "broken: error: ValueError: too bad" in printed


def test_unknown_and_equal_keys_are_said(measurements, tmp_path):
    with pytest.raises(UserInputError, match="no measurement faster: choose from broken, gpu, quick"):
        runner.main(runner.Options(only=("faster",), output=tmp_path / "results.json"))
    assert not (tmp_path / "results.json").exists()
    (measurements / "same.py").write_text("KEY = 'gpu'\n")
    with pytest.raises(UserInputError, match="have the same KEY, gpu"):
        runner.modules()


def test_every_module_has_a_key():
    keys = runner.modules()
    assert {"startup", "sample", "train_step", "two_processes", "sample_gpu", "render_gpu"} <= keys.keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_measurements_are_absent():
    assert "no CUDA device" in render_gpu.measure()["absent"]
    assert "no CUDA device" in sample_gpu.measure()["absent"]


def test_the_clock_around_the_denoisers(monkeypatch):
    found = [{"seconds": 3.0, "imports": 1.0, "denoisers": 9.0}, {"seconds": 5.0, "imports": 1.0, "denoisers": 9.0}]
    found.append({"seconds": 4.0, "imports": 2.0, "denoisers": 9.0})
    runs = iter(found)
    monkeypatch.setattr(startup, "_run", lambda *_: next(runs))
    assert startup.measure() == {"seconds": 4.0, "imports": 1.0, "denoisers": 9.0}


def test_processes_take_turns(monkeypatch):
    order: list[tuple[int, bool]] = []

    def encode(folder: Path, names: list[str], launcher: tuple[str, ...] = ("-m",)) -> list[float]:
        order.append((len(names), launcher != ("-m",)))
        return [3.5, 4.5] if len(names) == 2 else [2.5 if launcher != ("-m",) else 3.0]

    monkeypatch.setattr(two_processes, "_make_places", lambda *_: None)
    monkeypatch.setattr(two_processes, "_encode", encode)
    measured = two_processes.measure(repeats=2)
    assert (measured["speedup"], measured["machine"], measured["of_limit"]) == (1.2, 1.5, 0.8)
    assert order == [(1, False), (1, True), (2, False)] * 2


def test_samplers_take_turns_against_the_clock():
    pipeline = small_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    trained = pipeline.scheduler
    samplers = [sampler_steps.Sampler.parse(text) for text in ("ddim:4", "dpm++:2")]
    seconds = sampler_steps.seconds_of_rooms(pipeline, samplers, repeats=1)
    assert list(seconds) == ["ddim:4", "dpm++:2"] and all(value > 0 for value in seconds.values())
    assert pipeline.scheduler is trained
    found = {"ddim:4": {"fid": 90.0, "kid": 0.05}, "dpm++:2": {"fid": 91.0, "kid": 0.06, "kid_difference": 0.2}}
    values = {name: {**scores, "seconds": seconds[name]} for name, scores in found.items()}
    text = sampler_steps.table({"samplers": values}, "Few.").markdown()
    assert "| dpm++:2 |" in text and "20.0" in text and "s per room" in text
