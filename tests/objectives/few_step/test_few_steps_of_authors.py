"""Losses and gradients of objectives for few steps are those of their authors' code.

The stored arrays and the script that made them are in `tests/references/few_steps.py`.
"""

from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.objectives.base import Progress
from diffjax.objectives.distances import PseudoHuber
from diffjax.objectives.distillation.coupled_ends import CoupledEnds
from diffjax.objectives.few_step.consistency import (
    Consistency,
    Doubling,
    Neighbours,
    Shrinking,
)
from diffjax.objectives.few_step.drifting import Others, drift_loss
from diffjax.objectives.few_step.flow_maps import Shortcut
from diffjax.objectives.few_step.mean_flow import MeanFlow
from diffjax.objectives.few_step.solution_flow import SolutionFlow
from diffjax.objectives.few_step.terminal_velocity import TerminalVelocity
from diffjax.process import paths, schedules, targets, times, weights
from diffjax.process.paths import coeffs, mix
from diffjax.process.precond import LogSNRLabel, Precond, TimeLabel, UnitVariance
from tests.references import few_steps
from tests.references.few_steps import AVERAGES, ENDS, HERE, IMAGES, LABELS, NOISE, PARAMS, TIMES

NO_CONDITION = few_steps.NUM_CLASSES


def stored(name: str) -> dict[str, np.ndarray]:
    with np.load(few_steps.FOLDER / f"few_steps_{name}.npz", allow_pickle=False) as file:
        return dict(file)


def network(params, x, noise_label, cond, *, key=None):
    cond = jnp.full(len(x), NO_CONDITION) if cond is None else cond
    second = noise_label[:, 1] if noise_label.ndim > 1 else jnp.zeros(len(x))
    first = noise_label[:, 0] if noise_label.ndim > 1 else noise_label
    return few_steps.network(jnp.tanh, params, x, first, second, cond)


def as_precise(x):
    """In double precision where that is on."""
    return jnp.asarray(np.asarray(x, np.float64))


def given(objective: Any, noise=NOISE, **methods: Any) -> Any:
    """The same with this noise, and methods that return given values."""
    kind = type(objective)

    def noised(self, t, key, batch):
        found = kind.noised(self, t, key, batch)
        pair = found.pair._replace(eps=as_precise(noise))
        return found._replace(pair=pair, x_t=mix(coeffs(self.path, t, noise.ndim), pair))

    values = {
        name: lambda self, *_, value=value: tuple(as_precise(each) for each in value)
        for name, value in methods.items()
    }
    made = type("Given", (kind,), {"noised": noised, **values})
    return made(**{each.name: getattr(objective, each.name) for each in fields(objective)})


class These(times.Uniform):
    """Given times."""

    def __init__(self, t):
        object.__setattr__(self, "t", jnp.asarray(t))

    def quantile(self, u, path):
        return self.t  # type: ignore[attr-defined]


def straight(kind, target=None, weight=None, density=None, **parts):
    precond = Precond(target or targets.Velocity(), TimeLabel(1.0))
    density = density or times.Uniform()
    return kind(paths.Linear(), precond, weight or weights.Constant(), density, **parts)


def compare(
    objective, reference, images=IMAGES, labels=LABELS, fraction=0.5, scale=1.0, rtol=3e-5,
    network=network,
):  # fmt: skip
    """The mean loss and its gradient, up to a factor."""
    batch = {"image": as_precise(images), "cond": jnp.asarray(labels)}
    averages = jax.tree.map(as_precise, AVERAGES)

    @jax.jit
    def loss_and_gradient(params):
        def loss(params):
            progress = Progress(jnp.array(fraction), num_steps=1)
            key = jax.random.key(0)
            found = objective(network, params, averages, key, batch, progress)[0]
            return jnp.mean(found), found

        return jax.value_and_grad(loss, has_aux=True)(params)

    (mean, losses), gradient = loss_and_gradient(jax.tree.map(as_precise, PARAMS))
    assert mean > 0.0
    if "loss" in reference:
        found = losses if reference["loss"].ndim else mean
        np.testing.assert_allclose(scale * found, reference["loss"], rtol=rtol)
    largest = max(np.abs(reference[f"d_{name}"]).max() for name in PARAMS)
    for name in PARAMS:
        expected = reference[f"d_{name}"]
        np.testing.assert_allclose(
            scale * gradient[name], expected, rtol=1e-4, atol=2e-5 * largest, err_msg=name
        )


@pytest.mark.parity
def test_the_second_stage_of_instaflow():
    compare(given(straight(CoupledEnds)), stored("instaflow"))


BOTH = {"intervals": (TIMES, ENDS)}
AFTER = (TIMES, ENDS - 0.01)


@pytest.mark.parity
def test_mean_flow_with_guidance():
    objective = straight(MeanFlow, omega=0.8, kappa=0.5)
    compare(given(objective, **BOTH), stored("mean_flow"))


@pytest.mark.parity
def test_improved_mean_flow():
    compare(given(straight(MeanFlow, own_velocity=True), **BOTH), stored("imf"))


def with_velocity(params, x, noise_label, cond, *, key=None):
    u = network(params, x, noise_label, cond)
    return jnp.concatenate([u, few_steps.velocity_head(u, x)], axis=-1)


