"""Guidance: closed forms, and what each rule promises."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import choices
from diffjax.errors import UserError
from diffjax.process import analytic
from diffjax.process.paths import Cosine, Linear, Pair, coeffs
from diffjax.sampling.guidance import (
    ClassifierFree,
    Clipped,
    Limited,
    Models,
    PlusPlus,
    Projected,
    Rescaled,
    Thresholded,
    ZeroStar,
    guide,
    mixes,
)
from diffjax.spec import build

PATH = Linear()
TIMES = jnp.array([0.2, 0.5, 0.9])
RULES = [build(choices.guidance_called(name)) for name in choices.GUIDANCE]
every_rule = pytest.mark.parametrize("rule", RULES, ids=choices.GUIDANCE)


def two_predictions(size=0.4):
    """`x`, coefficients and two predictions that mix to the same `x`."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, strong, weak = (size * jax.random.normal(key, (3, 4, 4, 1)) for key in keys)
    c = coeffs(PATH, TIMES, x.ndim)
    return x, c, *(Pair(x0, (x - c.a * x0) / c.s) for x0 in (strong, weak))


def assert_pairs(found, expected, atol=2e-5):
    for one, other in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guided_scores_are_those_of_the_sharpened_density(scale):
    """`p(x|c)^s·p(x)^(1-s)` of two Gaussians at a noise level is one too; its score is linear."""
    path, t = Cosine(), 0.4
    with_label = analytic.Gaussian(jnp.full(1, 0.7), jnp.full((1, 1), 0.2))
    without = analytic.Gaussian(jnp.full(1, -0.3), jnp.full((1, 1), 0.6))
    x = jnp.linspace(-2, 2, 5)[:, None]

    def predict(x, t, cond):
        on, off = (one.predict(path)(x, t, None) for one in (with_label, without))
        return jax.tree.map(partial(jnp.where, cond[:, None] == 9), off, on)

    times = jnp.full(len(x), t)
    guided = guide(Models(predict, null_label=9), path, scale=scale)
    found = guided(x, times, jnp.zeros(len(x), jnp.int32))
    a, s = (float(of(jnp.float32(t))) for of in (path.alpha, path.sigma))
    score_on = -(x - a * 0.7) / (a**2 * 0.2 + s**2)
    score_off = -(x - a * -0.3) / (a**2 * 0.6 + s**2)
    score = scale * score_on + (1.0 - scale) * score_off
    np.testing.assert_allclose(found.eps, -s * score, atol=1e-5)


@every_rule
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_what_a_rule_says_mixes_to_x(rule, scale):
    x, c, on, off = two_predictions()
    pair = rule(x, c, on, off, scale)
    again = c.a * pair.x0 + c.s * pair.eps
    assert bool(jnp.allclose(again, x, atol=1e-5)) == mixes(rule) == (rule != PlusPlus())


@every_rule
def test_a_scale_of_one_changes_nothing_that_is_within_range(rule):
    x, c, on, off = two_predictions(size=0.1)
    pair = rule(x, c, on, off, 1.0)
    np.testing.assert_allclose(pair.x0, on.x0, atol=2e-5)
    np.testing.assert_allclose(pair.eps, on.eps if mixes(rule) else off.eps, atol=2e-5)


def test_a_negative_velocity_is_scaled_to_fit():
    """Where one velocity is a multiple of the other there is no direction to go: p·off is on."""
    x, c, on, _ = two_predictions()
    half = 0.5 * (c.da * on.x0 + c.ds * on.eps)
    x0 = x - c.t * half  # of the linear path, x0 = x - t·v
    off = Pair(x0, (x - c.a * x0) / c.s)
    assert_pairs(ZeroStar()(x, c, on, off, 5.0), on)


def test_projected_guidance_moves_at_right_angles():
    x, c, on, off = two_predictions()
    moved = Projected()(x, c, on, off, 6.0).x0 - on.x0
    np.testing.assert_allclose(jnp.sum(moved * on.x0, (1, 2, 3)), 0.0, atol=1e-4)
    assert_pairs(
        Projected(parallel=1.0)(x, c, on, off, 6.0), ClassifierFree()(x, c, on, off, 6.0), 1e-4
    )
    short = Projected(parallel=1.0, longest=0.1)(x, c, on, off, 6.0).x0 - on.x0
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(short**2, (1, 2, 3))), 0.5, rtol=1e-5)


def test_limited_guidance_is_plain_outside_its_interval():
    x, c, on, off = two_predictions()  # at log-SNRs of 2.8, 0 and -4.4
    pair = Limited(low=-1.0, high=1.0)(x, c, on, off, 3.0)
    guided = ClassifierFree()(x, c, on, off, 3.0)
    for found, outside, inside in zip(pair[:2], on[:2], guided[:2], strict=True):
        np.testing.assert_array_equal(found[::2], outside[::2])
        np.testing.assert_array_equal(found[1], inside[1])


def test_rescaled_guidance_has_the_deviation_of_plain_prediction():
    x, c, on, off = two_predictions()
    found = Rescaled(share=1.0)(x, c, on, off, 5.0).x0
    np.testing.assert_allclose(jnp.std(found, (1, 2, 3)), jnp.std(on.x0, (1, 2, 3)), rtol=1e-5)
    assert_pairs(
        Rescaled(share=0.0)(x, c, on, off, 5.0), ClassifierFree()(x, c, on, off, 5.0), 1e-4
    )


@pytest.mark.parametrize("rule", [Clipped(), Thresholded(quantile=0.9)])
def test_thresholds_keep_x0_in_range(rule):
    x, c, on, off = two_predictions(size=2.0)
    assert float(jnp.abs(ClassifierFree()(x, c, on, off, 4.0).x0).max()) > 1.0
    assert float(jnp.abs(rule(x, c, on, off, 4.0).x0).max()) <= 1.0


@pytest.mark.parametrize(("scale", "rows"), [(None, 3), (jnp.float32(2.0), 6)])
def test_no_scale_costs_one_evaluation(scale, rows):
    seen = []

    def predict(x, t, cond):
        seen.append(len(x))
        return Pair(x, 5.0 * x)

    x = jnp.full((3, 2), 7.0)
    pair = guide(Models(predict, 1), PATH, Clipped(), scale)(x, TIMES, jnp.zeros(3, jnp.int32))
    assert seen == [rows]
    np.testing.assert_array_equal(pair.x0, jnp.ones((3, 2)))


def test_parts_nest_in_the_order_given():
    rule = build(choices.guidance_called("projected+limited+clipped"))
    assert rule == Clipped(Limited(Projected()))
    with pytest.raises(UserError, match="'projected' goes around no other"):
        choices.guidance_called("limited+projected")
    with pytest.raises(UserError, match="did you mean 'limited'"):
        choices.guidance_called("cfg+limitd")
