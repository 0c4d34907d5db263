"""Several processes that share the scenes of one command, on one machine or many."""

from __future__ import annotations

import os
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from nfldm_ns.errors import UserInputError

Item = TypeVar("Item")
PATIENCE = timedelta(days=7)  # the last scene of one process may be long after that of another
FIRST_PORT, NUM_PORTS = 20_000, 40_000


@dataclass(frozen=True)
class Processes:
    """This process among those that do the same work.

    Every process does each `count`-th item, whatever was done before, and the items do not depend on who does them: so
    what all of them make together is what one would make, and an interrupted command goes on with any number of
    processes.

    Attributes:
        rank: of this process, from 0.
        count: of all processes.
        local_rank: on its machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this one prints, and writes what is there once."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items of this process; those of all are disjoint, and together all items."""
        return items[self.rank :: self.count]

    def wait(self) -> None:
        """Returns when all processes have come this far.

        Raises:
            UserInputError: if one has ended before.
        """
        if self.count == 1:
            return
        import torch.distributed as dist

        try:
            dist.monitored_barrier(timeout=PATIENCE)
        except RuntimeError as error:
            raise UserInputError(
                f"Another of the {self.count} processes ended too early ({error}): run the same command "
                "again; it goes on where they stopped."
            ) from None

    def leave(self) -> None:
        """Ends the connection to the others."""
        import torch.distributed as dist

        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()


ALONE = Processes()


def is_first_by_environment() -> bool:
    """Whether this one prints, before it has joined the others."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def chosen_device(device: str | None = None) -> str:
    """The device that was asked for, else "cuda" if there is one, else "cpu"."""
    if device:
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def join_processes(device: str | None = None) -> tuple[Processes, str]:
    """Joins the other processes, if `accelerate launch`, `torchrun` or `srun` started several.

    They only wait for each other, so they talk by gloo, on GPUs too.

    Args:
        device: "cpu" or "cuda"; None for what is there.

    Returns:
        this process, and its device: of several on a machine with GPUs each has its own.

    Raises:
        UserInputError: if the variables of the environment make no sense, or the others cannot be reached.
    """
    as_torchrun(os.environ)
    chosen = chosen_device(device)
    try:
        count = int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise UserInputError(
            f"WORLD_SIZE or LOCAL_RANK is no number ({error}): unset both, or start with torchrun."
        ) from None
    if count <= 1:
        return ALONE, chosen
    from accelerate import PartialState

    try:
        state = PartialState(cpu=chosen == "cpu", backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UserInputError(f"The {count} processes do not find each other: {error}.") from None
    if chosen == "cuda":
        import torch

        chosen = f"cuda:{local_rank % torch.cuda.device_count()}"
    return Processes(state.process_index, state.num_processes, local_rank), chosen


def as_torchrun(environment: MutableMapping[str, str]) -> None:
    """Sets the variables of torchrun from those of SLURM, where `srun` alone started several tasks.

    A batch script outside of `srun` is one process, whatever the job asks for; only steps have these variables.

    Raises:
        UserInputError: if the tasks cannot know where the first of them is.
    """
    count = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or "WORLD_SIZE" in environment or count == "1":
        return
    address = environment.get("MASTER_ADDR") or environment.get("SLURM_LAUNCH_NODE_IPADDR")
    if environment.get("SLURM_STEP_NUM_NODES", "1") == "1":
        address = address or "127.0.0.1"
    if address is None or "SLURM_PROCID" not in environment:
        raise UserInputError(
            f"SLURM started {count} tasks, but does not say where the first is: export MASTER_ADDR with its host."
        )
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = count
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
    environment["MASTER_ADDR"] = address
    job = int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + job % NUM_PORTS))
