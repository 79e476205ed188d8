import dataclasses
import importlib.util
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffjax import config_files
from diffjax.conditions import of_classes
from diffjax.errors import UserError
from diffjax.models.layers.remat import REMAT
from diffjax.performance.hlo import counts, parser, products
from diffjax.performance.hlo.residuals import residual_bytes
from diffjax.performance.planning import compiled, search, tables, topologies
from diffjax.performance.planning.analytic import model_of
from diffjax.performance.planning.gpus import Absent, absent_mesh
from diffjax.performance.planning.lower_bounds import minimum_slow_bytes
from diffjax.performance.planning.page import write_page
from diffjax.performance.planning.roofline import estimate
from diffjax.reports import plan_figure
from diffjax.reports.run_page import write_report
from diffjax.spec import to_json
from diffjax.training.flops import matrix_flops
from diffjax.training.sharding import make_mesh
from experiments import plan
from experiments.flags import cli


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def compiled_module(function, *arguments, **options):
    return parser.parse(text_of(function, *arguments, **options))


def text_of(function, *arguments, **options):
    text = jax.jit(function, **options).lower(*arguments).compile().as_text()
    assert text
    return text


def chain(x, ws):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, ws)[0]


def nested(x, ws):
    return lax.fori_loop(0, 3, lambda i, h: chain(h, ws), x)


