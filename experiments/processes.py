"""Flags for a run of several processes, and how each of them joins and leaves it."""

import logging
import os
import re
import sys
import time
from types import SimpleNamespace
from typing import NoReturn

import jax
from absl import flags

from diffjax.errors import UserError

# Long enough for a machine that swaps or a network that hiccups.
_HEARTBEAT_SECONDS = 100
_NAMES = ("coordinator", "num_processes", "process_index", "distributed")


def define(flag_values: flags.FlagValues) -> None:
    """Adds the flags that say which process of how many this is."""
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of the first of several processes", flag_values=flag_values
    )
    flags.DEFINE_integer(
        "num_processes", None, "how many, each with the same command", flag_values=flag_values
    )
    flags.DEFINE_integer(
        "process_index", None, "which of them this is, from 0", flag_values=flag_values
    )
    flags.DEFINE_bool(
        "distributed",
        False,
        "one of several processes, as Slurm, Open MPI, Kubernetes or a TPU pod say",
        flag_values=flag_values,
    )
    flags.DEFINE_integer(
        "heartbeat_timeout_seconds",
        _HEARTBEAT_SECONDS,
        "of several processes, when one that is silent is given up",
        lower_bound=10,
        flag_values=flag_values,
    )


def join(args: SimpleNamespace) -> None:
    """Joins the other processes, if the flags say that there are any.

    Raises:
        UserError: flags that don't go together, or there is nothing to tell where the others are.
    """
    if not any(getattr(args, name, None) not in (None, False) for name in _NAMES):
        return
    given = {name: getattr(args, name) for name in _NAMES[:3]}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if args.distributed and len(missing) < 3:
        raise UserError("--distributed finds out by itself: leave --coordinator and the like out")
    if not args.distributed:
        _check(missing, args)
    try:
        # What is not given is detected.
        jax.distributed.initialize(
            args.coordinator,
            args.num_processes,
            args.process_index,
            local_device_ids=_gpus_of_the_node(),
            heartbeat_timeout_seconds=args.heartbeat_timeout_seconds,
        )
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        told = " ".join(str(error).split())[:300]
        hint = (
            "give --coordinator, --num_processes and --process_index"
            if args.distributed
            else f"is {args.coordinator} the address of process 0, and its port free?"
        )
        raise UserError(f"can't join the other processes ({told}); {hint}") from error
    if jax.process_index() != 0:
        logging.getLogger("diffjax").setLevel(logging.WARNING)  # The first one tells the rest.


def _gpus_of_the_node() -> range | None:
    """All GPUs of the node, for the one task that Slurm runs on it; None leaves the choice to JAX.

    JAX gives a task of Slurm's one GPU, that of its number on the node; the others would idle.
    """
    tasks = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")
    said = next((os.environ[name] for name in tasks if name in os.environ), "")
    # Open MPI's ranks inherit the variables of the one task that started them.
    chosen = {"JAX_LOCAL_DEVICE_IDS", "OMPI_COMM_WORLD_LOCAL_RANK"} & os.environ.keys()
    if chosen or not re.fullmatch(r"1(\(x\d+\))?", said):  # As "1(x2)": one on each of two nodes.
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = len(visible.split(","))
    else:
        given = os.environ.get("SLURM_GPUS_ON_NODE", "")
        count = int(given) if given.isdecimal() else 0
    return range(count) if count > 1 else None


def leave(status: int) -> None:
    """Ends a process of several that failed at once; the others would wait for it.

    A process that ends as it should is waited for, and so does not come here.
    """
    if not jax.distributed.is_initialized():
        return
    # The first holds what the others would miss at once: they may still say what they know.
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
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator={args.coordinator} is not of the form HOST:PORT")
    if not 0 <= args.process_index < args.num_processes:
        raise UserError(
            f"--process_index={args.process_index} is not one of {args.num_processes} processes, "
            "counted from 0"
        )
