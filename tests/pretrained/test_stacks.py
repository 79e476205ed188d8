"""Layers of a file as one array: copied once, part by part, when they are used."""

import tracemalloc

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from diffjax.pretrained import stacks
from diffjax.pretrained.placing import placed_like
from diffjax.pretrained.stacks import Stack
from diffjax.pretrained.tensors import Tensor
from diffjax.pretrained.transforms import dense, merge, split, stack

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(), (7,), (7, 5), (5, 4, 3)])
@pytest.mark.parametrize("axes", ["as they lie", "transposed"])
def test_a_stack_has_the_numbers_of_its_layers_tile_by_tile(shape, axes, monkeypatch):
    monkeypatch.setattr(stacks, "_TILE", (2, 3))
    layers = [RNG.normal(size=shape).astype(np.float32) for _ in range(4)]
    if axes == "transposed":
        layers = [layer.T for layer in layers]
    found = Stack(layers.__getitem__, (4, *layers[0].shape), np.dtype(np.float32))
    np.testing.assert_array_equal(np.asarray(found), np.stack(layers))
    np.testing.assert_array_equal(found[1:3], np.stack(layers)[1:3])
    corner = slice(2, None), *[slice(1) for _ in shape]
    np.testing.assert_array_equal(found[corner], np.stack(layers)[corner])
    halves = np.asarray(found.astype(np.float16))
    np.testing.assert_array_equal(halves, np.stack(layers).astype(np.float16))
    assert halves.flags.c_contiguous


def test_a_fault_of_a_layer_is_that_of_the_stack():
    def layer(i):
        raise ValueError(f"layer {i} is damaged")

    with pytest.raises(ValueError, match="layer 0 is damaged"):
        Stack(layer, (2, 3), np.dtype(np.float32))[:]


def test_fused_and_split_matrices_are_stacked_as_separate_ones():
    parts = [RNG.normal(size=(4, 3)).astype(np.float32) for _ in range(6)]
    (joined,) = stack(merge(3, dense), 3).to_ours(tuple(parts))
    expected = [np.concatenate([part.T for part in parts[i : i + 3]], 1) for i in (0, 3)]
    np.testing.assert_array_equal(np.asarray(joined), np.stack(expected))
    for k, half in enumerate(stack(split(2, dense)).to_ours(tuple(parts))):
        expected = np.stack([part.T[:, 2 * k : 2 * k + 2] for part in parts])
        np.testing.assert_array_equal(np.asarray(half), expected)


def test_eight_devices_hold_a_part_each_and_no_layer_is_copied_as_a_whole():
    """Memory of NumPy at the peak is that of the parameter."""
    matrix = RNG.normal(size=(256, 512)).astype(np.float32)
    tensors = tuple(Tensor(matrix.shape, matrix.dtype, lambda: matrix) for _ in range(16))
    (found,) = stack(dense).to_ours(tensors)
    mesh = jax.make_mesh((8,), ("fsdp",))
    place = NamedSharding(mesh, P(None, "fsdp"))
    like = {"w": jax.ShapeDtypeStruct(found.shape, found.dtype, sharding=place)}
    tracemalloc.start()
    try:
        placed = placed_like(like)("w", found)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert {shard.data.shape for shard in placed.addressable_shards} == {(16, 64, 256)}
    assert peak_bytes < 1.1 * placed.nbytes
    np.testing.assert_array_equal(placed, np.stack([matrix.T] * 16))
