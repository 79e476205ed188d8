"""Each kind of condition: null, dropping, rows, names, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from diffjax.conditions import Classes, Images, Several, Tokens, TokenStates, Unconditional
from diffjax.errors import UserError
from diffjax.process.paths import Linear, Pair
from diffjax.sampling.export import serialise
from diffjax.sampling.guidance import GuidanceModels, NegativeCondition, OtherCondition, guide
from tests.support.phrases import Phrases

N = 500
SEVERAL = Several({"digit": Classes(10), "text": Tokens(3, 4, 2), "coarse": Images((4, 4, 1))})
KINDS = [Classes(10), Tokens(3, 4, 2), Images((4, 4, 1)), SEVERAL]


def some(condition, n=N):
    """A condition of ones; no null is like it."""
    return jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), condition.abstract(n))


def ones(shapes):
    return {name: np.ones(rows.shape, rows.dtype) for name, rows in shapes.items()}


def is_null(condition, cond):
    """Whether each row of each leaf is the null condition's, `[n]` by leaf."""
    return [
        (np.asarray(leaf) == np.asarray(null)).reshape(len(leaf), -1).all(-1)
        for leaf, null in zip(
            jax.tree.leaves(cond), jax.tree.leaves(condition.null(N)), strict=True
        )
    ]


@pytest.mark.parametrize("condition", KINDS, ids=lambda kind: type(kind).__name__)
def test_null_and_example_have_the_shapes_of_the_arrays_in_a_batch(condition):
    needed = condition.abstract(5)
    for found in (condition.null(5), condition.example(5)):
        same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), found, needed)
        assert all(jax.tree.leaves(same))
        condition.check(found)


@pytest.mark.parametrize("condition", KINDS[:3], ids=lambda kind: type(kind).__name__)
def test_examples_are_dropped_as_a_whole_at_the_rate(condition):
    cond = some(condition)
    dropped = is_null(condition, condition.drop(jax.random.key(0), cond, 0.3))
    for other in dropped[1:]:
        np.testing.assert_array_equal(dropped[0], other)
    assert abs(dropped[0].mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / N)
    assert not np.any(is_null(condition, condition.drop(jax.random.key(0), cond, 0.0)))
    assert np.all(is_null(condition, condition.drop(jax.random.key(0), cond, 1.0)))


def test_parts_are_dropped_independently():
    dropped = SEVERAL.drop(jax.random.key(0), some(SEVERAL), 0.5)
    coarse, digit, text, *_ = is_null(SEVERAL, dropped)
    for one, other in ((coarse, digit), (coarse, text), (digit, text)):
        assert abs((one & other).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / N)


def test_parts_have_rates_of_their_own_and_one_for_all_together():
    """Of independent events, `P(text null) = 1 - (1 - 0.3)(1 - 0.2)` and `P(digit null) = 0.2`."""
    rates = {"text": 0.3, "all": 0.2}
    dropped = SEVERAL.drop(jax.random.key(1), some(SEVERAL), rates)
    coarse, digit, text, *_ = is_null(SEVERAL, dropped)
    np.testing.assert_array_equal(coarse, digit)
    assert not (digit & ~text).any()
    for found, expected in ((digit, 0.2), (text, 1 - 0.7 * 0.8)):
        assert abs(found.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / N)
    condition = Several(SEVERAL.parts, kept=("coarse",))
    coarse, *others = is_null(condition, condition.drop(jax.random.key(0), dropped, {"all": 1.0}))
    assert not coarse.all()
    assert np.all(others)


