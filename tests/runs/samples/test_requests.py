"""What is wanted of a model: any part of a request is the same samples."""

from typing import Any

import numpy as np

from diffjax.runs.samples.model import Request

# As a condition of several parts will be.
CONDITION: Any = {
    "tokens": np.arange(20.0).reshape(5, 2, 2),
    "several": (np.arange(5), np.eye(5) > 0),
}


def of_five() -> Request:
    return Request(CONDITION, seed=7, source=np.arange(5.0).reshape(5, 1, 1, 1) * 10)


def test_batches_have_the_rows_that_belong_together():
    request = of_five()
    batches = list(request.batches(2))
    assert [some.rows.tolist() for some in batches] == [[0, 1], [2, 3], [4]]
    for some in batches:
        assert some.seed == 7
        assert some.source is not None
        assert some.source.dtype == np.float32
        np.testing.assert_array_equal(some.source[:, 0, 0, 0], 10 * some.rows)
        np.testing.assert_array_equal(some.condition["tokens"][:, 0, 0], 4.0 * some.rows)
        np.testing.assert_array_equal(some.condition["several"][0], some.rows)
        np.testing.assert_array_equal(some.condition["several"][1].argmax(1), some.rows)


def test_a_part_of_a_part_keeps_its_numbers_and_its_noise():
    request = of_five()
    part = request.only(np.array([1, 3, 4])).only(np.array([2, 0]))
    assert part.rows.tolist() == [4, 1]
    np.testing.assert_array_equal(part.condition["several"][0], [4, 1])
    noise = request.noise((3, 3, 1))
    assert noise.shape == (5, 3, 3, 1)
    np.testing.assert_array_equal(part.noise((3, 3, 1)), noise[[4, 1]])
    assert np.abs(Request(CONDITION, seed=8).noise((3, 3, 1)) - noise).min() > 0


def test_a_batch_that_is_filled_up_begins_with_what_was_there():
    filled = of_five().only(np.array([2, 3])).filled(5)
    assert filled.rows.tolist() == [2, 3, 4, 5, 6]
    np.testing.assert_array_equal(filled.condition["several"][0], [2, 3, 3, 3, 3])
    assert len(filled) == 5


def test_nothing_is_wanted_of_no_rows():
    nothing = Request(np.zeros(0, np.int32))
    assert len(nothing) == 0
    assert list(nothing.batches(3)) == []
