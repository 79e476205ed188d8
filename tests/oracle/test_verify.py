"""`verify_objective` passes right objectives, and reports what is wrong with others."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import register_dataclass

from diffjax.errors import UserError
from diffjax.objectives.base import Objective
from diffjax.objectives.denoising import Denoising, pixel_mean
from diffjax.oracle.analytic import FiniteData
from diffjax.oracle.verify import DEVIATIONS, Verification, verify_objective
from diffjax.process import paths, precond, targets, times, weights


def denoising(path, target, kind=Denoising, **precond_parts):
    parts = {"noise_label": precond.TimeLabel(), **precond_parts}
    return kind(path, precond.Precond(target, **parts), weights.Constant(), times.Uniform())


FLOW = denoising(paths.Linear(), targets.Velocity())
DDPM = denoising(paths.LinearBeta(), targets.Noise())


@register_dataclass
@dataclass(frozen=True)
class TwoOutputs(Denoising):
    """A second output, further parameters and a memory, none of which the first output feels."""

    @property
    def traits(self):
        return replace(super().traits, outputs=2)

    def init_params(self, key):
        return {"log_scale": jax.random.normal(key)}

    def init_memory(self):
        return jnp.ones(3)

    def __call__(self, apply, params, teacher_params, key, batch, progress):
        time_key, key = jax.random.split(key)
        t = self.times.quantile(self.uniforms(time_key, len(batch["image"])), self.path)
        noised = self.noised(t, key, batch)
        first, second = jnp.split(self.evaluate(apply, params, noised), 2, axis=-1)
        loss = jnp.exp(-params["log_scale"]) * self.loss(noised, first) + params["log_scale"]
        return progress.memory.sum() * loss + pixel_mean(second**2), self.metrics(noised)


POINTS = np.random.default_rng(0).uniform(-1, 1, (5, 2, 2, 1)).astype(np.float32)
RIGHT = {
    # EDM's way of asking the network, on images, of which there are five; its label falls with
    # time, those of the wrong objectives below rise.
    "two outputs, preconditioned": (
        denoising(
            paths.Cosine(),
            targets.F(),
            TwoOutputs,
            noise_label=precond.LogSNRLabel(25.0),
            input_scale=precond.UnitVariance(),
        ),
        FiniteData(jnp.asarray(POINTS)),
    ),
    "plain": (FLOW, None),
}


@pytest.mark.parametrize(
    "name",
    ["two outputs, preconditioned", pytest.param("plain", marks=pytest.mark.thorough)],
)
def test_right_objectives_pass(name):
    objective, data = RIGHT[name]
    found = verify_objective(objective, data, num_batches=48)
    assert found.passed, found
    # The mean square of 8 independent z exceeds 4 once in 10,000 times; here the key is fixed.
    assert np.mean(np.square(list(found.z.values()))) < 4.0
    assert max(found.detectable.values()) < 0.06
    assert found.num_examples == 48 * 512


@register_dataclass
@dataclass(frozen=True)
class Rescaled(Denoising):
    """The target is 2 % larger than it should be."""

    def loss(self, noised, output):
        return super().loss(noised, output / 1.02)


@register_dataclass
@dataclass(frozen=True)
class WrongLabel(Denoising):
    """The network receives a time 5 % too early."""

    def evaluate(self, apply, params, noised, **options):
        x_t, label = self.precond.inputs(noised.c, noised.x_t)
        return apply(params, x_t, 0.95 * label, noised.cond, key=noised.key)


@register_dataclass
@dataclass(frozen=True)
class Deaf(Denoising):
    """No gradient reaches the network."""

    def evaluate(self, apply, params, noised, **options):
        return jax.lax.stop_gradient(super().evaluate(apply, params, noised))


def turned(kind, like):
    return kind(like.path, like.precond, like.weight, like.times)


WRONG = {
    "label mismatch": (turned(WrongLabel, DDPM), "not smallest at the best prediction"),
    "no gradient": (turned(Deaf, FLOW), "hardly depends"),
    "negative weight": (replace(FLOW, weight=lambda c, k: -jnp.ones_like(c.t)), "decreases away"),
    "nothing at high noise": (
        replace(FLOW, weight=lambda c, k: jnp.where(c.t < 0.6, 1.0, 0.0)),
        "hardly depends on the prediction along 'x near log-SNR -3'",
    ),
}


# The others' reasons are in `test_the_arithmetic_of_a_verification` and in the test after this.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "nothing at high noise" else pytest.mark.thorough)
        for name in WRONG
    ],
)
def test_wrong_objectives_fail_and_say_why(name):
    objective, reason = WRONG[name]
    found = verify_objective(objective, num_batches=24)
    assert not found.passed
    assert reason in str(found.reason)
    assert str(found).startswith(f"FAILED: {found.reason}\n")
    assert len(str(found).splitlines()) == 3


def test_two_percent_of_eps_are_seen_and_measured():
    found = verify_objective(turned(Rescaled, DDPM), num_batches=48)
    assert not found.passed
    assert "is smallest +2" in str(found.reason)
    assert abs(found.z["prediction"]) > 10
    # By its own account, one standard error of the offset is detectable/threshold.
    error = found.detectable["prediction"] / found.threshold
    assert error < 0.005
    assert found.offset["prediction"] == pytest.approx(0.02, abs=4 * error)


def test_the_arithmetic_of_a_verification():
    found = Verification(
        names=("a", "b", "c"),
        gradient=np.array([0.02, -0.3, 0.0]),
        error=np.array([0.01, 0.05, 0.0]),
        curvature=np.array([4.0, 2.0, 0.0]),
        num_examples=10,
        threshold=4.5,
        limit=0.1,
    )
    assert found.z == pytest.approx({"a": 2.0, "b": -6.0, "c": 0.0})
    assert found.offset == pytest.approx({"a": -0.005, "b": 0.15, "c": np.nan}, nan_ok=True)
    assert found.detectable == pytest.approx({"a": 0.01125, "b": 0.1125, "c": np.inf})
    assert (found.worst, found.blindest) == ("b", "c")
    assert "+15 %" in str(found.reason)
    calm = replace(found, gradient=np.zeros(3))
    assert "along 'c'" in str(calm.reason)
    assert replace(calm, curvature=np.array([4.0, 3.0, 1.0])).passed
    assert "decreases away" in str(replace(calm, curvature=np.array([4.0, -3.0, 1.0])).reason)
    assert "not finite" in str(replace(calm, gradient=np.array([0.0, np.nan, 0.0])).reason)
    # An exact zero of the error does not make a gradient vanish.
    assert not replace(found, gradient=np.array([0.0, 0.0, 0.1])).passed


class Scalar(Objective):
    """A mean where losses should be."""

    path, precond = FLOW.path, FLOW.precond

    def __call__(self, apply, params, teacher_params, key, batch, progress):
        return jnp.zeros(()), {}


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"Scalar returns a loss of shape \(\); .* \(8,\)"):
        verify_objective(Scalar(), batch_size=8)
    same = denoising(paths.Linear(), targets.Velocity(), noise_label=lambda c: jnp.ones_like(c.t))
    with pytest.raises(UserError, match="neither increases nor decreases along Linear"):
        verify_objective(same)


def test_deviations_are_linearly_independent():
    x = np.random.default_rng(0).standard_normal((400, 2), np.float32)
    truth = 0.5 * np.tanh(x) + 0.1
    log_snr = np.linspace(-8.0, 8.0, 400, dtype=np.float32)[:, None]
    program = jax.jit(lambda *known: [change(*known) for _, change in DEVIATIONS])
    changes = np.stack([np.ravel(each) for each in program(truth, x, log_snr)])
    unit = changes / np.linalg.norm(changes, axis=1, keepdims=True)
    assert np.linalg.svd(unit, compute_uv=False).min() > 0.05