@pytest.mark.parametrize(
    ("condition", "rate", "trained"),
    [
        (Classes(3), 0.1, True),
        (Classes(3), 0.0, False),
        (Unconditional(), 0.1, False),
        (SEVERAL, 0.1, True),
        (SEVERAL, {"digit": 0.1, "text": 0.1}, False),
        (SEVERAL, {"digit": 0.1, "text": 0.1, "coarse": 0.2}, True),
        (SEVERAL, {"all": 0.1}, True),
        (Several(SEVERAL.parts, kept=("coarse", "digit")), {"text": 0.1}, True),
    ],
)
def test_whether_the_null_condition_is_trained(condition, rate, trained):
    assert condition.null_is_trained(rate) == trained


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        (Classes(3), "has a rate for each part, and this condition .3 classes. has no parts"),
        (SEVERAL, "there is no part 'txet'; did you mean 'text'"),
        (Several({"txet": Classes(3)}, kept=("txet",)), "the part 'txet' is never dropped"),
    ],
)
def test_rates_of_parts_that_there_are_not(condition, said):
    with pytest.raises(UserError, match=said):
        condition.check_dropout({"txet": 0.1})


def test_parts_that_are_kept_are_neither_dropped_nor_led_away_from():
    condition = Several(SEVERAL.parts, kept=("coarse",))
    for cond in (
        condition.drop(jax.random.key(0), some(condition), 1.0),
        condition.nulled(some(condition)),
    ):
        coarse, *others = is_null(condition, cond)
        assert not coarse.any()
        assert np.all(others)
    assert not Several({"coarse": Images((4, 4, 1))}, kept=("coarse",)).can_be_dropped
    with pytest.raises(UserError, match="no part 'corse'; did you mean 'coarse'"):
        Several(SEVERAL.parts, kept=("corse",))
    with pytest.raises(UserError, match="no part of a condition can be called 'all'"):
        Several({"all": Classes(3)})


def test_guidance_leads_away_from_the_null_condition_in_one_batch():
    """Its second half has the null digit, no token, and the same coarse image, which is kept."""
    condition, seen = Several(SEVERAL.parts, kept=("coarse",)), []

    def predict(x, t, cond):
        seen.append(cond)
        return Pair(x, x)

    guided = guide(GuidanceModels(predict, condition), Linear(), scale=2.0)
    guided(jnp.ones((2, 4, 4, 1)), jnp.full(2, 0.5), some(condition, 2))
    (both,) = seen
    np.testing.assert_array_equal(both["digit"], [1, 1, 10, 10])
    np.testing.assert_array_equal(both["coarse"], np.ones((4, 4, 4, 1)))
    assert both["text"].mask.tolist() == [[True] * 3] * 2 + [[False] * 3] * 2


def test_a_negative_condition_leaves_the_parts_that_are_kept():
    condition, seen = Several(SEVERAL.parts, kept=("coarse", "text")), []

    def predict(x, t, cond):
        seen.append(cond)
        return Pair(x, x)

    cond = some(condition, 2)
    for against, other in (
        (OtherCondition("digit=7"), None),
        (NegativeCondition(), {"digit": np.array([7, 7])}),
    ):
        guided = guide(
            GuidanceModels(predict, condition, other=other), Linear(), scale=2.0, against=against
        )
        guided(jnp.ones((2, 4, 4, 1)), jnp.full(2, 0.5), cond)
        np.testing.assert_array_equal(seen[-1]["digit"], [1, 1, 7, 7])
        for name in ("coarse", "text"):
            for both, own in zip(
                jax.tree.leaves(seen[-1][name]), jax.tree.leaves(cond[name]), strict=True
            ):
                np.testing.assert_array_equal(both, np.concatenate([own, own]))
    with pytest.raises(UserError, match="no part of the condition is called 'coarse'"):
        condition.negative.of({"coarse": cond["coarse"]})


def test_rows_are_taken_of_every_leaf():
    cond = jax.tree.map(lambda leaf: np.arange(leaf.size).reshape(leaf.shape), some(SEVERAL, 6))
    taken = SEVERAL.take(cond, np.array([4, 4, 0]))
    for leaf, whole in zip(jax.tree.leaves(taken), jax.tree.leaves(cond), strict=True):
        np.testing.assert_array_equal(leaf, whole[[4, 4, 0]])


def test_names_of_arrays_are_those_of_the_parts():
    assert set(SEVERAL.shapes(2)) == {
        "label", "tokens_states", "tokens_mask", "tokens_pooled", "given_image",
    }  # fmt: skip
    found = SEVERAL.arrays(some(SEVERAL, 2))
    assert {name: rows.shape for name, rows in found.items()} == {
        name: rows.shape for name, rows in SEVERAL.shapes(2).items()
    }
    assert set(Classes(3).arrays(np.arange(3))) == {"labels"}
    assert SEVERAL.network_arguments() == {"num_classes": 10}
    assert Unconditional().shapes(3) == {}


