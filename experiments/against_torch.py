"""Training and sampling in this library and in PyTorch, in turns: `--against=torch`."""

import copy
import multiprocessing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.errors import UserError
from diffjax.spec import TARGET
from diffjax.training.setup import set_up
from diffjax.training.state import weights_called
from diffjax.training.throughput import sampling, timed, training
from experiments import cli
from experiments.benchmark_cases import Case

Rounds = Mapping[str, Callable[[], float]]
_NETWORKS = {"diffjax.models.dit:DiT": "DiT", "diffjax.models.unet:UNet": "UNet"}


@dataclass(frozen=True)
class Pair:
    """One program in both libraries, a number a round in seconds a batch."""

    config: str
    program: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Ours by theirs, round by round."""
        return tuple(a / b for a, b in zip(self.ours, self.theirs, strict=True))


def against_torch(case: Case, *, steps: int, num_samples: int, rounds: int) -> list[Pair]:
    """Times both libraries, each in a process of its own, one after the other in each round.

    Args:
        case: the config.
        steps: of training a round.
        num_samples: a round.
        rounds: how many.

    Raises:
        UserError: there is no PyTorch, or no twin of the network.
    """
    context = multiprocessing.get_context("spawn")
    sizes = {"steps": steps, "num_samples": num_samples}
    sides = []
    for make in (_ours, _theirs):
        here, there = context.Pipe()
        arguments = (there, make, case, sizes)
        process = context.Process(target=_serve, args=arguments, daemon=True)
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
    return [Pair(case.name, program, *map(tuple, found)) for program, found in seconds.items()]


def _answer(side: Connection) -> Any:
    try:
        answer = side.recv()
    except EOFError:
        raise UserError("a measuring process died, probably out of memory") from None
    if isinstance(answer, UserError):
        raise answer
    return answer


def _serve(
    side: Connection,
    make: Callable[..., Rounds],
    case: Case,
    sizes: Mapping[str, int],
) -> None:
    """Builds one side's programs, then times whichever it is asked for until nobody asks."""
    try:
        programs = make(case, **sizes)
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
    params = jax.tree.map(jnp.copy, weights_called(state, config.weights))
    programs = (training(setup, state, steps), sampling(setup, params, num_samples))
    return {p.name: lambda p=p: timed(p.run) / p.repeats for p in programs}


def _theirs(case: Case, *, steps: int, num_samples: int) -> Rounds:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"--against=torch needs PyTorch: {error}") from None
    from experiments import torch_networks

    config = case.config()
    image_shape, num_classes = case.data(config)
    setup = set_up(config, image_shape, num_classes)
    settings = config.model.to_dict()
    name = _NETWORKS.get(settings.pop(TARGET))
    unlike = settings.get("residual_resampling") or settings.get("dropout")
    if name is None or unlike or settings["dtype"] != "float32":
        raise UserError(
            f"--against=torch has no twin of {config.model[TARGET]} as configured: it has DiT, and "
            "UNet without residual_resampling, both without dropout and with dtype=float32"
        )
    network = getattr(torch_networks, name)(image_shape, num_classes, **settings)
    if sum(p.numel() for p in network.parameters()) != setup.wired.num_params:
        raise UserError(f"--against=torch: the twin of {config.model[TARGET]} is another network")
    update_average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    x0 = torch.rand(config.batch_size, *image_shape) * 2 - 1
    label = torch.arange(config.batch_size) % max(num_classes, 1)

    def train() -> None:
        for _ in range(steps):
            t = torch.rand(len(x0))
            eps, at = torch.randn_like(x0), t[:, None, None, None]
            output = network((1 - at) * x0 + at * eps, 1000.0 * t, label)
            loss = torch.mean((output - (eps - x0)) ** 2)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                for _ in config.ema_decays:
                    update_average(list(average.parameters()), list(network.parameters()), 1)

    recipe = setup.wired.recipe
    if recipe.nfe is None:
        raise UserError("--against=torch: the config's solver chooses its own steps")
    calls = recipe.nfe // recipe.calls

    @torch.inference_mode()
    def draw() -> None:
        x = torch.randn(num_samples, *image_shape)
        labels = torch.arange(num_samples * recipe.calls) % max(num_classes, 1)
        for _ in range(calls):
            t = torch.full((num_samples * recipe.calls,), 500.0)
            output = average(torch.cat([x] * recipe.calls), t, labels)
            x = x - output[:num_samples] / calls

    train()
    draw()
    return {"training": lambda: timed(train) / steps, "sampling": lambda: timed(draw)}
