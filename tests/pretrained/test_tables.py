"""Tables of foreign names: exact round trips, and what is refused in one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

from diffjax.errors import UserError
from diffjax.pretrained.tables import Row, count, to_ours, to_theirs
from diffjax.pretrained.tensors import Tensor
from diffjax.pretrained.transforms import (
    constant,
    conv,
    copies,
    dense,
    keep,
    merge,
    permute,
    reshape,
    split,
    squeeze,
    stack,
    then,
)

RNG = np.random.default_rng(0)


def drawn(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def expected(**shapes):
    """Nested dicts of shapes from paths."""
    leaves = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}
    return traverse_util.unflatten_dict(leaves, sep="/")


@pytest.mark.parametrize(
    ("transform", "theirs", "ours"),
    [
        (keep, [(2, 3)], [(2, 3)]),
        (dense, [(2, 3)], [(3, 2)]),
        (conv, [(2, 3, 4, 5)], [(4, 5, 3, 2)]),
        (conv, [(2, 3, 4)], [(4, 3, 2)]),
        (squeeze(0, 2), [(1, 3, 1)], [(3,)]),
        (reshape((6,), (2, 3)), [(2, 3)], [(6,)]),
        (merge(3, dense), [(2, 5)] * 3, [(5, 6)]),
        (merge((1, 3)), [(1,), (3,)], [(4,)]),
        (split(2, dense), [(6, 5)], [(5, 3)] * 2),
        (split((1, 2, 3), conv), [(6, 5, 1, 1)], [(1, 1, 5, 1), (1, 1, 5, 2), (1, 1, 5, 3)]),
        (permute((2, 3, -1), (1, 0, 2), dense), [(12, 5)], [(5, 12)]),
        (permute((-1, 3), (1, 0), axis=0), [(12, 5)], [(12, 5)]),
        (copies(3, dense), [(2, 3)] * 3, [(3, 2)]),
        (stack(dense), [(2, 3)] * 4, [(4, 3, 2)]),
        (then(squeeze(2, 3), dense), [(6, 5, 1, 1)], [(5, 6)]),
    ],
)
def test_each_transform_has_its_inverse(transform, theirs, ours):
    arrays = tuple(drawn(*shape) for shape in ours)
    there = transform.to_theirs(arrays)
    assert [array.shape for array in there] == theirs
    for found, wanted in zip(transform.to_ours(there), arrays, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_layouts_are_those_of_the_layers():
    """As products and convolutions by hand, with PyTorch's layout."""
    x, weight = drawn(5), drawn(3, 5)
    np.testing.assert_allclose(x @ dense.to_ours((weight,))[0], weight @ x, rtol=1e-6)
    image, weight = drawn(5, 4, 2), drawn(3, 5, 4, 2)
    (kernel,) = conv.to_ours((weight,))  # of one place: all of the image under the window
    found = np.einsum("hwi,hwio->o", image.transpose(1, 2, 0), kernel)
    np.testing.assert_allclose(found, np.einsum("ihw,oihw->o", image, weight), rtol=1e-4)
    weights = [drawn(2, 5) for _ in range(3)]
    (joined,) = merge(3, dense).to_ours(tuple(weights))
    for part, weight in zip(np.split(x @ joined, 3), weights, strict=True):
        np.testing.assert_allclose(part, weight @ x, rtol=1e-5)


def test_heads_one_after_another_become_queries_keys_and_values():
    """`[H, 3, C]` there: its place `h·3·C + k·C + c` is here `k·H·C + h·C + c`."""
    heads, width = 2, 4
    (found,) = permute((heads, 3, width), (1, 0, 2)).to_ours((np.arange(24),))
    for h, k, c in np.ndindex(heads, 3, width):
        assert found[k * heads * width + h * width + c] == h * 3 * width + k * width + c


LAYERS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4)


@given(layers=LAYERS, seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None, database=None, derandomize=True)
def test_round_trips_are_exact(layers, seed):
    """Parameters there and back, and tensors here and back."""
    rng = np.random.default_rng(seed)
    table = (
        Row(("m.{i}.q", "m.{i}.k", "m.{i}.v"), "layer_{i}/qkv/kernel", merge(3, dense)),
        Row("m.{i}.fused", ("layer_{i}/a", "layer_{i}/b"), split(2, conv)),
        Row("m.{i}.bias", "layer_{i}/bias"),
        Row(("t1", "t2"), "time/kernel", copies(2, dense)),
        Row("positions", (), constant(lambda: np.arange(6.0))),
    )
    shapes = {"time/kernel": (2, 3)}
    for i, (n, m) in enumerate(layers):
        shapes |= {f"layer_{i}/qkv/kernel": (n, 3 * m), f"layer_{i}/bias": (m,)}
        shapes |= {f"layer_{i}/a": (3, 3, n, m), f"layer_{i}/b": (3, 3, n, m)}
    params = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    state = to_theirs(traverse_util.unflatten_dict(params, sep="/"), table)
    assert len(state) == 5 * len(layers) + 3
    assert state["m.0.fused"].shape == (2 * layers[0][1], layers[0][0], 3, 3)
    back = traverse_util.flatten_dict(to_ours(state, table, expected(**shapes), "x"), sep="/")
    assert back.keys() == params.keys()
    for path, array in params.items():
        np.testing.assert_array_equal(back[path], array)