def test_a_list_is_there_for_classes_alone():
    assert Classes(3).in_turn(5).tolist() == [0, 1, 2, 0, 1]
    assert Classes(3).in_turn(5, most=2).tolist() == [0, 1, 0, 1, 0]
    assert Unconditional().in_turn(2).tolist() == [0, 0]
    assert Tokens(3, 4).in_turn(2) is None
    assert SEVERAL.in_turn(2) is None


def test_texts_are_parsed_or_refused_with_the_nearest():
    states, mask, pooled = Phrases().parse(["very dark", ""])
    assert mask.tolist() == [[True, True, False], [False] * 3]
    np.testing.assert_array_equal(states[0, :2], [[0, 0, 1, 0], [1, 0, 0, 0]])
    np.testing.assert_allclose(pooled, [[1 / 3, 0, 1 / 3, 0], [0] * 4], rtol=1e-6)
    null = Phrases().null(1)
    assert not null.mask.any()
    assert not null.pooled.any()
    with pytest.raises(UserError, match="no word 'drak'; did you mean 'dark'"):
        Phrases().parse(["drak"])
    with pytest.raises(UserError, match="Tokens can't be read from texts, such as 'dark'"):
        Tokens(3, 4).parse(["dark"])


@pytest.mark.parametrize(
    ("condition", "cond", "said"),
    [
        (Classes(3), np.array([0, 4]), "there is no label 4: this run has 3, from 0 to 2"),
        (Tokens(3, 4), np.array([0, 1]), "up to 3 tokens of width 4"),
        (
            Tokens(3, 4),
            TokenStates(np.zeros((2, 5, 4)), np.zeros((2, 5), bool), np.zeros((2, 0))),
            r"2 samples need an array of shape \(2, 3, 4\), not \(2, 5, 4\)",
        ),
        (Images((4, 4, 1)), np.zeros((2, 8, 8, 1)), r"shape \(2, 4, 4, 1\), not \(2, 8, 8, 1\)"),
        (Several({"digit": Classes(3)}), {"digit": np.array([5])}, "there is no label 5"),
        (Several({"digit": Classes(3)}), {"digits": np.array([1])}, "digit: 3 classes"),
    ],
)
def test_arrays_of_another_kind_are_refused(condition, cond, said):
    with pytest.raises(UserError, match=said):
        condition.check(cond)


def test_dropping_is_compiled_with_a_rate_that_is_traced():
    drop = jax.jit(SEVERAL.drop)
    kept = drop(jax.random.key(0), some(SEVERAL, 4), jnp.float32(0.0))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), kept, some(SEVERAL, 4)))


@pytest.mark.parametrize("condition", KINDS, ids=lambda kind: type(kind).__name__)
def test_a_guided_sampler_of_any_kind_is_exported_for_batches_of_any_size(condition):
    def predict(x, t, cond):
        rows = [jnp.sum(leaf.reshape(leaf.shape[0], -1), 1) for leaf in jax.tree.leaves(cond)]
        size = sum(rows, start=jnp.zeros(()))
        return Pair(x + size[:, None, None, None], x)

    guided = guide(GuidanceModels(predict, condition), Linear(), scale=2.0)
    half = jax.jit(lambda noise, cond: guided(noise, jnp.full(noise.shape[0], 0.5), cond).x0)
    code = serialise(
        half,
        (4, 4, 1), condition, noise=True, platforms=["cpu"],
    )  # fmt: skip
    for n in (1, 3):
        noise, cond = np.zeros((n, 4, 4, 1), np.float32), some(condition, n)
        given = cond if isinstance(condition, Classes | Images) else ones(condition.shapes(n))
        found = export.deserialize(bytearray(code)).call(noise, given)
        np.testing.assert_allclose(found, half(noise, cond), atol=1e-5)
