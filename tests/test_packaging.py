"""What pyproject.toml promises is what the code holds."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {name.replace(".", "/"): folder for name, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}
ENTRY_POINTS = {
    **PROJECT["project"]["scripts"],
    **{
        f"{group}: {name}": value
        for group, e in PROJECT["project"]["entry-points"].items()
        for name, value in e.items()
    },
}


def source_of(module: str) -> Path:
    """The file of one of our modules in the checkout."""
    path = module.replace(".", "/")
    for package, folder in sorted(FOLDERS.items(), key=lambda item: -len(item[0])):
        if path == package or path.startswith(f"{package}/"):
            path = folder + path[len(package) :]
            break
    file = ROOT / f"{path}.py"
    return file if file.exists() else ROOT / path / "__init__.py"


def test_every_package_is_shipped() -> None:
    found = {str(file.parent.relative_to(ROOT)) for file in ROOT.glob("nfldm_ns/**/__init__.py")}
    found |= {"method_configs", "dataparsers"}
    shipped = {
        str(source_of(package).parent.relative_to(ROOT)) for package in PROJECT["tool"]["setuptools"]["packages"]
    }
    assert shipped == found


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_entry_points_name_what_exists(name: str) -> None:
    module, _, attribute = ENTRY_POINTS[name].partition(":")
    tree = ast.parse(source_of(module).read_text())
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    assert attribute in names


def test_constraints_pin_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") and not pin.url for pin in pins)
    pinned = {canonicalize_name(pin.name): pin for pin in pins if pin.marker is None or pin.marker.evaluate()}
    extras = PROJECT["project"]["optional-dependencies"]
    for requirement in map(Requirement, [*PROJECT["project"]["dependencies"], *extras["dev"]]):
        pin = pinned[canonicalize_name(requirement.name)]
        version = str(pin.specifier).removeprefix("==")
        assert requirement.specifier.contains(version), f"{pin} is outside {requirement}"


def imports(file: Path) -> set[str]:
    """Modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


LAYERS = [
    *("models", "scenes", "reports", "collect", "pretrained", "metrics", "training"),
    *("autoencoder", "latents", "diffusion", "generated", "baselines", "exports", "refine", "plugin"),
    *("sampling", "editing", "reconstruction", "evaluation", "demo", "studio"),
]
FORBIDDEN: dict[str, list[str]] = {
    "dataparsers": ["nfldm_ns.method_configs", "nfldm_ns.commands"],
    "method_configs": ["nfldm_ns.commands"],
    **{
        f"nfldm_ns/{layer}": [
            "nfldm_ns.commands",
            "nfldm_ns.method_configs",
            "nfldm_ns.dataparsers",
            *(f"nfldm_ns.{later}" for later in LAYERS[i + 1 :]),
        ]
        for i, layer in enumerate(LAYERS)
    },
}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_point_one_way(folder: str) -> None:
    forbidden = tuple(FORBIDDEN[folder])
    wrong = {
        f"{file.relative_to(ROOT)} imports {module}"
        for file in (ROOT / folder).rglob("*.py")
        for module in imports(file)
        if module in forbidden or module.startswith(tuple(f"{name}." for name in forbidden))
    }
    assert not wrong


def test_nothing_of_ours_imports_modules_by_their_folder() -> None:
    """`method_configs` and `dataparsers` exist only inside our namespace once installed."""
    files = [
        file
        for folder in ("nfldm_ns", "method_configs", "dataparsers", "tests")
        for file in ROOT.glob(f"{folder}/**/*.py")
    ]
    wrong = {
        f"{file.relative_to(ROOT)} imports {module}"
        for file in files
        for module in imports(file)
        if module.split(".")[0] in ("method_configs", "dataparsers")
    }
    assert not wrong


def test_commands_do_not_import_all_methods() -> None:
    """Importing nerfstudio's method configs takes many seconds."""
    slow = "nerfstudio.configs.method_configs"
    assert not [file for file in ROOT.glob("nfldm_ns/commands/*.py") if slow in imports(file)]


def test_no_file_holds_a_path_of_somebodys_machine() -> None:
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout")
    wrong = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if (
            path.suffix not in {".py", ".md", ".toml", ".txt", ".json", ".css", ".html", ".yml", ""}
            or not path.is_file()
        ):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        wrong += [
            f"{name}: {start}"
            for start in ("/" + "home/", "/" + "root/", "/" + "work/", "/" + "Users/")
            if start in text
        ]
    assert not wrong
