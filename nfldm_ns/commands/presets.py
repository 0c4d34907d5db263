"""`nfldm-presets`: sizes of all presets, and what a training step of each costs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import tyro

from nfldm_ns.errors import exit_on_bad_input

WIDEST = 1000  # columns, more than the table has


@dataclass
class Presets:
    """Lists the presets of the three stages and of baselines: parameters, operations and memory of one training step.

    Counted for the networks, in single precision, at the preset's batch and for images of the size it is meant for;
    lifting, volume rendering and the lazy gradient penalty of stage 1 come on top. G is 10^9; operations are
    multiplications and additions, forward and backward.
    """

    def run(self) -> None:
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.table import Table

        from nfldm_ns.method_configs.gan_costs import gan_costs
        from nfldm_ns.method_configs.preset_costs import preset_costs

        table = Table(box=SIMPLE, pad_edge=False)
        for heading in ("stage", "preset", "sizes"):
            table.add_column(heading, no_wrap=True)
        for heading in ("batch", "parameters", "G ops", "memory"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in chain(preset_costs(), gan_costs()):
            cost = row.cost
            table.add_row(
                row.stage,
                row.preset,
                row.sizes,
                str(row.batch_size),
                f"{cost.parameters / 1e6:.2f} M",
                f"{cost.flops / 1e9:,.0f}",
                f"{cost.bytes / 2**30:.2f} GiB",
            )
        needed = Console(width=WIDEST).measure(table).maximum  # a narrower terminal wraps lines, and loses no number
        Console(width=max(Console().width, needed)).print(table)


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    command = tyro.cli(Presets, prog="nfldm-presets", args=args)
    with exit_on_bad_input():
        command.run()


if __name__ == "__main__":
    main()
