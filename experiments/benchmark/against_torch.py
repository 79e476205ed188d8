"""Compares training and sampling in this library and in PyTorch: `--against=torch`."""

import copy
import functools
import multiprocessing
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.errors import UserError
from diffjax.performance.throughput import sampling_program, timed, training_program
from diffjax.runs.setup import set_up
from diffjax.spec import TARGET
from experiments.benchmark.cases import Case
from experiments.flags import cli

Rounds = Mapping[str, Callable[[], float]]
"""Programs by name; each runs a batch and returns its seconds."""
Make = Callable[[], Rounds]
_NETWORKS = {"diffjax.models.dit.network:DiT": "DiT", "diffjax.models.unet:UNet": "UNet"}


@dataclass(frozen=True)
class Pair:
    """Seconds per batch of one program in both libraries, one number for each round."""

    config: str
    program: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Our time divided by PyTorch's, for each round."""
        return tuple(a / b for a, b in zip(self.ours, self.theirs, strict=True))


def measure_pairs(
    case: Case, *, compiled: bool, steps: int, num_samples: int, rounds: int
) -> list[Pair]:
    """Measures training and sampling of a config in both libraries, as `measure_in_turns`.

    Args:
        case: the config.
        compiled: whether PyTorch compiles its network with `torch.compile`.
        steps: training steps per round.
        num_samples: samples per round.
        rounds: number of rounds.

    Raises:
        UserError: PyTorch is missing, or there is no PyTorch version of the network.
    """
    arguments = {"case": case, "steps": steps, "num_samples": num_samples}
    ours = functools.partial(_ours, **arguments)
    theirs = functools.partial(_theirs, compiled=compiled, **arguments)
    return measure_in_turns(case.name, ours, theirs, rounds)


def measure_in_turns(name: str, ours: Make, theirs: Make, rounds: int) -> list[Pair]:
    """Measures both libraries, each in its own process, in turn in each round.

    Both use the same device, and on a GPU both may multiply float32 matrices in TF32.

    Args:
        name: for the results.
        ours: builds our programs; each is a function that runs a batch and returns its seconds.
        theirs: builds PyTorch's, of the same names.
        rounds: number of rounds.

    Raises:
        UserError: a library is missing, or has no such network.
    """
    context = multiprocessing.get_context("spawn")
    sides = []
    for make in (ours, theirs):
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, make), daemon=True)
        process.start()
        there.close()
        sides.append((here, process))
    try:
        programs, _ = (_answer(side) for side, _ in sides)
        seconds: dict[str, list[list[float]]] = {program: [[], []] for program in programs}
        for _ in range(rounds):
            for program, found in seconds.items():
                for (side, _), values in zip(sides, found, strict=True):
                    side.send(program)
                    values.append(_answer(side))
    finally:
        for side, process in sides:
            side.close()
            process.join(10.0)
            process.kill()
    return [Pair(name, program, *map(tuple, found)) for program, found in seconds.items()]


def _answer(side: Connection) -> Any:
    try:
        answer = side.recv()
    except EOFError:
        raise UserError("a measuring process died, probably out of memory") from None
    if isinstance(answer, UserError):
        raise answer
    return answer


def _serve(side: Connection, make: Make) -> None:
    """Builds the programs of one library, and measures them on request until the pipe closes."""
    # JAX preallocates most of a GPU's memory, but two processes share it.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    try:
        programs = make()
    except UserError as error:
        side.send(error)
        return
    side.send(list(programs))
    while True:
        try:
            name = side.recv()
        except EOFError:
            return
        side.send(programs[name]())


def _ours(case: Case, *, steps: int, num_samples: int) -> Rounds:
    cli.keep_freed_memory()
    config = case.config()
    setup = set_up(config, *case.data(config))
    state = setup.init(jax.random.key(config.seed))
    params = jax.tree.map(jnp.copy, state.weights(config.weights))
    programs = (training_program(setup, state, steps), sampling_program(setup, params, num_samples))
    return {p.name: lambda p=p: timed(p.run) / p.repeats for p in programs}


def _theirs(case: Case, *, compiled: bool, steps: int, num_samples: int) -> Rounds:
    device = torch_device()
    import torch

    torch.set_default_device(device)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, as XLA multiplies
    setup, network = twin(case)
    config, recipe = setup.config, setup.wired.recipe
    shape, arguments = setup.wired.image_shape, setup.wired.condition.network_arguments()
    dtype = getattr(torch, config.model.dtype)
    lower = torch.autocast(device, dtype, enabled=dtype != torch.float32)
    update_average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=device == "cuda")
    call, call_average = map(torch.compile, (network, average)) if compiled else (network, average)
    x0 = torch.rand(config.batch_size, *shape) * 2 - 1
    num_classes = arguments["num_classes"]
    label = torch.arange(config.batch_size) % max(num_classes, 1)

    def train() -> None:
        for _ in range(steps):
            t = torch.rand(len(x0))
            eps, at = torch.randn_like(x0), t[:, None, None, None]
            with lower:
                output = call((1 - at) * x0 + at * eps, 1000.0 * t, label)
            loss = torch.mean((output - (eps - x0)) ** 2)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                for _ in config.ema_decays:
                    update_average(list(average.parameters()), list(network.parameters()), 1)
        next(network.parameters()).cpu()  # Waits until a GPU has finished.

    calls = recipe.nfe // recipe.calls

    @torch.inference_mode()
    def draw() -> None:
        x = torch.randn(num_samples, *shape)
        labels = torch.arange(num_samples * recipe.calls) % max(num_classes, 1)
        for _ in range(calls):
            t = torch.full((num_samples * recipe.calls,), 500.0)
            with lower:
                output = call_average(torch.cat([x] * recipe.calls), t, labels)
            x = x - output[:num_samples] / calls
        x.cpu()

    train()
    draw()
    return {"training": lambda: timed(train) / steps, "sampling": lambda: timed(draw)}


def torch_device() -> str:
    """The PyTorch device of the same kind as JAX's.

    Raises:
        UserError: PyTorch is missing, or it has no such device.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(f"--against=torch needs PyTorch: {error}") from None
    if jax.default_backend() != "gpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise UserError("--against=torch: JAX runs on a GPU here, and this PyTorch sees none")
    return "cuda"


def twin(case: Case) -> tuple[Any, Any]:
    """The config's setup, and the same network in PyTorch.

    Raises:
        UserError: this network is not implemented in PyTorch.
    """
    from experiments.benchmark import torch_networks

    config = case.config()
    setup = set_up(config, *case.data(config))
    settings = config.model.to_dict()
    name = _NETWORKS.get(settings.pop(TARGET))
    if name is None or settings.get("residual_resampling") or settings.get("dropout"):
        raise UserError(
            f"--against=torch has no twin of {config.model[TARGET]} as configured: it supports "
            "DiT, and UNet without residual_resampling, both without dropout"
        )
    if setup.wired.recipe.nfe is None:
        raise UserError("--against=torch: the config's solver must have a fixed number of steps")
    shape, arguments = setup.wired.image_shape, setup.wired.condition.network_arguments()
    network = getattr(torch_networks, name)(shape, arguments["num_classes"], **settings)
    if sum(p.numel() for p in network.parameters()) != setup.wired.num_params:
        raise UserError(f"--against=torch: the twin of {config.model[TARGET]} is another network")
    return setup, network
