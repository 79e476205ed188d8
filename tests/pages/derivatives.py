"""Writes the table of errors of central differences in docs/objectives.md, for a trained network.

python -m experiments.train --config=configs/digits_mean_flow.py --workdir=RUN
python -m tests.pages.derivatives RUN
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import diffjax
from diffjax.data.sources import digits
from diffjax.objectives.derivatives import CentralDifference, Derivative, Exact
from diffjax.process.targets import encode
from diffjax.wiring import Wired, wire

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"
BEGIN, END = "<!-- central differences -->\n", "<!-- end of central differences -->\n"
HEAD = "| step | float32 | bfloat16 |\n|---|---|---|\n"
STEPS = (0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0001)


def derivative_of(wired: Wired, params: Any, derivative: Derivative) -> jax.Array:
    """du/dt of MeanFlow for test images, along the examples' velocities, `[B, …]`."""
    objective: Any = wired.objective
    test = digits().test
    images = np.stack([test[i]["image"] for i in range(256)]) / np.float32(127.5) - 1.0
    batch = {"image": jnp.asarray(images, jnp.float32), "cond": jnp.full(256, 10)}
    time_key, key = jax.random.split(jax.random.key(0))
    t, t_to = objective.intervals(time_key, 256)
    t_to = jnp.where(t_to < t, t_to, 0.5 * t)
    noised = objective.noised(t, key, batch)

    def apply(params: Any, *inputs: Any, key: Any = None) -> jax.Array:
        return wired.apply(params, *inputs).astype(jnp.float32)

    average = objective.average(apply, params, noised)
    tangents = (encode(noised.k, noised.pair), jnp.ones_like(t))
    return derivative(lambda x, t: average(x, t, t_to), (noised.x_t, t), tangents)[1]


def table(workdir: str) -> str:
    """The error of each step, as a share of the exact derivative in float32."""
    run = diffjax.load(workdir)
    in_half = ConfigDict(run.config.to_dict())
    in_half.model.dtype = "bfloat16"
    shape, condition = run.parts.wired.image_shape, run.parts.wired.condition
    both = run.parts.wired, wire(in_half, shape, condition)
    params = run.weights(run.config.weights)

    def found(wired: Wired, params: Any, derivative: Derivative) -> jax.Array:
        return jax.jit(lambda params: derivative_of(wired, params, derivative))(params)

    exact = found(both[0], params, Exact())

    def line(name: str, derivative: Derivative) -> str:
        errors = [found(each, params, derivative) - exact for each in both]
        shares = [float(jnp.linalg.norm(e) / jnp.linalg.norm(exact)) for e in errors]
        full, half = (f"{100 * x:.0f}" if x > 0.1 else f"{100 * x:.2g}" for x in shares)
        return f"| {name} | {full} % | {half} % |\n"

    lines = [line(f"{h:g}", CentralDifference(h)) for h in STEPS]
    return HEAD + line("exact", Exact()) + "".join(lines)


if __name__ == "__main__":
    page = PAGE.read_text("utf-8")
    before, _, rest = page.partition(BEGIN)
    made = before + BEGIN + table(sys.argv[1]) + END + rest.partition(END)[2]
    PAGE.write_text(made, "utf-8")