def test_improved_mean_flow_with_a_head_for_the_velocity():
    objective = straight(MeanFlow, own_velocity=True, velocity_head=True)
    compare(given(objective, **BOTH), stored("imf_heads"), network=with_velocity)


@pytest.mark.parity
def test_pixel_mean_flow():
    """One of the times is under 0.05, where theirs divides by that and the weight is less."""
    weight = weights.Capped(weights.ConstantIn(targets.Velocity()))
    objective = straight(MeanFlow, targets.Clean(), weight, own_velocity=True)
    compare(given(objective, **BOTH), stored("pmf"))


@pytest.mark.parity
def test_shortcut():
    """Their noise is scaled by 1 - 1e-5, so that equality is to that."""
    reference = stored("shortcut")
    steps = jnp.asarray(reference["t"]), jnp.asarray(reference["ends"])
    images = np.concatenate([IMAGES] * 3)[:16]
    images = np.concatenate([images[:8], images[:8]])
    objective = given(straight(Shortcut, between=0.5), reference["noise"], steps=steps)
    compare(objective, reference, images, reference["labels"].astype(np.int32))


@pytest.mark.parity
def test_terminal_velocity_with_guidance():
    """Theirs divides by the square of the scale."""
    objective = straight(TerminalVelocity, density=These(HERE), guidance_scale=2.0)
    labels = np.full_like(LABELS, NO_CONDITION)
    compare(given(objective, steps=AFTER), stored("tvm"), labels=labels, scale=0.25)


@pytest.mark.parity
@pytest.mark.parametrize("prefix", ["flow_", ""])
def test_solution_flow_with_guidance(prefix):
    """Their loss of steps is a stand-in with the same gradient; at t = 0.02, s = 0.01."""
    objective = straight(SolutionFlow, omega=0.75, kappa=0.75)
    ends = (AFTER[0], AFTER[0] if prefix else AFTER[1])
    reference = {
        name.removeprefix(prefix): x
        for name, x in stored("soflow").items()
        if name.startswith("flow_") == bool(prefix) and "loss" not in name
    }
    with jax.enable_x64(True):
        compare(given(objective, intervals=ends), reference)


def of_edm(density, **parts):
    precond = Precond(targets.F(), LogSNRLabel(-0.125), UnitVariance())
    return Consistency(schedules.EDM(), precond, weights.Constant(), density, **parts)


@pytest.mark.parity
def test_easy_consistency():
    parts = {"pairs": Shrinking(), "metric": PseudoHuber(0.0), "power": 1.0}
    objective = given(of_edm(These(few_steps.SIGMAS), **parts))
    # Their levels are single; the difference of two images that are near one another loses digits.
    compare(objective, stored("ect"), fraction=(few_steps.STAGE + 0.5) / 8, rtol=1e-4)


@pytest.mark.parity
def test_consistency():
    """The denoiser is EDM's in both; that of the authors is x itself at 0.002, and not at 0."""
    places = few_steps.PLACES
    between = np.sqrt(few_steps.level(places) * few_steps.level(places + 1))
    levels = few_steps.LEVELS - 1.0
    pairs = Neighbours(Doubling(levels, levels))
    objective = given(of_edm(These(between), pairs=pairs, averaged_target=True))
    compare(objective, stored("consistency"))


def test_the_drift_and_its_gradient():
    """Two conditions at one place are two groups in their code, and blocks of weights here."""
    reference, block = stored("drifting"), np.eye(2, dtype=np.float32)
    samples, negatives, positives = (
        jnp.reshape(jnp.asarray(x), (-1, 1, x.shape[-1])) for x in few_steps.DRIFTED.values()
    )
    images = jnp.concatenate([negatives, positives])
    n = [x.shape[1] for x in few_steps.DRIFTED.values()]
    own = np.kron(block, np.ones((n[0], n[0])))
    away = np.kron(np.diag(few_steps.NEGATIVE_WEIGHT), np.ones((n[0], n[1])))
    towards = np.kron(block, np.ones((n[0], n[2])))
    nothing = [np.zeros((len(own), x)) for x in (2 * n[2], 2 * n[1])]
    others = Others(
        jnp.asarray(own),
        jnp.concatenate([away, nothing[0]], axis=1),
        jnp.concatenate([nothing[1], towards], axis=1),
    )

    def loss(samples):
        return drift_loss(samples, images, others, (0.02, 0.05, 0.2))

    @jax.jit
    def both(samples):
        return loss(samples), jax.grad(lambda samples: jnp.mean(loss(samples)))(samples)

    found, gradient = both(samples)
    means = np.reshape(found, (2, -1)).mean(axis=1)
    np.testing.assert_allclose(means, reference["loss"], rtol=1e-4)
    expected = reference["d_samples"].reshape(gradient.shape)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-4)


def test_the_references_are_for_parameters_that_matter():
    for name in ("mean_flow", "imf", "imf_heads", "pmf", "shortcut", "tvm", "soflow"):
        assert all(np.abs(stored(name)[f"d_{part}"]).max() > 1e-3 for part in PARAMS), name