TABLE = (
    Row("blocks.{i}.fc.weight", "block_{i}/fc/kernel", dense),
    Row("blocks.{i}.fc.bias", "block_{i}/fc/bias"),
    Row(("t1", "t2"), "time", copies(2)),
    Row("positions", (), constant(lambda: np.arange(3.0))),
)
EXPECTED = expected(
    **{f"block_{i}/fc/kernel": (2, 3) for i in range(5)},
    **{f"block_{i}/fc/bias": (3,) for i in range(5)},
    time=(2,),
)


def whole():
    state = {f"blocks.{i}.fc.weight": drawn(3, 2) for i in range(5)}
    state |= {f"blocks.{i}.fc.bias": drawn(3) for i in range(5)}
    return state | {"t1": np.ones(2), "t2": np.ones(2), "positions": np.arange(3.0)}


@pytest.mark.parametrize(
    ("gone", "more", "message"),
    [
        (["t1"], {}, "x is of another network: it lacks t1$"),
        (
            ["t1"],
            {"t.1": np.ones(2)},
            r"lacks t1 \(it has t.1\); it has t.1 \(known t1\) too",
        ),
        ([f"blocks.{i}.fc.bias" for i in range(5)], {}, "lacks blocks.0.fc.bias, .* and 2 more$"),
        (
            [],
            {"blocks.5.fc.bias": np.ones(3)},
            r"it has blocks.5.fc.bias \(known blocks.4.fc",
        ),
        ([], {"t1": np.ones(3)}, r"x is of another network: t1 is \[3\], not \[2\]$"),
        ([], {"blocks.0.fc.weight": np.ones((2, 3))}, r"weight is \[2, 3\], not \[3, 2\]"),
        ([], {"t1": np.ones(2, np.int32)}, "t1 has the type int32$"),
        ([], {"t2": np.zeros(2)}, "^x: t1, t2 differ, and here one parameter"),
        ([], {"positions": np.zeros(3)}, "^x: positions has other numbers"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(gone, more, message):
    state = {name: array for name, array in whole().items() if name not in gone}
    with pytest.raises(UserError, match=message) as caught:
        to_ours(state | more, TABLE, EXPECTED, "x")
    assert "\n" not in str(caught.value)


def test_unused_tensors_are_left_out_and_numbers_become_float32():
    state = whole() | {"text.a": np.zeros(1), "t1": np.ones(2, jnp.bfloat16)}
    found = to_ours(state, TABLE, EXPECTED, "x", unused=("text.*",))
    assert found["time"].dtype == np.float32
    assert sorted(found) == [*(f"block_{i}" for i in range(5)), "time"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan, -np.nan])
def test_a_number_that_is_not_finite_is_named_with_its_tensor_and_file(number, dtype):
    layers = {f"{i}.weight": drawn(2, 3).astype(dtype) for i in range(3)}
    layers["0.weight"][:] = np.finfo(np.float16).max  # whose sum is infinite, and which is finite
    table = (Row(tuple(layers), "kernel", stack(dense)),)
    shape = expected(kernel=(3, 3, 2))
    assert to_ours(layers, table, shape, "w.pt")["kernel"].shape == (3, 3, 2)
    layers["2.weight"][1, 1] = number
    with pytest.raises(UserError, match=r"^w.pt: 2.weight has 1 NaN or infinity among its 6 nu"):
        to_ours(layers, table, shape, "w.pt")


def test_nothing_is_read_of_a_file_that_does_not_fit():
    def read():
        raise AssertionError

    tensor = Tensor((3, 2), np.dtype(np.float32), read)
    with pytest.raises(UserError, match="it lacks"):
        to_ours({"blocks.0.fc.weight": tensor}, TABLE, EXPECTED, "x")


def test_a_table_with_a_hole_is_a_fault_of_the_table():
    with pytest.raises(ValueError, match=r"no row for .'time'.") as caught:
        to_theirs({"time": np.zeros(2)}, TABLE[:2])
    assert not isinstance(caught.value, UserError)
    with pytest.raises(ValueError, match=r"several for .'time'."):
        to_theirs({"time": np.zeros(2)}, (*TABLE, Row("t", "time")))


def test_names_are_counted():
    assert count("blocks.{i}.fc.bias", whole()) == 5
    assert count("{a}.{a}.{b}", ["1.1.12", "1.2.2", "1.1.x"]) == 1
    assert count("{a:s}.{b}", ["in.1", "in.x", "in.put.1"]) == 1
