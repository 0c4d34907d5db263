"""Commands start quickly: they import what they need, and no more."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder
from nfldm_ns.light_imports import _disable_later, _LaterModule, _standing_in, import_lightly, lazy_names
from nfldm_ns.plugin import scene_config
from nfldm_ns.plugin.scene_config import dumped_config, scene_config_yml, scene_run_config

HEAVY = (
    "matplotlib",
    "nerfstudio.engine.trainer",
    "nerfstudio.models.splatfacto",
    "scipy.stats",
    "tensorboard",
    "torch._dynamo",
    "torch._inductor",
    "torchmetrics",
    "torchvision",
    "transformers.modeling_utils",
)
COMMANDS = sorted(
    f"nfldm_ns.commands.{path.stem}"
    for path in (Path(__file__).parent.parent / "nfldm_ns" / "commands").glob("*.py")
    if path.stem not in ("__init__", "resumable")
)
SAMPLING = """
from nfldm_ns.commands.sample import main
main(["--num-scenes", "1", "--num-inference-steps", "1", "--device", "cpu", "--output-dir", {folder!r}])
"""


def imported(code: str) -> set[str]:
    """The modules that are there after some code ran in a new process."""
    code += "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.skipif(find_spec("peft") is not None, reason="diffusers imports peft, which imports much")
def test_sampling_imports_what_it_needs(tmp_path):
    modules = imported(SAMPLING.format(folder=str(tmp_path)))
    assert {"torch", "diffusers", "nfldm_ns.plugin.generated_run"} <= modules
    assert sorted(modules & set(HEAVY)) == []
    assert (tmp_path / "scene_000000" / "config.yml").is_file()


def test_an_installed_peft_is_imported_as_diffusers_does(tmp_path):
    """It makes classes of those of transformers, which is more than to know their objects."""
    tuners = tmp_path / "peft" / "tuners"
    tuners.mkdir(parents=True)
    derived = "import torch, transformers\nclass Tuned(transformers.PreTrainedModel): pass\n"
    (tmp_path / "peft" / "__init__.py").write_text(f"{derived}assert issubclass(Tuned, torch.nn.Module)\n")
    (tuners / "__init__.py").write_text("")
    (tuners / "tuners_utils.py").write_text("class BaseTunerLayer: pass\n")
    (tmp_path / "peft-0.99.0.dist-info").mkdir()
    (tmp_path / "peft-0.99.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.99.0\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport nfldm_ns\nfrom diffusers.loaders import lora_base"
    )
    assert "peft.tuners.tuners_utils" in imported(code)


def test_saving_a_model_does_not_ask_for_sharded_tensors(tmp_path):
    code = """
import sys, torch
from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder
from huggingface_hub import get_torch_storage_id, get_torch_storage_size
load_scene_autoencoder("vizdoom-stage1").save_pretrained({folder!r})
assert not {{"sympy", "torch.distributed.tensor"}} & set(sys.modules), "neither is there, nor forbidden, afterwards"
weight = torch.zeros(4)
light = get_torch_storage_id(weight), get_torch_storage_size(weight[1:])
import torch.distributed.tensor
assert light == (get_torch_storage_id(weight), get_torch_storage_size(weight[1:]))
"""
    assert "torch.distributed.tensor" in imported(code.format(folder=str(tmp_path)))
    saved = load_scene_autoencoder(tmp_path).state_dict()
    shipped = load_scene_autoencoder("vizdoom-stage1").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in shipped.items())


@pytest.mark.parametrize(("given", "policy"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_idle_threads_sleep_unless_told_otherwise(given, policy):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    code = "import sys, nfldm_ns, os; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == policy


def test_help_imports_next_to_nothing():
    modules = imported("; ".join(f"import {name}" for name in COMMANDS))
    assert set(COMMANDS) <= modules
    assert sorted(modules & {*HEAVY, "diffusers", "nerfstudio", "torch", "transformers"}) == []


# Packages that import their modules later


def test_names_of_packages_that_only_import():
    source = """
