"""Sets of pictures on disk, their Inception features, and the distances between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nfldm_ns.metrics.images import extract_features, frechet_distance, kernel_distance
from nfldm_ns.processes import ALONE, Processes
from nfldm_ns.reports.galleries import to_uint8
from nfldm_ns.scenes.image_files import read_rgb
from nfldm_ns.scenes.writing import atomic_path, write_image

REFERENCE = "test"  # the set that all others are compared with
PIECE = 256  # images whose features are kept in one file

Images = Float[Tensor, "images 3 height width"]
Features = Float[Tensor, "images features"]


def write_pictures(folder: Path, name: str, images: Images) -> None:
    """Writes images in [0, 1] as `<name>_<view>.png`."""
    for view, image in enumerate(images):
        write_image(folder / f"{name}_{view}.png", to_uint8(image))


def read_picture(path: Path) -> Float[Tensor, "3 height width"]:
    """A picture in [0, 1]."""
    pixels = read_rgb(path, "remove the folder of this evaluation and run it again")
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def picture_features(
    network: nn.Module,
    paths: Sequence[Path],
    folder: Path | None = None,
    on_progress: Callable[[float], None] | None = None,
    processes: Processes = ALONE,
) -> Features:
    """Inception features of pictures, in float64 on the CPU; only a few pictures are in memory at once.

    Args:
        network: from `weights.load_inception`.
        folder: where features are kept in pieces, so that an interrupted run goes on; None keeps none. The caller sees
            to it that the folder belongs to these pictures. Several processes need one.
        on_progress: called with the share that is done.
        processes: those that share the pieces; each returns all features.
    """
    if not paths:
        raise ValueError("there are no pictures to extract features from")
    firsts = range(0, len(paths), PIECE)
    if processes.count > 1:
        assert folder is not None
        for first in processes.share(firsts):
            _piece_of_features(network, paths, first, folder, on_progress)
        processes.wait()
    return torch.cat([_piece_of_features(network, paths, first, folder, on_progress) for first in firsts])


def _piece_of_features(
    network: nn.Module,
    paths: Sequence[Path],
    first: int,
    folder: Path | None,
    on_progress: Callable[[float], None] | None,
) -> Features:
    """Those of `PIECE` pictures from the `first`, from the folder if they are there, else kept there."""
    path = None if folder is None else folder / f"{first:06d}.safetensors"
    if path is not None and path.is_file():
        return load_file(path)["features"].double()
    features = extract_features(network, _Counted(paths[first : first + PIECE], first, len(paths), on_progress))
    if path is not None:
        with atomic_path(path) as temporary:
            save_file({"features": features.float().contiguous()}, temporary)
    return features


class _Counted:
    """Images of PNG files, read one by one; tells how far it is."""

    def __init__(
        self, paths: Sequence[Path], first: int, total: int, on_progress: Callable[[float], None] | None
    ) -> None:
        self.paths, self.first, self.total, self.on_progress = paths, first, total, on_progress

    def __iter__(self) -> Iterator[Images]:
        for i, path in enumerate(self.paths):
            yield read_picture(path)[None]
            if self.on_progress is not None:
                self.on_progress((self.first + i + 1) / self.total)


def same_picture_features(network: nn.Module, image: Float[Tensor, "3 height width"], count: int) -> Features:
    """Features of a set that shows one image `count` times, rounded to 8 bits like pictures on disk."""
    return extract_features(network, [image.mul(255).round() / 255]).expand(count, -1)


def set_distances(features: Mapping[str, Features]) -> dict[str, dict[str, float]]:
    """FID and KID of all sets to the set `test`.

    Args:
        features: by set; all sets should have equally many images. With the sets `samples` and `train` the distance
            between these two is added as `samples_to_train`.

    Returns:
        `fid` and `kid`, each by set.
    """
    pairs = {name: (features[REFERENCE], other) for name, other in features.items() if name != REFERENCE}
    if {"samples", "train"} <= features.keys():
        pairs["samples_to_train"] = (features["train"], features["samples"])
    return {
        "fid": {name: frechet_distance(*pair) for name, pair in pairs.items()},
        "kid": {name: kernel_distance(*pair).mean for name, pair in pairs.items()},
    }