def images(x, w):
    return lax.conv_general_dilated(
        x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def strided(x, w):
    return lax.conv_general_dilated(
        x, w, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def grouped(x, w):
    return lax.conv_general_dilated(
        x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )


X, WS = array(16, 24), array(5, 24, 24)
PRODUCT = 2 * 16 * 24 * 24


@pytest.mark.parametrize(
    ("function", "arguments", "flops"),
    [
        (lambda x, w: jnp.tanh(x @ w) + 1, (X, array(24, 8)), 2 * 16 * 24 * 8),
        (chain, (X, WS), 5 * PRODUCT),
        (nested, (X, WS), 3 * 5 * PRODUCT),
        # Forward, and two products a layer backward; the first layer's input has no gradient.
        (jax.grad(lambda ws, x: jnp.sum(chain(x, ws))), (WS, X), 3 * 5 * PRODUCT),
        (
            lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k),
            (array(2, 7, 4, 16), array(2, 9, 4, 16)),
            2 * 2 * 4 * 7 * 9 * 16,
        ),
        (images, (array(2, 9, 9, 4), array(3, 3, 4, 6)), 2 * 2 * 49 * 6 * 9 * 4),
        (strided, (array(2, 9, 9, 4), array(3, 3, 4, 6)), 2 * 2 * 16 * 6 * 9 * 4),
        (grouped, (array(2, 9, 9, 4), array(3, 3, 2, 6)), 2 * 2 * 49 * 6 * 9 * 2),
    ],
    ids=["fused", "scan", "nested", "gradient", "batched", "convolution", "strided", "grouped"],
)
def test_matrix_flops_of_compiled_programs(function, arguments, flops):
    module = compiled_module(function, *arguments)
    assert products.compiled_matrix_flops(module) == flops
    assert module.unknown_loops == ()


def test_the_gradient_of_a_strided_convolution_costs_what_the_trace_says():
    def loss(x, w):
        return jnp.sum(jnp.sin(strided(x, w)))

    arguments = array(2, 9, 9, 4), array(3, 3, 4, 6)
    gradient = jax.grad(loss, (0, 1))
    counted = products.compiled_matrix_flops(compiled_module(gradient, *arguments))
    # The trace counts the padding of the transposed one as image; there, 9 x 9 of outputs meet
    # 3 x 3 of kernel, of which strides and edges leave 4 x 4 x 3 x 3 true products.
    assert counted == 3 * 2 * 2 * 16 * 6 * 9 * 4
    assert counted <= matrix_flops(gradient, *arguments)


def test_a_batched_product_written_as_a_dilated_convolution():
    # As TPUs have it: 16 products of [8, 32] and [32, 4], one for each place along a dimension.
    text = """HloModule m
ENTRY %main (a: f32[16,8,32], b: f32[16,32,4]) -> f32[16,8,4] {
  %a = f32[16,8,32]{2,1,0} parameter(0)
  %b = f32[16,32,4]{2,1,0} parameter(1)
  ROOT %c = f32[16,8,4]{2,1,0} convolution(%a, %b), window={size=16 stride=15 lhs_dilate=16}, \
dim_labels=0bf_0io->0bf
}
"""
    assert products.compiled_matrix_flops(parser.parse(text)) == 16 * 2 * 8 * 32 * 4


LIBRARY_CALLS = {
    # [2, 8, 32] and [2, 32, 4], batched: as cuBLAS is called.
    ("f32[2,8,4]", "f32[2,8,32]", "f32[2,32,4]"): (
        'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":'
        '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],'
        '"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"]}}}',
        2 * 2 * 8 * 32 * 4,
    ),
    # Softmax attention of 2 images, 16 tokens, 4 heads of width 8.
    ("bf16[2,4,16,8]", "bf16[2,16,4,8]", "bf16[2,16,4,8]"): (
        'custom_call_target="__cudnn$fmhaSoftmax"',
        2 * (2 * 2 * 4 * 16 * 16 * 8),
    ),
    ("bf16[2,4,16,8] ", "bf16[2,16,4,8]", "bf16[2,16,4,8]"): (
        'custom_call_target="__cudnn$fmhaSoftmaxBackward"',
        5 * (2 * 2 * 4 * 16 * 16 * 8),
    ),
    # A convolution 3x3 of 8x8 pixels, 3 to 5 channels, at stride 2, and its two gradients: each
    # of 4x4 outputs meets nine elements of the kernel but at the one edge that is padded.
    ("f32[2,4,4,5]", "f32[2,8,8,3]", "f32[5,3,3,3]"): ("convForward", 2 * 2 * 5 * 3 * 11 * 11),
    ("f32[2,8,8,3]", "f32[2,4,4,5]", "f32[5,3,3,3]"): ("convBackwardInput", 2 * 2 * 5 * 3 * 11**2),
    ("f32[5,3,3,3]", "f32[2,8,8,3]", "f32[2,4,4,5]"): ("convBackwardFilter", 2 * 2 * 5 * 3 * 11**2),
}


@pytest.mark.parametrize(("shapes", "call"), LIBRARY_CALLS.items(), ids=str)
def test_a_library_of_nvidias_is_counted_by_what_it_is_asked_for(shapes, call):
    (made, first, second), (attributes, flops) = shapes, call
    if attributes.startswith("conv"):
        attributes = (
            "window={size=3x3 stride=2x2 pad=1_0x1_0}, dim_labels=b01f_o01i->b01f, "
            f'custom_call_target="__cudnn${attributes}"'
        )
    text = f"""HloModule m
ENTRY %main (a: {first}, b: {second}) -> {made} {{
  %a = {first} parameter(0)
  %b = {second} parameter(1)
  ROOT %c = ({made}, u8[1048576]) custom-call(%a, %b), {attributes}
}}
"""
    module = parser.parse(text)
    assert products.compiled_matrix_flops(module) == flops
    arrays = [
        array for i in module.computations["main"].instructions.values() for array in i.arrays
    ]
    assert counts.memory_bytes(module) == sum(array.num_bytes for array in arrays[:3])


def test_a_kernel_that_speaks_over_several_lines_ends_no_computation():
    """Pallas's splash attention: two products forward, five in the one kernel of its gradient."""
    text = """HloModule m
ENTRY %main (q: bf16[2,6,256,64], k: bf16[2,6,128,64]) -> bf16[2,6,256,64] {
  %q = bf16[2,6,256,64]{3,2,1,0} parameter(0)
  %k = bf16[2,6,128,64]{3,2,1,0} parameter(1)
  %splash_mha_fwd_residuals.1 = (bf16[2,6,256,64]{3,2,1,0}) custom-call(%q, %k, %k), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256}"
}}, metadata={op_name="look"}
  %splash_mha_dkv_no_residuals.1 = (bf16[2,6,256,64]{3,2,1,0}) custom-call(%q, %k, %k), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="back"}
  ROOT %out = bf16[2,6,256,64]{3,2,1,0} get-tuple-element(%splash_mha_fwd_residuals.1), index=0
}
"""
    module = parser.parse(text)
    names = list(module.computations["main"].instructions)
    assert names[-1] == "out"
    assert 'op_name="look"' in module.computations["main"].instructions[names[2]].attributes
    assert products.compiled_matrix_flops(module) == (2 + 5) * 2 * (2 * 6 * 256 * 128 * 64)


def test_room_and_other_names_are_no_traffic():
    text = """HloModule m
ENTRY %main (a: f32[64], b: f32[64]) -> f32[128] {
  %a = f32[64]{0} parameter(0)
  %b = f32[64]{0} parameter(1)
  %room = f32[1000]{0} custom-call(), custom_call_target="AllocateBuffer"
  %both = f32[128]{0} custom-call(%a, %b), custom_call_target="ConcatBitcast"
  ROOT %negated = f32[128]{0} negate(%both)
}
"""
    assert counts.memory_bytes(parser.parse(text)) == 2 * 128 * 4


LOOP = """HloModule m
%body (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %p = (s32[]{:T(128)}, f32[4,4]{1,0}) parameter(0)
  %one = s32[] constant(STEP)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %copy = s32[] copy(%i)
  %sum = s32[] add(%copy, %one)
  %next = s32[] copy(%sum)
  %x = f32[4,4]{1,0} get-tuple-element(%p), index=1
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[4,4]{1,0}) tuple(%next, %y)
}
%condition (p.1: (s32[], f32[4,4])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[4,4]{1,0}) parameter(0)
  %limit = s32[] constant(LIMIT)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %less = pred[] compare(%i.1, %limit), direction=WAY
}
ENTRY %main (x.1: f32[4,4]) -> f32[4,4] {
  %x.1 = f32[4,4]{1,0} parameter(0)
  %start = s32[] constant(START)
  %init = (s32[], f32[4,4]{1,0}) tuple(%start, %x.1)
  %loop = (s32[], f32[4,4]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %end = f32[4,4]{1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
    ("start", "step", "limit", "way", "turns"),
    [
        (0, 1, 7, "LT", range(0, 7)),
        (2, 1, 7, "LE", range(2, 8)),
        (0, 3, 7, "LT", range(0, 7, 3)),
        (6, -1, 0, "GE", range(6, -1, -1)),
        (6, -2, 0, "GT", range(6, 0, -2)),
        (5, 1, 3, "LT", ()),
    ],
)
def test_turns_of_a_loop_follow_from_its_counter(start, step, limit, way, turns):
    text = LOOP.replace("START", str(start)).replace("STEP", str(step))
    text = text.replace("LIMIT", str(limit)).replace("WAY", way)
    module = parser.parse(text)
    assert module.executions["body"] == len(turns)
    assert products.compiled_matrix_flops(module) == len(turns) * 2 * 4**3


def test_a_loop_without_a_known_end_is_reported_and_takes_the_given_turns():
    def walk(x, steps):
        return lax.fori_loop(0, steps, lambda i, h: jnp.tanh(h @ h), x)

    text = text_of(walk, array(8, 8), array(dtype=jnp.int32))
    assert len(parser.parse(text).unknown_loops) == 1
    assert products.compiled_matrix_flops(parser.parse(text)) == 2 * 8**3
    assert products.compiled_matrix_flops(parser.parse(text, unknown_trips=9)) == 9 * 2 * 8**3


def mesh_of(shape, names):
    devices = np.asarray(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def placed(mesh, shape, *spec):
    return jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )


def test_collectives_in_a_loop_count_each_turn():
    mesh = mesh_of((4,), ("fsdp",))
    module = compiled_module(
        chain, placed(mesh, (16, 24), "fsdp"), placed(mesh, (5, 24, 24), None, "fsdp"),
        out_shardings=NamedSharding(mesh, PartitionSpec("fsdp")),
    )  # fmt: skip
    (gather,) = counts.collectives(module)
    assert (gather.kind, gather.devices, gather.count) == ("all-gather", 4, 5)
    assert gather.wire_bytes == 5 * 24 * 24 * 4 * 3 / 4
    assert products.compiled_matrix_flops(module) == 5 * PRODUCT / 4


def test_an_all_reduce_over_some_of_the_devices():
    mesh = mesh_of((2, 4), ("data", "tensor"))
    module = compiled_module(
        lambda x, w: x @ w, placed(mesh, (16, 24), "data", "tensor"),
        placed(mesh, (24, 8), "tensor"),
        out_shardings=NamedSharding(mesh, PartitionSpec("data")),
    )  # fmt: skip
    (reduce,) = counts.collectives(module)
    assert (reduce.kind, reduce.devices, reduce.count) == ("all-reduce", 4, 1)
    assert reduce.wire_bytes == 2 * (8 * 8 * 4) * 3 / 4


def test_a_reduce_scatter_made_of_permutes_in_a_loop():
    mesh = mesh_of((4,), ("x",))
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def scatter(parts):
        def turn(total, i):
            moved = lax.ppermute(total, "x", ring)
            return moved + lax.dynamic_index_in_dim(parts, i, keepdims=False), None

        return lax.scan(turn, parts[0], jnp.arange(3))[0]

    spread = jax.shard_map(
        scatter, mesh=mesh, in_specs=PartitionSpec(None, "x"), out_specs=PartitionSpec("x")
    )
    module = compiled_module(spread, placed(mesh, (4, 32), None, "x"))
    (permute,) = counts.collectives(module)
    assert (permute.kind, permute.devices, permute.count) == ("collective-permute", 4, 3)
    assert permute.wire_bytes == 3 * 8 * 4


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", 2),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", 8),
    ],
)
def test_groups_of_devices_in_every_notation(groups, devices):
    text = f"""HloModule m
ENTRY %main (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} all-reduce(%a), channel_id=1, {groups}, to_apply=%add
}}
"""
    (reduce,) = counts.collectives(parser.parse(text))
    assert reduce.devices == devices
    assert reduce.wire_bytes == 2 * 32 * (devices - 1) / devices


def test_an_exchange_that_spans_fusions_counts_once():
    gather = (
        "%g{0} = f32[4,8]{{1,0}} all-gather(%p{0}), channel_id=8, replica_groups=[1,4]<=[4], "
        "dimensions={{0}}"
    )
    text = f"""HloModule m
