"""`nfldm-weights`: gets the pretrained weights that metrics and the perceptual loss need."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, get_args

import tyro

from nfldm_ns.errors import UserInputError, exit_on_bad_input
from nfldm_ns.pretrained.names import WeightsName


@dataclass
class Get:
    """Download, check and convert pretrained weights into the cache; what is there already is only checked."""

    names: tyro.conf.Positional[tuple[WeightsName, ...]] = field(default=get_args(WeightsName))
    """Which weights."""
    folder: Path | None = None
    """A folder to look into first, for converted weights or the original files."""

    def main(self) -> None:
        from nfldm_ns.pretrained.weights import fetch_weights, read_weights

        for name in self.names:
            path = fetch_weights(name, self.folder)
            read_weights(name, self.folder)
            print(f"{name}: {path}")


@dataclass
class List:
    """Say which pretrained weights are on this machine and where."""

    folder: Path | None = None
    """A folder to look into first."""

    def main(self) -> None:
        from nfldm_ns.pretrained.weights import WEIGHTS, explicit_folder, find_weights

        explicit_folder(self.folder)
        for name, weights in WEIGHTS.items():
            try:
                where = str(find_weights(name, self.folder))
            except UserInputError as error:
                where = str(error)
            print(f"{name}: {weights.about}\n    {where}")


Command = Annotated[Get, tyro.conf.subcommand("get")] | Annotated[List, tyro.conf.subcommand("list")]


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    command = tyro.cli(Command, prog="nfldm-weights", description=__doc__, args=args)
    with exit_on_bad_input():
        command.main()


if __name__ == "__main__":
    main()
