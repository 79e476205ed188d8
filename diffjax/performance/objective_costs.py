"""What a training step of each objective costs, counted in its compiled program."""

from collections.abc import Iterable
from typing import Any

import jax
from ml_collections import ConfigDict

from diffjax import choices
from diffjax.conditions import of_classes
from diffjax.defaults import experiment
from diffjax.loop.compiled_step import train_step_of
from diffjax.performance.hlo.parser import parse
from diffjax.performance.hlo.products import compiled_matrix_flops
from diffjax.runs.setup import Setup, set_up
from diffjax.training.sharding import make_mesh
from diffjax.wiring import traits_of

PLAIN = "objective=flow"
"""Flow matching: one evaluation and its gradient."""
_BATCH, _IMAGE, _CLASSES = 16, (28, 28, 1), 10


def setup_of(arguments: str) -> Setup:
    """A run with the DiT of `choices.MODELS_28X28` on images of ten classes, 16 a step.

    Args:
        arguments: the choices of a config, as `objective=mean_flow`.

    Raises:
        UserError: a name is unknown, or the parts do not fit together.
    """
    config = experiment(
        "costs",
        arguments,
        data=ConfigDict(),
        extractor=ConfigDict(),
        models={"dit": choices.MODELS_28X28["dit"]},
        model="dit",
    )
    config.batch_size = _BATCH
    config.model.attention = "xla"  # made of products that can be counted
    if traits_of(config).distils:
        config.teacher = "runs/teacher"  # of which only the shapes count, those of this network
    mesh = make_mesh(devices=jax.devices()[:1])
    return set_up(config, _IMAGE, of_classes(_CLASSES), mesh)


def training_flops(setup: Setup) -> int:
    """FLOPs of the matrix products of one training step, in the compiled program.

    All that the loss evaluates counts: networks of teachers and targets, derivatives in forward
    mode, the gradient. What the compiler leaves out does not.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = setup.wired.batch_shapes(setup.config.batch_size)
    # How fast machine code is makes no difference to what it computes.
    options: Any = {"xla_backend_optimization_level": 0}
    step = jax.jit(train_step_of(setup), compiler_options=options)
    program = step.lower(setup.abstract, key, batch).compile().as_text()
    return compiled_matrix_flops(parse(str(program)))


def cost_table(names: Iterable[str]) -> str:
    """A Markdown table: FLOPs of a step, as multiples of flow matching's with the same network.

    Args:
        names: choices of a config, as `objective=imf`.
    """
    plain = training_flops(setup_of(PLAIN))
    lines = [cost_line(name, training_flops(setup_of(name)) / plain) for name in names]
    return "| objective | FLOPs of a step |\n|---|---|\n" + "".join(lines)


def cost_line(name: str, ratio: float) -> str:
    r"""A line of the table.

    Example:
        >>> cost_line("objective=imf", 1.6876)
        '| `imf` | 1.69 |\n'
    """
    return f"| `{name.removeprefix('objective=')}` | {ratio:.2f} |\n"