%begin (p1: f32[1,8]) -> (f32[1,8], f32[4,8]) {{
  %p1 = f32[1,8]{{1,0}} parameter(0)
  {gather.format(1)}
  ROOT %s = (f32[1,8]{{1,0}}, f32[4,8]{{1,0}}) custom-call(%g1), \
custom_call_target="AsyncCollectiveStart"
}}
%finish (p2: f32[1,8]) -> f32[4,8] {{
  %p2 = f32[1,8]{{1,0}} parameter(0)
  {gather.format(2)}
  ROOT %d = f32[4,8]{{1,0}} custom-call(%p2, %g2), custom_call_target="AsyncCollectiveDone"
}}
ENTRY %main (a: f32[1,8]) -> f32[4,8] {{
  %a = f32[1,8]{{1,0}} parameter(0)
  %start = (f32[1,8]{{1,0}}, f32[4,8]{{1,0}}) fusion(%a), kind=kCustom, calls=%begin
  %part = f32[1,8]{{1,0}} get-tuple-element(%start), index=0
  ROOT %done = f32[4,8]{{1,0}} fusion(%part), kind=kCustom, calls=%finish
}}
"""
    (found,) = counts.collectives(parser.parse(text))
    assert (found.count, found.wire_bytes) == (1, 4 * 8 * 4 * 3 / 4)


def test_a_slice_of_a_stack_is_read_and_not_the_stack():
    module = compiled_module(lambda ws, i: ws[i] * 2.0, array(100, 64, 64), array(dtype=jnp.int32))
    moved = counts.memory_bytes(module)
    assert 2 * 64 * 64 * 4 <= moved < 3 * 64 * 64 * 4


def test_a_whole_stack_in_memory_is_found():
    mesh = mesh_of((4,), ("fsdp",))
    stack, x = placed(mesh, (5, 24, 24), None, "fsdp"), placed(mesh, (16, 24), "fsdp")
    whole = NamedSharding(mesh, PartitionSpec())
    out = NamedSharding(mesh, PartitionSpec("fsdp"))

    def at_once(x, ws):
        return chain(x, lax.with_sharding_constraint(ws * 2.0, whole))

    assert (
        counts.whole_stacks(compiled_module(chain, x, stack, out_shardings=out), [WS.shape]) == []
    )
    found = counts.whole_stacks(compiled_module(at_once, x, stack, out_shardings=out), [WS.shape])
    assert found[0].num_bytes == 5 * 24 * 24 * 4


@pytest.mark.parametrize("chip", topologies.CHIPS.values(), ids=lambda chip: chip.name)
def test_chips_are_what_chips_can_be(chip):
    if chip.name.startswith("rtx"):  # cards of desktops
        assert 1e13 < chip.flops < 1e15
        assert 4 * 2**30 < chip.memory_bytes < 64 * 2**30
    else:
        assert 1e14 < chip.flops < 1e16
        assert 10 * 2**30 < chip.memory_bytes < 300 * 2**30
    # A multiply-add needs hundreds of FLOPs a byte on all of them; links are slower than memory.
    assert 50 < chip.flops / chip.memory_bytes_per_second < 1_000
    assert chip.link_bytes_per_second < chip.memory_bytes_per_second
    sizes = [topology.num_chips for topology in topologies.slices(chip)]
    assert sizes == sorted(sizes)


def tiny(**values):
    config = config_files.load("configs/imagenet256.py:model=DiT-S/2")
    config.model.update(hidden_size=64, depth=2, num_heads=2, dtype="float32", patch_size=4)
    config.expected.image_shape = (8, 8, 4)
    config.batch_size = 16
    return search.changed(config, **values)


def needs_here(config):
    topology = topologies.topology_called("v5e:2x4")
    mesh = make_mesh(**config.mesh, devices=jax.devices())
    return compiled.needs_on(config, mesh, topology)


@pytest.fixture(scope="module")
def planned():
    config = tiny()
    return config, needs_here(config)


def test_the_step_executes_the_models_operations_and_no_more(planned):
    _, needs = planned
    assert needs.flops == pytest.approx(needs.model_flops, rel=1e-6)
    assert needs.unknown_loops == ()
    assert needs.compiled
    assert needs.fits


def test_state_is_parameters_moments_and_average(planned):
    config, needs = planned
    mesh, memory = config.mesh, needs.memory
    assert needs.mesh["fsdp"] == 8
    assert mesh.fsdp == -1
    assert memory["averages"] == memory["parameters"]
    # Adam's moments, and its two counters.
    assert memory["optimizer"] == 2 * memory["parameters"] + 8
    assert needs.num_params * 16 / 8 <= needs.state_bytes < needs.num_params * 16
    assert sum(memory.values()) == needs.peak_bytes


def test_traffic_is_near_that_of_gathered_parameters(planned):
    # Of the table of classes, which that counts as a whole, only rows need to be fetched.
    _, needs = planned
    assert 0.5 * needs.minimum_wire_bytes < needs.wire_bytes < 3 * needs.minimum_wire_bytes


def test_the_least_traffic_of_parameters_all_split_over_all_devices():
    setup = compiled.set_up(tiny(), (8, 8, 4), of_classes(1_000), make_mesh(data=1, fsdp=8))
    leaves = jax.tree.leaves(setup.abstract.params)
    split = sum(leaf.size for leaf in leaves if "fsdp" in str(leaf.sharding.spec))
    kept = sum(leaf.size for leaf in leaves) - split
    least = compiled.minimum_wire_bytes(setup, "training")
    # Three passes over what is split, and an all-reduce of the gradient of what is not.
    assert least == pytest.approx(4 * (3 * split + 2 * kept) * 7 / 8)


@pytest.mark.thorough
def test_the_analytic_model_agrees_where_both_are_exact(planned):
    config, needs = planned
    model = model_of(config, topologies.topology_called("v5e:2x4"))
    assert not model.compiled
    for kind in ("parameters", "optimizer", "averages", "batch"):
        assert model.memory[kind] == needs.memory[kind]
    assert model.model_flops == needs.model_flops == model.flops
    assert model.minimum_wire_bytes == needs.minimum_wire_bytes
    # A linear model of the batch, in what is kept for the backward pass.
    twice = model_of(tiny(batch_size=32), topologies.topology_called("v5e:2x4"))
    assert twice.memory["activations"] == pytest.approx(2 * model.memory["activations"], rel=0.05)


@pytest.mark.thorough
def test_sampling_is_planned_for_all_its_steps():
    config = tiny(sampling__num_steps=5, mesh__data=8, mesh__fsdp=1)
    mesh = make_mesh(**config.mesh, devices=jax.devices())
    needs = compiled.needs_on(config, mesh, topologies.topology_called("v5e:2x4"), "sampling")
    assert needs.flops == pytest.approx(needs.model_flops, rel=1e-6)


def fake(batch, *, peak, fits=True, flops=1e12):
    return compiled.Needs(
        "training", "v5e:2x2", {"data": 1, "fsdp": 4, "tensor": 1}, batch, 1, True, fits,
        {"parameters": 2**30, "temporaries": peak - 2**30}, peak, flops, flops, (), 0.0, None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("per_image", "first"), [(2**24, 256), (2**24, 8), (2**27, 256), (2**24, 2048)]
)
def test_the_largest_batch_is_found(per_image, first):
    topology = topologies.topology_called("v5e:2x2")
    usable = topology.usable_bytes

    def plan_of(config):
        peak = 2**30 + config.batch_size * per_image
        return fake(config.batch_size, peak=peak, fits=peak <= usable)

    tried = list(search.largest_batch(tiny(batch_size=first), topology, plan_of))
    found = max(needs.batch_size for _, needs in tried if needs.fits)
    assert found == (usable - 2**30) // per_image // 4 * 4
    assert len(tried) <= 6


@pytest.mark.thorough(tenth=False)
def test_a_search_tries_every_way_of_what_it_varies():
    topology = topologies.topology_called("v5e:2x4")
    everything = [label for label, _ in search.candidate_plans(tiny(), topology)]
    assert len(set(everything)) == len(everything) == 4 * len(REMAT) * 2
    assert sum("tensor=2" in label for label in everything) == len(REMAT) * 2
    some = dict(search.candidate_plans(tiny(), topology, ("remat",)))
    assert [config.model.remat for config in some.values()] == list(REMAT)
    assert {config.mesh.fsdp for config in some.values()} == {8}
    for _, config in search.candidate_plans(tiny(), topology, ("mesh",)):
        compiled.set_up_on(config, absent_mesh(config, topology))  # none is refused


def test_the_best_of_a_search_fits_and_is_fast():
    slow, small = fake(8, peak=2**31, flops=2e12), fake(8, peak=2**31)
    large, none = fake(8, peak=2**33), fake(8, peak=2**35, fits=False, flops=1e9)
    rows = [(str(n), tiny(), needs) for n, needs in enumerate((slow, large, small, none))]
    best = search.best(rows)
    assert best is not None
    assert best[2] is small
    assert search.best(rows[3:]) is None


def test_what_does_not_fit_says_what_would():
    line = search.what_would_fit(tiny(), fake(256, peak=2**35, fits=False))
    (batch,) = map(int, re.findall(r"batch_size=(\d+)", line))
    assert 2**30 + batch * (2**35 - 2**30) / 256 <= topologies.USABLE["tpu"] * 2**34
    assert "--topology=v5e:4x4" in line
    assert line.count("\n") == 0


def test_a_bound_is_the_longest_part(planned):
    _, needs = planned
    topology = topologies.topology_called("v5e:2x4")
    slow = dataclasses.replace(needs, memory_traffic_bytes=819e9 * 7)
    found = estimate(slow, topology)
    assert (found.bound_by, found.seconds) == ("memory", pytest.approx(7.0))


def test_text_and_page_say_the_same(planned, tmp_path):
    config, needs = planned
    rows = [("v5e:2x4", config, needs), ("again", config, dataclasses.replace(needs, fits=False))]
    text = tables.details(config, needs) + tables.plan_summary(rows)
    write_page(tmp_path / "plan.html", "tiny", rows, rows[0], "python -m experiments.plan")
    page = (tmp_path / "plan.html").read_text()
    for kind, size, share in tables.memory_rows(needs, tables.derived(config, needs)):
        assert f"<td>{kind}</td><td>{size}</td><td>{share}</td>" in page
        assert size in text
    assert page.count("<svg") == 1  # No curve of one number of chips.
    assert "http" not in re.sub(r"http://www.w3.org\S*", "", page)
    assert json.loads(json.dumps(tables.plans_as_json(rows, rows[0])))["best"] == "v5e:2x4"


def test_a_plan_that_does_not_fit_is_drawn_like_the_others():
    refused = {"parameters": 2**30, "temporaries": 2**34}
    fits = {"parameters": 2**30, "activations": 2**31, "temporaries": 2**31}
    figure = plan_figure.bars([("a", refused, False), ("b", fits, True)], 15.75)
    bars = re.findall(r'fill="([^"]*)"><title>(\w+)', figure)
    assert len({colour for colour, kind in bars if kind == "temporaries"}) == 1
    assert len({colour for colour, _ in bars}) == 3
    # The total of the longest bar stands on the page, behind the bar.
    (at,) = map(float, re.findall(r'<text x="([\d.]+)"[^>]*>17.00 too much<', figure))
    assert at + 100 < plan_figure.WIDTH


def test_markup_is_only_text_on_the_page(planned, tmp_path):
    attack = '<script>alert("x")</script>'
    rows = [(f"{place}{attack}", *planned) for place in ("one", "other")]
    write_page(tmp_path / "plan.html", f"name{attack}", rows, None, f"command{attack}")
    page = (tmp_path / "plan.html").read_text()
    assert "<script" not in page
    for place in ("one", "other", "name", "command"):
        assert f"{place}&lt;script&gt;" in page


CONFIG = "--config=configs/imagenet256.py:model=DiT-S/8"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--topology"]),
        (["--topology=v5e:4x5"], ["4x4", "2x2"]),
        (["--topology=v9:4x4"], ["v9", "v5e"]),
        (["--topology=h100:8", "--config.mesh.fsdp=3"], ["fsdp=3", "8"]),
        (["--topology=h100:8", "--config.batch_size=100"], ["96", "104"]),
        (["--topology=h100:8", "--json=nowhere/plan.json"], ["nowhere"]),
        pytest.param(
            ["--topology=h100:1", "--config.batch_size=4096", "--config.model.patch_size=1"],
            ["batch_size=", "h100:", "GiB"], marks=pytest.mark.thorough),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_with_what_would_do(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_set_up_logging", lambda: None)
    monkeypatch.setattr(cli, "_keep_compiled_programs", lambda: None)
    status = cli.run(plan.main, plan.FLAGS, usage="", argv=[CONFIG, *arguments])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 2
    assert len(error) == 1
    assert all(word in error[0] for word in words), error


def test_a_config_that_expects_nothing_and_has_no_data_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_set_up_logging", lambda: None)
    monkeypatch.setattr(cli, "_keep_compiled_programs", lambda: None)
    arguments = ["--config=configs/image_folder.py", "--config.data.path=nowhere"]
    arguments += ["--topology=h100:8"]
    assert cli.run(plan.main, plan.FLAGS, usage="", argv=arguments) == 2
    assert "no folder nowhere" in capsys.readouterr().err


def planner(monkeypatch, capsys, *common):
    """Runs the program with common flags, and returns its status and its output."""
    monkeypatch.setattr(cli, "_set_up_logging", lambda: None)
    monkeypatch.setattr(cli, "_keep_compiled_programs", lambda: None)

    def run(*arguments):
        argv = [CONFIG, *common, *arguments]
        status = cli.run(plan.main, plan.FLAGS, usage="", argv=argv)
        return status, capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def models():
    """Analytic models that tests share: by config, machine and program."""
    return {}


@pytest.fixture
def run_plan(models, monkeypatch, capsys):
    def modelled(config, topology, program):
        key = to_json(config), topology.name, program
        if key not in models:
            models[key] = model_of(config, topology, program)
        return models[key]

    monkeypatch.setattr(plan, "model_of", modelled)
    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    small = ["--config.model.depth=1", "--config.model.scan=False", "--config.mesh.data=1"]
    return planner(monkeypatch, capsys, *small)


def test_a_plan_without_a_compiler_says_that_it_is_a_model(run_plan, tmp_path):
    files = [f"--json={tmp_path / 'p.json'}", f"--page={tmp_path / 'p.html'}"]
    status, said = run_plan("--topology=h100:4,h100:8", *files)
    assert status == 0
    assert "ANALYTIC MODEL" in said.out
    four, eight = json.loads((tmp_path / "p.json").read_text())["plans"]
    assert four["flops"] == 2 * eight["flops"]
    assert "links between slices" not in four["derived"]["seconds_by_part"]
    assert (tmp_path / "p.html").read_text().count("<svg") == 2


def test_the_largest_batch_is_said(run_plan, monkeypatch):
    usable = topologies.topology_called("h100:1").usable_bytes

    def model(config, topology, program):
        peak = 2**30 + config.batch_size * 2**24
        needs = fake(config.batch_size, peak=peak, fits=peak <= usable)
        return dataclasses.replace(needs, topology=topology.name, program=program)

    monkeypatch.setattr(plan, "model_of", model)
    status, said = run_plan("--topology=h100:1", "--largest_batch", "--config.batch_size=1024")
    assert status == 0
    (last,) = re.findall(r"largest batch that fits: (\d+)", said.out)
    rows = [line for line in said.out.splitlines() if re.match(r"\| batch \d", line)]
    fitting = [int(line.split()[2]) for line in rows if "too much" not in line]
    assert int(last) == max(fitting) == (usable - 2**30) // 2**24
    assert len(fitting) < len(rows)
    assert f"batch {last}, on h100:1" in said.out  # which is shown in full


def test_a_search_over_one_thing(run_plan, monkeypatch):
    flops = {name: 1e12 * abs(i - 1.1) for i, name in enumerate(REMAT)}

    def model(config, topology, program):
        del topology, program
        return fake(8, peak=2**31, flops=flops[config.model.remat])

    monkeypatch.setattr(plan, "model_of", model)
    status, said = run_plan("--topology=h100:8", "--search", "--search_over=remat")
    assert status == 0
    found = re.findall(r"^\| data=1 fsdp=8 remat=(\w+)", said.out, re.MULTILINE)
    assert found == list(REMAT)
    assert f"best: data=1 fsdp=8 remat={list(REMAT)[1]}" in said.out


def test_sampling_and_a_model_for_tpus(run_plan):
    status, said = run_plan("--topology=v5e:2x2", "--sampling", "--analytic")
    assert status == 0
    assert ", sampling: " in said.out
    assert "ANALYTIC MODEL" in said.out


def test_parts_of_a_batch_that_training_would_refuse(run_plan):
    status, said = run_plan("--topology=h100:8", "--config.accumulation_steps=3")
    assert status == 2
    assert "does not divide into accumulation_steps=3 equal parts" in said.err


def across_slices(num_bytes, chips, slices):
    """Bytes that a chip receives from other slices: all of a gradient and of the parameters, of so
    many bytes each and split over a slice's chips, cross once a step.
    """
    return 2 * num_bytes * (slices - 1) / slices / (chips / slices)


@pytest.mark.parametrize(
    ("name", "chips", "slices"), [("h100:2x8", 16, 2), ("2xv5e:2x2", 8, 2), ("h100:8", 8, 1)]
)
def test_groups_of_one_machine_send_the_least_over_slow_links(name, chips, slices):
    topology, config = topologies.topology_called(name), tiny(mesh__data=-1, mesh__fsdp=-1)
    setup = compiled.set_up_on(config, absent_mesh(config, topology))
    assert setup.mesh.shape["data"] == slices
    expected = across_slices(4 * setup.wired.num_params, chips, slices)  # float32
    assert minimum_slow_bytes(setup, topology.num_slices) == pytest.approx(expected)


@pytest.mark.thorough
def test_slow_links_have_a_part_of_their_own_in_a_plan(run_plan, tmp_path):
    file = tmp_path / "p.json"
    free = ["--config.mesh.data=-1", "--config.mesh.fsdp=-1"]
    status, _ = run_plan("--topology=2xv5e:2x2", "--analytic", *free, f"--json={file}")
    assert status == 0
    (found,) = json.loads(file.read_text())["plans"]
    assert found["topology"] == "2xv5e:2x2"
    assert found["mesh"]["data"] == 2
    crossing = sum(one["slow_bytes"] for one in found["collectives"])
    assert crossing == pytest.approx(across_slices(2 * found["num_params"], 8, 2))  # bfloat16
    assert "links between slices" in found["derived"]["seconds_by_part"]


def test_a_plan_is_in_the_runs_report(run_plan, tmp_path):
    status, _ = run_plan("--topology=h100:4,h100:8", f"--workdir={tmp_path}")
    assert status == 0
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Planned</h2>" in page
    assert "h100:8: training, batch 256, by an analytic model" in page
    contents = json.loads((tmp_path / "plan.json").read_text())
    contents["plans"][0]["label"] = contents["plans"][0]["topology"] = "<b>bold</b>"
    (tmp_path / "plan.json").write_text(json.dumps(contents))
    page = write_report(tmp_path).read_text()
    assert "<b>bold" not in page
    assert page.count("&lt;b&gt;bold") == 2
    (tmp_path / "plan.json").write_text('{"plans": 3}')
    with pytest.raises(UserError, match="is not what a run writes"):
        write_report(tmp_path)


def test_a_group_across_slices_receives_over_slow_links():
    text = """HloModule m
ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %r = f32[8]{0} all-reduce(%a), channel_id=1, replica_groups=GROUPS, to_apply=%add
}
"""
    for groups, slow in (
        ("[1,8]<=[8]", 2 * 32 * (1 / 2) / 4),  # a slice's four devices share what crosses
        ("[2,4]<=[8]", 0.0),
        ("[4,2]<=[2,4]T(1,0)", 2 * 32 * 1 / 2),
    ):
        (found,) = counts.collectives(parser.parse(text.replace("GROUPS", groups)), slice_size=4)
        assert found.slow_bytes == slow


@pytest.mark.parametrize(
    ("transfer", "target", "kind", "slow"),
    [
        ("ALL_GATHER", '"{1,2,3,4}x{0:15}"', "all-gather", 64 * 3 / 4),
        ("ALL_REDUCE", '"{1,2}x{0:15}"', "all-reduce", 64),
        ("ONE_TO_ONE", "{{100001->200000},{200000->100001}}", "collective-permute", 64),
    ],
)
def test_what_tpu_slices_send_each_other_goes_through_hosts(transfer, target, kind, slow):
    text = f"""HloModule m
