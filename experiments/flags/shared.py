"""Flags that several programs share: of the watchdog, and of a run of several processes."""

import logging
import os
import re
import sys
import time
from types import SimpleNamespace
from typing import Any, NoReturn

import jax
from absl import flags

from diffjax.errors import UserError, whole_number
from diffjax.host.watchdog import Watchdog

# Long enough for a machine that swaps or a network with short failures.
_HEARTBEAT_SECONDS = 100
_NAMES = ("coordinator", "num_processes", "process_index", "distributed")


class _Extend(flags.ArgumentParser):
    """A flag that may have a value: `--extend`, `--extend=continue`, `--extend=restart`."""

    def parse(self, argument: Any) -> bool | str:
        """The value as `train` takes it."""
        choices = {"true": True, "false": False, "continue": "continue", "restart": "restart"}
        if str(argument).lower() not in choices:
            raise ValueError("give --extend alone, or continue or restart")
        return choices[str(argument).lower()]


def define_extend(flag_values: flags.FlagValues) -> None:
    """Defines `--extend`, which may have a value."""
    about = (
        "go on with this run though its config differs, as with more steps: --extend, or "
        "--extend=continue or --extend=restart where the learning rate depends on the number of "
        "steps"
    )
    flag = flags.Flag(_Extend(), None, "extend", False, about, boolean=True)
    flags.DEFINE_flag(flag, flag_values)


def define_watchdog(flag_values: flags.FlagValues) -> None:
    """Defines the flags of the watchdog."""
    flags.DEFINE_float(
        "hang_seconds", Watchdog.seconds,
        "a run hangs after so long without a step; 0 is off",
        lower_bound=0.0, flag_values=flag_values,
    )  # fmt: skip
    flags.DEFINE_float(
        "hang_times", Watchdog.times,
        "and not before so many mean step times",
        lower_bound=0.0, flag_values=flag_values,
    )  # fmt: skip
    flags.DEFINE_bool(
        "hang_exits", Watchdog.exits, "end a hanging run (status 75)",
        flag_values=flag_values,
    )  # fmt: skip


def watchdog(args: SimpleNamespace) -> Watchdog:
    """Builds the watchdog from the values of its flags."""
    return Watchdog(args.hang_seconds, args.hang_times, args.hang_exits)


def define_processes(flag_values: flags.FlagValues) -> None:
    """Defines the flags of a run of several processes."""
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, of several",
        flag_values=flag_values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "num_processes", None, "number of processes of the run", flag_values=flag_values
    )
    flags.DEFINE_integer(
        "process_index", None, "index of this process, from 0", flag_values=flag_values
    )
    flags.DEFINE_bool(
        "distributed",
        False,
        "find the processes by Slurm, Open MPI, Kubernetes, TPU",
        flag_values=flag_values,
    )
    flags.DEFINE_integer(
        "heartbeat_timeout_seconds",
        _HEARTBEAT_SECONDS,
        "time until a silent process counts as lost",
        lower_bound=10,
        flag_values=flag_values,
    )


def join_processes(args: SimpleNamespace) -> None:
    """Joins the other processes, if the flags describe a run of several.

    Raises:
        UserError: flags contradict each other, or the other processes can't be found.
    """
    if not any(getattr(args, name, None) not in (None, False) for name in _NAMES):
        return
    given = {name: getattr(args, name) for name in _NAMES[:3]}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if args.distributed and len(missing) < 3:
        raise UserError(
            "--distributed finds the processes automatically: leave out --coordinator, "
            "--num_processes and --process_index"
        )
    if not args.distributed:
        _check(missing, args)
    try:
        # JAX detects values that are None.
        jax.distributed.initialize(
            args.coordinator,
            args.num_processes,
            args.process_index,
            local_device_ids=_gpus_of_the_node(),
            heartbeat_timeout_seconds=args.heartbeat_timeout_seconds,
        )
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        hint = (
            "set --coordinator, --num_processes and --process_index"
            if args.distributed
            else f"is {args.coordinator} the address of process 0, and its port free?"
        )
        raise UserError(f"can't join the other processes ({reason}); {hint}") from error
    if jax.process_index() != 0:
        logging.getLogger("diffjax").setLevel(logging.WARNING)  # Process 0 logs the rest.


def _gpus_of_the_node() -> range | None:
    """Indices of all GPUs of the node if Slurm runs one task on it; None lets JAX decide.

    By default JAX assigns one GPU to a Slurm task, by its number on the node, and the others would
    be idle.
    """
    tasks = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")
    per_node = next((os.environ[name] for name in tasks if name in os.environ), "")
    # Open MPI's ranks inherit the variables of the single task that started them.
    chosen = {"JAX_LOCAL_DEVICE_IDS", "OMPI_COMM_WORLD_LOCAL_RANK"} & os.environ.keys()
    # "1(x2)" means one task on each of two nodes.
    if chosen or not re.fullmatch(r"1(\(x\d+\))?", per_node):
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = len(visible.split(","))
    else:
        count = whole_number(os.environ.get("SLURM_GPUS_ON_NODE", "")) or 0
    return range(count) if count > 1 else None


def leave_processes(status: int) -> None:
    """Ends a failed process immediately, because the others would wait for it.

    In a run of one process it does nothing. Successful processes do not call it: they wait for
    each other.
    """
    if not jax.distributed.is_initialized():
        return
    # Process 0 runs the coordination service; waits so that the others can report their errors.
    if jax.process_index() == 0:
        time.sleep(2)
    _end(status)


def _end(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _check(missing: list[str], args: SimpleNamespace) -> None:
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing: several processes need --coordinator=HOST:PORT, "
            "--num_processes=N and --process_index=I, or --distributed"
        )
    host, _, port = args.coordinator.rpartition(":")
    if not host or not 0 < (whole_number(port) or 0) < 65536:
        raise UserError(f"--coordinator={args.coordinator} is not of the form HOST:PORT")
    if not 0 <= args.process_index < args.num_processes:
        raise UserError(
            f"--process_index={args.process_index} is not one of {args.num_processes} processes, "
            "counted from 0"
        )
