"""Factors of a change in another layout: their product is the change in that layout."""

import json
from typing import Any

import numpy as np
import pytest

from diffjax.pretrained.factors import to_ours, to_theirs
from diffjax.pretrained.files import read_safetensors_metadata
from diffjax.pretrained.lora import NETWORK, LowRank, read_lora
from diffjax.pretrained.lora_writer import DIALECTS, write_lora
from diffjax.pretrained.transforms import (
    conv,
    copies,
    dense,
    each,
    keep,
    merge,
    permute,
    reorder,
    side_by_side,
    split,
    squeeze,
    then,
)

RANDOM = np.random.default_rng(0)
CASES = {
    "dense": (dense, [(4, 6)]),
    "convolution": (conv, [(3, 3, 4, 6)]),
    "one pixel": (then(squeeze(2, 3), dense), [(4, 6)]),
    "queries, keys and values": (merge(3, dense), [(4, 6)]),
    "of heads": (permute((2, 3, -1), (1, 0, 2), dense), [(4, 12)]),
    "inputs in another order": (permute((2, 2), (1, 0), dense, axis=0), [(4, 6)]),
    "two in one": (split((2, 4), dense), [(5, 2), (5, 4)]),
    "two in one, in order": (
        then(split(2, dense), side_by_side(reorder([2, 0, 1]), keep)),
        [(5, 3), (5, 3)],
    ),
    "two along inputs": (split((2, 3), dense, axis=0), [(2, 6), (3, 6)]),
    "equal ones": (copies(2, dense), [(4, 6)]),
}


def drawn(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_the_product_of_the_factors_is_the_change_there(name):
    transform, shapes = CASES[name]
    ranks = range(2, 2 + len(shapes))
    pairs = [(drawn(*s[:-1], r), drawn(r, s[-1])) for s, r in zip(shapes, ranks, strict=True)]
    for used in (pairs, [None, *pairs[1:]] if len(pairs) > 1 else pairs):
        changes = tuple(
            np.zeros(shape) if pair is None else pair[0].astype(float) @ pair[1]
            for shape, pair in zip(shapes, used, strict=True)
        )
        there: Any = to_theirs(transform, shapes, used)
        for expected, (down, up) in zip(transform.to_theirs(changes), there, strict=True):
            product = LowRank("", down, up, 1.0).change(expected.shape)
            np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-6)
            assert down.shape[1:] == expected.shape[1:]


@pytest.mark.parametrize("name", [name for name in CASES if name != "equal ones"])
def test_the_product_of_the_factors_is_the_change_here(name):
    transform, kernels = CASES[name]
    there = [x.shape for x in transform.to_theirs(tuple(map(np.zeros, kernels)))]
    pairs = [
        (drawn(r, *s[1:]), drawn(s[0], r, *(1 for _ in s[2:]))) for r, s in enumerate(there, 2)
    ]
    changes = [LowRank("", *pair, 1.0).change(s) for pair, s in zip(pairs, there, strict=True)]
    here: Any = to_ours(transform, kernels, pairs)
    for expected, (a, b) in zip(transform.to_ours(tuple(changes)), here, strict=True):
        np.testing.assert_allclose(a @ b, expected, rtol=1e-4, atol=1e-5)
    assert to_ours(transform, kernels, [None] * len(pairs)) == [None] * len(kernels)


def test_equal_tensors_that_are_one_kernel_count_once_and_unlike_ones_are_refused():
    pair, shapes = (drawn(2, 4), drawn(6, 2)), [(4, 6)]
    found: Any = to_ours(copies(2, dense), shapes, [pair, pair])[0]
    np.testing.assert_array_equal(found[0], pair[0].T)
    np.testing.assert_array_equal(found[1], pair[1].T)
    for other in (None, (pair[0], -pair[1])):
        with pytest.raises(ValueError, match="differ, and here one layer replaces all of them"):
            to_ours(copies(2, dense), shapes, [pair, other])


def test_numbers_are_those_of_the_factors_and_a_layer_without_a_change_has_none():
    a, b = drawn(4, 2), drawn(2, 6)
    found: Any = to_theirs(merge(3, dense), [(4, 6)], [(a, b)])
    for part, (down, up) in enumerate(found):
        np.testing.assert_array_equal(down, a.T)
        np.testing.assert_array_equal(up, b.T[2 * part : 2 * part + 2])
    assert to_theirs(merge(3, dense), [(4, 6)], [None]) == [None] * 3


def test_a_tensor_that_mixes_inputs_and_outputs_is_refused():
    mixed = each(lambda x: x.reshape(4, 6), lambda x: x.reshape(8, 3))
    with pytest.raises(ValueError, match="mixes inputs and outputs of a layer"):
        to_theirs(mixed, [(4, 6)], [(drawn(4, 2), drawn(2, 6))])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_file_that_is_written_is_read_with_the_same_changes(dialect, tmp_path):
    changes = [
        LowRank("mid_block.attentions.0.proj_in", drawn(2, 5), drawn(6, 2), 1.5),
        LowRank("mid_block.attentions.0.attn1.to_q", drawn(2, 5), drawn(6, 2), 1.5),
        LowRank("down_blocks.0.resnets.0.conv1", drawn(3, 5, 3, 3), drawn(6, 3, 1, 1), 0.5),
    ]
    write_lora(tmp_path / "x.safetensors", changes, DIALECTS[dialect])
    found = read_lora(tmp_path / "x.safetensors").parts[NETWORK]
    flat = dialect == "lora_kohya"
    by_name = {change.layer: change for change in found}
    for change in changes:
        there = by_name[change.layer.replace(".", "_") if flat else change.layer]
        shape = (6, *change.down.shape[1:])
        np.testing.assert_allclose(there.change(shape), change.change(shape), rtol=1e-6, atol=1e-6)
        assert there.scale == (1.0 if dialect == "lora_old" else change.scale)
    header = read_safetensors_metadata(tmp_path / "x.safetensors")
    if dialect == "lora":
        settings = json.loads(header["lora_adapter_metadata"])
        assert (settings["unet.r"], settings["unet.lora_alpha"]) == (2, 3.0)
        assert settings["unet.rank_pattern"] == {changes[2].layer: 3}
        assert settings["unet.alpha_pattern"] == {changes[2].layer: 1.5}