from ...utils import is_torch_available

if is_torch_available():
    from .one import A, B as C
    from .two import f
"""
    assert lazy_names(source) == {"A": ("one", "A"), "C": ("one", "B"), "f": ("two", "f")}
    assert lazy_names("from .one import *") is None
    assert lazy_names("from .one import A\nA.register()") is None
    assert lazy_names("if sys.platform:\n    from .one import A") is None


def test_lazy_packages_have_all_of_their_names():
    import_lightly()
    package = importlib.import_module("diffusers.models.unets")
    unet = package.UNet2DModel
    assert unet is importlib.import_module("diffusers.models.unets.unet_2d").UNet2DModel
    with pytest.raises((AttributeError, ImportError)):
        package.no_such_model  # noqa: B018


def test_a_stand_in_gives_way_to_the_module(tmp_path, monkeypatch):
    (tmp_path / "slow_module.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    with _standing_in(_LaterModule("slow_module")):
        import slow_module  # type: ignore[import-not-found]

        assert isinstance(slow_module, _LaterModule)
    assert "slow_module" not in sys.modules
    assert slow_module.value == 3
    assert type(sys.modules.pop("slow_module")) is ModuleType


def test_functions_without_a_compiler_run_and_are_disabled_with_one():
    @_disable_later()
    def double(x):
        """Doubles."""
        return 2 * x, torch.compiler.is_compiling()

    assert double(4) == (8, False)
    assert double.__doc__ == "Doubles."
    importlib.import_module("torch._dynamo")
    compiled = torch.compile(lambda x: double(x + 1), backend="eager")
    value, compiling = compiled(torch.ones(2))
    assert value.equal(torch.full((2,), 4.0)) and not compiling


# config.yml


@pytest.fixture
def enumerations_by_value(tmp_path, monkeypatch):
    """As later releases of Python 3.11 write them, and `scene_config.yml` has them; Debian's 3.11.2 names members."""
    events = type(scene_run_config(tmp_path).logging.local_writer.stats_to_track[0])
    monkeypatch.setattr(events, "__reduce_ex__", lambda self, protocol: (type(self), (self.value,)))


@pytest.mark.usefixtures("enumerations_by_value")
@pytest.mark.parametrize("name", ["scene_000000", "007", "a b: 'c' #d", "räume", "x " * 60 + "y"])
def test_config_is_the_one_that_nerfstudio_writes(tmp_path, name):
    folder = tmp_path / name
    assert scene_config_yml(folder) == dumped_config(folder)
    assert yaml.load(scene_config_yml(folder), Loader=yaml.Loader).folder == folder


def test_configs_with_either_spelling_of_enumerations_are_equal(tmp_path):
    ours, theirs = (yaml.load(text(tmp_path), Loader=yaml.Loader) for text in (scene_config_yml, dumped_config))
    assert ours == theirs


def test_both_spellings_of_enumerations_are_read(tmp_path):
    by_value, event = scene_config_yml(tmp_path), scene_run_config(tmp_path).logging.local_writer.stats_to_track[0]
    written = yaml.dump(event.value).split("\n")[0]
    assert event.name == "ITER_TRAIN_TIME" and f"nerfstudio.utils.writer.EventName\n      - {written}\n" in by_value
    by_name = (
        "!!python/object/apply:builtins.getattr [!!python/name:nerfstudio.utils.writer.EventName '', ITER_TRAIN_TIME]"
    )
    steps = yaml.load(by_value, Loader=yaml.Loader).logging.local_writer.stats_to_track
    assert steps[0] is yaml.load(by_name, Loader=yaml.Loader) is event


def test_other_versions_write_their_own_config(tmp_path, monkeypatch):
    scene_config._template.cache_clear()
    monkeypatch.setattr(scene_config.importlib.metadata, "version", lambda _: "1.1.99")
    try:
        assert scene_config._template() is None
        assert scene_config_yml(tmp_path / "scene") == dumped_config(tmp_path / "scene")
    finally:
        scene_config._template.cache_clear()