ENTRY %main (a: f32[16]) -> f32[16] {{
  %token = token[] after-all()
  %recv = (f32[16]{{0}}, u32[], token[]) recv(%token), channel_id=2, is_host_transfer=true, \
frontend_attributes={{_xla_megascale_target={target},_xla_megascale_transfer_type="{transfer}"}}
  %done = (f32[16]{{0}}, token[]) recv-done(%recv), channel_id=2, is_host_transfer=true, \
frontend_attributes={{_xla_megascale_transfer_type="{transfer}"}}
  ROOT %r = f32[16]{{0}} get-tuple-element(%done), index=0
}}
"""
    (found,) = counts.collectives(parser.parse(text), slice_size=16)
    assert (found.kind, found.count, found.wire_bytes, found.slow_bytes) == (kind, 1, slow, slow)


def test_what_is_kept_for_the_gradient_is_the_loops_activations():
    gradient = jax.grad(lambda ws, x: jnp.sum(chain(x, ws)))
    kept = residual_bytes(compiled_module(gradient, WS, array(4096, 24)))
    # Each of five layers keeps some of its input, its tanh and that one's derivative; weights, in
    # whatever order they are read, are small beside that.
    assert 4 * 4096 * 24 * 4 <= kept <= 3.1 * 5 * 4096 * 24 * 4
    assert residual_bytes(compiled_module(chain, X, WS)) == 0


@pytest.mark.thorough
def test_less_is_kept_where_more_is_computed_twice(planned):
    _, none = planned
    full = needs_here(tiny(model__remat="full"))
    assert 0 < full.memory["activations"] < 0.5 * none.memory["activations"]


@pytest.mark.thorough(tenth=False)
def test_a_batch_in_parts_gathers_for_each(planned):
    config, whole = planned
    mesh = make_mesh(**config.mesh, devices=jax.devices())
    setup = compiled.set_up_on(search.changed(config, accumulation_steps=2), mesh)
    parts = compiled.minimum_wire_bytes(setup, "training")
    assert whole.minimum_wire_bytes < parts <= 2 * whole.minimum_wire_bytes


def test_a_loop_of_its_own_turns_as_often_as_said_and_an_inner_one_once():
    def walk(x, steps):
        def turn(_, h):
            return lax.fori_loop(0, h[0, 0].astype(jnp.int32), lambda _, g: jnp.tanh(g @ g), h) @ h

        return lax.fori_loop(0, steps, turn, x)

    module = parser.parse(text_of(walk, array(8, 8), array(dtype=jnp.int32)), unknown_trips=9)
    assert products.compiled_matrix_flops(module) == 9 * 2 * 2 * 8**3
    assert len(module.unknown_loops) == 1


@pytest.mark.thorough(tenth=False)
def test_stacks_are_those_of_blocks_biases_too_and_no_kernels_of_convolutions():
    mesh = make_mesh(data=1, fsdp=8)
    stacks = compiled.stacked_shapes(compiled.set_up_on(tiny(), mesh))
    assert (2, 64, 192) in stacks
    assert (2, 192) in stacks
    unet = config_files.load("configs/digits.py:model=unet")
    unet.expected = {"image_shape": (8, 8, 1), "num_classes": 10}
    unet.model.update(num_res_blocks=1, channel_multipliers=(1, 2))
    assert compiled.stacked_shapes(compiled.set_up_on(unet, mesh)) == []


@pytest.mark.parametrize("chips", [16, pytest.param(128, marks=pytest.mark.thorough(tenth=False))])
def test_the_state_is_spread_over_all_chips_to_the_last_byte(chips):
    """16 bytes a parameter, of the network that the issue plans; on 256, one table of 1,001 rows
    and some biases have no sixteenth part of a sixteenth.
    """
    config = config_files.load("configs/imagenet256.py:model=DiT-XL/2")
    devices = [Absent(i, "tpu") for i in range(chips)]
    setup = compiled.set_up(
        config, (32, 32, 4), of_classes(1_000), make_mesh(**config.mesh, devices=devices)
    )
    state = compiled.state_memory(setup, "training")
    held = state["parameters"] + state["optimizer"] + state["averages"] - 8
    assert held == pytest.approx(16 * setup.wired.num_params / chips, rel=2e-4 * chips / 16 + 1e-6)


def libtpu_folder():
    """Where libtpu is: a folder in the environment, or installed."""
    return os.environ.get("DIFFJAX_LIBTPU", "")


needs_libtpu = pytest.mark.skipif(
    not libtpu_folder() and importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu: pip install 'diffjax[plan]', or DIFFJAX_LIBTPU=FOLDER",
)


@needs_libtpu
@pytest.mark.process
def test_a_step_compiled_for_a_tpu_that_is_not_there():
    config = tiny(mesh__fsdp=4, model__dtype="bfloat16", model__depth=2)
    topology = topologies.topology_called("v5e:2x2")
    needs = plan.in_own_process(config, topology, "training", libtpu_folder() or None)
    assert needs.compiled
    assert needs.fits
    assert needs.unknown_loops == ()
    assert needs.flops == pytest.approx(needs.model_flops, rel=1e-3)
    assert needs.memory["averages"] == needs.memory["parameters"] == 4 * needs.num_params / 4
    assert needs.wire_bytes > 0


@needs_libtpu
@pytest.mark.process
def test_the_plan_of_xl_on_sixteen_chips():
    """What the project promises of it, by its own config."""
    config = config_files.load("configs/imagenet256.py:model=DiT-XL/2")
    topology = topologies.topology_called("v5e:4x4")
    needs = plan.in_own_process(config, topology, "training", libtpu_folder() or None)
    assert needs.flops <= 1.001 * needs.model_flops
    assert needs.state_bytes == pytest.approx(16 * needs.num_params / 16, rel=1e-3)
    assert needs.peak_bytes < 10 * 2**30
    assert needs.wire_bytes <= 1.1 * needs.minimum_wire_bytes
    assert needs.whole_stacks == needs.unknown_loops == ()
    assert 0 < needs.memory["activations"] < needs.peak_bytes


@needs_libtpu
@pytest.mark.process
def test_two_slices_exchange_gradients_over_their_slow_links():
    config = config_files.load("configs/imagenet256.py:model=DiT-S/2")
    config.model.depth = 2
    topology = topologies.topology_called("2xv5e:2x2")
    needs = plan.in_own_process(config, topology, "training", libtpu_folder() or None)
    # Two slices add up a chip's part of the gradients, in either type, and gather half of its part.
    part = needs.num_params / topology.slice_size
    assert 2 * part < needs.slow_bytes < 8 * part
    assert needs.slow_bytes < needs.wire_bytes


def cuda_folder():
    """Where XLA for CUDA is: a folder in the environment, or installed."""
    return os.environ.get("DIFFJAX_CUDA", "")


needs_cuda = pytest.mark.skipif(
    not cuda_folder() and importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs XLA for CUDA: docs/planning.md says how to get it; or DIFFJAX_CUDA=FOLDER",
)


@needs_cuda
@pytest.mark.process
@pytest.mark.parametrize(
    ("topology", "mesh"),
    [("h100:4", {"data": 1, "fsdp": 4}), ("a100:2x8", {"data": 2, "fsdp": 8})],
)
def test_a_step_compiled_for_gpus_that_are_not_there(topology, mesh):
    config = config_files.load("configs/imagenet256.py:model=DiT-S/2")
    config.batch_size = 64
    config.mesh.update(mesh)
    config.model.update(depth=2, attention="xla")
    topology = topologies.topology_called(topology)
    needs = plan.in_own_process(config, topology, "training", cuda_folder() or None)
    assert needs.compiled
    assert needs.fits
    assert needs.unknown_loops == ()
    assert needs.flops == pytest.approx(needs.model_flops, rel=1e-3)
    assert needs.state_bytes == pytest.approx(16 * needs.num_params / topology.num_chips, rel=0.01)
    assert needs.wire_bytes > 0
    assert (needs.slow_bytes > 0) == (topology.num_slices > 1)
