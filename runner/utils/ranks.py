"""Which rank this process is, read from the environment that its launcher set (no torch needed)."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass

from runner.errors import MachineError

# From here on SLURM numbers steps that srun has not made of a command: the batch script, the shell
# that salloc gives (4294967290). SLURM_PROCID is set there too, but one process runs.
_FIRST_OWN_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class Rank:
    """One process of a distributed run.

    Attributes:
        index: global rank, 0 <= index < world.
        world: number of ranks over all nodes.
        local: rank within this node.
        local_world: number of ranks on this node.
    """

    index: int
    world: int
    local: int
    local_world: int

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes the run's tables."""
        return self.index == 0


def current_rank() -> Rank:
    """Read the rank from `deepspeed`, `torchrun` or plain `srun` (one task a rank); alone, it is
    rank 0 of 1.

    SLURM's own variables count only inside a step of srun's: in the batch script and in the shell
    of salloc `SLURM_NTASKS` is set too, although only one process runs there.

    Raises:
        MachineError: if one of these variables is missing or no number.
    """
    try:
        return _from_environment()
    except (KeyError, ValueError) as error:
        raise MachineError(
            f"the launcher's variables (RANK, WORLD_SIZE, ... or SLURM_PROCID, ...) do not tell"
            f" this process's rank: {error}"
        ) from None


def _from_environment() -> Rank:
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        world = int(env["WORLD_SIZE"])
        return Rank(
            index=int(env["RANK"]),
            world=world,
            local=int(env.get("LOCAL_RANK", env["RANK"])),
            local_world=int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", world))),
        )
    if in_srun_step() and "SLURM_PROCID" in env:
        # The step's own count: `srun --preserve-env` leaves the allocation's in SLURM_NTASKS.
        world = int(env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"])
        return Rank(
            index=int(env["SLURM_PROCID"]),
            world=world,
            local=int(env["SLURM_LOCALID"]),
            local_world=max(1, world // int(env.get("SLURM_STEP_NUM_NODES", "1"))),
        )
    return Rank(index=0, world=1, local=0, local_world=1)


def in_srun_step() -> bool:
    """Whether srun has started this process, as one task of a command."""
    step = os.environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < _FIRST_OWN_STEP


def launch_name() -> list[str | None]:
    """What a launcher calls this start, alike on all its ranks and unlike any other's; deepspeed
    has no name for it."""
    env = os.environ
    step = [env.get("SLURM_JOB_ID"), env.get("SLURM_STEP_ID"), env.get("SLURM_RESTART_COUNT")]
    torchrun = env.get("TORCHELASTIC_RUN_ID")
    return [env.get("WORLD_SIZE"), torchrun, *(step if in_srun_step() else [])]


def is_launched() -> bool:
    """Whether a launcher has started this process as one rank of a run."""
    return "RANK" in os.environ or in_srun_step()


def speaks_for_all() -> bool:
    """Whether this process is the one of its run that tells what is wrong; one that cannot tell
    its rank speaks for itself."""
    try:
        return current_rank().is_main
    except MachineError:
        return True


def rendezvous_address(rank: Rank) -> tuple[str, int]:
    """Host and TCP port at which all ranks meet where the launcher has not named them.

    Under plain `srun` it is the step's first node, at a port by the numbers of the job and of the
    step, so that neither two jobs nor two steps of one meet each other.
    """
    env = os.environ
    if rank.world == 1:
        return "127.0.0.1", free_port()
    if not in_srun_step() or "SLURM_JOB_ID" not in env:
        return "127.0.0.1", 29500
    port = 10_000 + (int(env["SLURM_JOB_ID"]) + 7919 * int(env["SLURM_STEP_ID"])) % 20_000
    nodes = env.get("SLURM_STEP_NODELIST", "")
    if rank.local_world == rank.world or not nodes:
        return "127.0.0.1", port
    return first_host(nodes), port


def first_host(nodes: str) -> str:
    """The first name in a list of SLURM's: `gpu[03-05,7],cpu1` begins with gpu03."""
    first = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in first.groups()) if first else nodes


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now, for ranks to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
