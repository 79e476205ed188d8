import dataclasses
import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import scipy.stats  # noqa: F401  first, since it asks after torch, which tests here take away
from jax.sharding import PartitionSpec

from diffjax import choices, config_files
from diffjax.conditions import of_classes
from diffjax.errors import UserError
from diffjax.loop.compiled_step import train_flops
from diffjax.models import DiT, dit
from diffjax.models.layers.attention import attention
from diffjax.performance import throughput
from diffjax.performance.throughput import (
    Measured,
    Scaled,
    compiling,
    measure_scaled,
    measure_throughput,
    set_up_on_devices,
)
from diffjax.runs.setup import set_up
from diffjax.spec import spec
from diffjax.training.flops import matrix_flops
from experiments import benchmark
from experiments.benchmark import against_torch, cases, checks, tables
from experiments.flags import cli
from tests.support.one_process import Here
from tests.support.tiny_network import Plain
from tests.support.tiny_run import one_device


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def gradient(function, *arguments):
    """The function with all its gradients, as training runs it."""
    scalar = lambda *args: jnp.sum(jnp.sin(function(*args)))  # noqa: E731
    return jax.value_and_grad(scalar, tuple(range(len(arguments))))


def dense(x, w):
    return x @ w


X, W, SQUARE = array(8, 3), array(3, 5), array(5, 5)
PRODUCT = 2 * 8 * 3 * 5


def test_a_dense_layer_costs_two_operations_a_weight_and_its_gradient_three_times_that():
    assert matrix_flops(dense, X, W) == PRODUCT
    assert matrix_flops(gradient(dense, X, W), X, W) == 3 * PRODUCT


def test_a_batched_product():
    flops = matrix_flops(
        lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k), *[array(2, 7, 4, 16)] * 2
    )
    assert flops == 2 * 2 * 4 * 7 * 7 * 16


def test_element_wise_work_is_free():
    assert matrix_flops(lambda x: jax.nn.softmax(jnp.exp(x) + x), X) == 0


@pytest.mark.parametrize("implementation", ["xla", "batched"])
def test_attention_is_two_products_of_tokens_by_tokens(implementation):
    q = array(2, 16, 4, 8)
    flops = matrix_flops(lambda q: attention(q, q, q, implementation), q)
    assert flops == 2 * (2 * 2 * 4 * 16 * 16 * 8)


def convolution(stride=1, groups=1, padding="SAME"):
    return lambda x, w: jax.lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("stride", "groups", "padding", "outputs"),
    [(1, 1, "SAME", 8), (1, 1, "VALID", 6), (2, 1, "SAME", 4), (1, 2, "SAME", 8)],
)
def test_a_convolution_counts_its_outputs(stride, groups, padding, outputs):
    x, w = array(2, 8, 8, 4), array(3, 3, 4 // groups, 6)
    function = convolution(stride, groups, padding)
    once = 2 * (2 * outputs**2 * 6) * 9 * (4 // groups)
    assert matrix_flops(function, x, w) == once
    if padding == "SAME":
        assert matrix_flops(gradient(function, x, w), x, w) == 3 * once


def test_loops_count_as_often_as_they_turn():
    def loop(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]

    x = array(8, 5)
    assert matrix_flops(loop, x, SQUARE) == 7 * 2 * 8 * 5 * 5
    assert matrix_flops(gradient(loop, x, SQUARE), x, SQUARE) == 3 * 7 * 2 * 8 * 5 * 5
    nested = lambda x, w: jax.lax.fori_loop(0, 3, lambda _, x: loop(x, w), x)  # noqa: E731
    assert matrix_flops(nested, x, SQUARE) == 3 * 7 * 2 * 8 * 5 * 5


def test_a_while_loop_is_refused_only_where_it_multiplies_matrices():
    def until(step):
        return lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) < 10, step, x)

    assert matrix_flops(until(lambda x: 2 * x), array(5, 5)) == 0
    with pytest.raises(UserError, match=r"while_loop .*250 operations a turn"):
        matrix_flops(until(lambda x: x @ x), array(5, 5))


def test_a_branch_counts_as_the_dearest():
    def branch(i, x):
        return jax.lax.switch(i, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)

    assert matrix_flops(branch, 0, SQUARE) == 2 * (2 * 5**3)


def test_recomputation_counts():
    function = jax.checkpoint(lambda x, w: jnp.sin(x @ w))
    plain = matrix_flops(gradient(lambda x, w: jnp.sin(x @ w), X, W), X, W)
    assert (plain, matrix_flops(gradient(function, X, W), X, W)) == (3 * PRODUCT, 4 * PRODUCT)


def test_functions_within_functions():
    relu_like = jax.custom_jvp(dense)
    relu_like.defjvp(lambda primals, tangents: (dense(*primals), dense(tangents[0], primals[1])))
    own_gradient = jax.custom_vjp(dense)
    own_gradient.defvjp(lambda x, w: (x @ w, w), lambda w, g: (g @ w.T, jnp.zeros_like(w)))
    assert matrix_flops(jax.jit(jax.jit(dense)), X, W) == PRODUCT
    assert matrix_flops(relu_like, X, W) == matrix_flops(own_gradient, X, W) == PRODUCT
    assert matrix_flops(gradient(own_gradient, X, W), X, W) == 2 * PRODUCT
    assert matrix_flops(jax.vmap(dense, (0, None)), array(4, 8, 3), W) == 4 * PRODUCT


@pytest.mark.thorough
def test_a_kernel_of_attention_costs_what_its_matrix_products_do():
    counts = []
    for kind in ("xla", "splash"):
        config = toy_config()
        config.model.update(attention=kind, patch_size=1)
        counts.append(
            train_flops(set_up(config, (16, 8, 1), of_classes(10)))
        )  # 128 tokens for splash
    assert counts[0] is not None
    assert counts[0] == counts[1]


def test_every_device_of_a_shard_map_counts():
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    split, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(dense, mesh=mesh, in_specs=(split, whole), out_specs=split)
    assert matrix_flops(sharded, X, W) == PRODUCT


def test_a_kernel_that_no_trace_shows_is_refused():
    def kernel(x):
        return jax.ffi.ffi_call("someone_elses_matmul", SQUARE)(x, x)

    with pytest.raises(UserError, match="can't count the operations of ffi_call"):
        matrix_flops(kernel, SQUARE)


# Multiply-adds of one forward pass in units of 1e9: Peebles & Xie 2022, table 4.
@pytest.mark.parametrize(
    ("size", "published"), [("S/4", 1.41), pytest.param("B/2", 23.01, marks=pytest.mark.thorough)]
)
def test_published_networks_cost_what_was_published(size, published):
    network = DiT(num_classes=1000, **dit.SIZES[f"DiT-{size}"].settings)
    inputs = (array(1, 32, 32, 4), array(1), jax.ShapeDtypeStruct((1,), jnp.int32))
    params = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    assert matrix_flops(network.apply, params, *inputs) / 2e9 == pytest.approx(published, rel=0.005)


def toy_config():
    config = config_files.load("configs/digits.py")
    config.batch_size = 8
    config.model.update(hidden_size=16, depth=1, num_heads=2)
    config.sampling.update(solver=choices.copy(choices.SOLVERS["euler"]), num_steps=2)
    return config


def test_measuring_ends_in_rates_that_belong_together(monkeypatch):
    # What it is compared with is another's business: one size of matrices, a moment each.
    monkeypatch.setattr(throughput, "_PEAK_SIZES", (128,))
    monkeypatch.setattr(throughput, "_PEAK_SECONDS", 0.01)
    config = toy_config()
    config.model = spec(Plain)
    measured: Any = measure_throughput(
        "toy",
        set_up(config, (8, 8, 1), of_classes(10), one_device()),
        steps=1,
        num_samples=8,
        rounds=1,
    )
    training, sampling = measured
    assert (training.program, training.nfe, training.batch_size) == ("training", None, 8)
    # Two steps with guidance, which doubles their evaluations.
    assert (sampling.program, sampling.nfe) == ("sampling", 2 * 2)
    for row in measured:
        assert row.images_per_second == pytest.approx(8 / row.batch_seconds[0])
        share = row.gflops_per_second / row.peak_gflops_per_second[0]
        assert row.share_of_peak == pytest.approx(share)
        assert row.peak_host_bytes > 2**20
        assert row.compile_seconds > 0
    flops = [row.gflops_per_second * row.batch_seconds[0] for row in measured]
    # Training runs both layers, which cost the same, forward and back to their parameters, and the
    # second back to the first; sampling runs both forward `nfe` times on as many images.
    assert flops[0] / (flops[1] / sampling.nfe) == pytest.approx(5 / 2)
    json.dumps(dataclasses.asdict(training))


@pytest.mark.thorough
def test_training_is_timed_on_some_of_the_devices():
    row = measure_scaled(
        "toy", set_up_on_devices(toy_config(), (8, 8, 1), of_classes(10), 2), steps=1, rounds=2
    )
    assert (row.num_devices, len(row.batch_seconds)) == (2, 2)


def test_devices_that_training_can_not_be_timed_on_are_refused():
    config = toy_config()
    config.batch_size = 9
    with pytest.raises(UserError, match="batch_size=9 does not divide"):
        set_up_on_devices(config, (8, 8, 1), of_classes(10), 2)
    with pytest.raises(UserError, match="there are 8 devices, not 16"):
        set_up_on_devices(toy_config(), (8, 8, 1), of_classes(10), 16)


def test_the_table_of_devices_compares_round_by_round():
    rows = [Scaled("toy", 1, 8, (2.0, 4.0)), Scaled("toy", 4, 8, (1.0, 1.0))]
    lines = tables.scaling_table(rows).splitlines()
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == [
        "toy", "4", "1.00 (1.00 … 1.00)", "8.00", "3.00 (2.00 … 4.00) times",
    ]  # fmt: skip


def test_compile_seconds_leave_out_what_was_compiled_before():
    double = jax.jit(lambda x: 2 * x)
    with compiling() as first:
        double(1.0)
    with compiling() as second:
        double(2.0)
    double(jnp.ones(3))
    assert sum(first) > 0
    assert second == []


def row(**changes):
    return dataclasses.replace(
        Measured(
            config="digits:model=unet",
            program="sampling",
            device="1 x cpu (cpu)",
            dtype="float32",
            num_params=1_234_567,
            batch_size=64,
            nfe=70,
            images_per_second=32.0,
            gflops_per_second=61.5,
            share_of_peak=0.5,
            compile_seconds=4.5,
            peak_host_bytes=512 * 2**20,
            peak_device_bytes=None,
            batch_seconds=(2.0, 1.0, 4.0),
            peak_gflops_per_second=(120.0, 123.0, 130.0),
        ),
        **changes,
    )


def test_the_table():
    rows = [row(), row(program="training", nfe=None, gflops_per_second=None, share_of_peak=None)]
    lines = tables.throughput_table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "digits:model=unet: sampling", "1,234,567", "64", "70", "2.00 (1.00 … 4.00)", "32.0",
        "61.5", "50.0 %", "4.50", "512",
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[3].split("|")[4:9]] == [
        "–", "2.00 (1.00 … 4.00)", "32.0", "–", "–",
    ]  # fmt: skip


def test_the_table_shows_device_memory_where_it_is_known():
    table = tables.throughput_table([row(), row(peak_device_bytes=2**30)])
    assert table.splitlines()[0].endswith("device MiB |")
    assert table.splitlines()[3].endswith(" 1,024 |")


def test_headline_and_startup():
    machine = benchmark.describe_machine()
    text = tables.headline(machine, [row()])
    assert "peak of float32 matrix products: 123 (120 … 130) GFLOP/s" in text
    assert jax.__version__ in text
    start = cases.Start("digits", 20.0, 21.0, 8.0)
    text = tables.startup_tables({"diffjax": 0.25}, [start])
    assert "| import diffjax " in text
    assert "| 250 |" in text
    assert [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]] == [
        "digits", "20.0", "21.0", "8.00",
    ]  # fmt: skip


def test_help(capsys):
    assert cli.run(benchmark.main, benchmark.FLAGS, usage=benchmark.USAGE, argv=["--help"]) == 0
    text = capsys.readouterr().out
    assert "--configs" in text
    assert len(text.splitlines()) < 40


@pytest.fixture
def checked_here(monkeypatch):
    """What is looked for before anything is measured runs in this process, on its eight devices.

    Gives the numbers of devices that were asked for, which a process that began can't have.
    """
    asked = []
    few = SimpleNamespace(
        config=SimpleNamespace(update=lambda name, number: asked.append((name, number))),
        devices=jax.devices,
    )
    monkeypatch.setattr(checks, "jax", few)
    monkeypatch.setattr(cases, "ProcessPoolExecutor", Here)
    return asked


def refused(arguments, message, capsys):
    """Whether the benchmark reports it in its last line, and measures nothing."""
    assert cli.run(benchmark.main, benchmark.FLAGS, usage="", argv=arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.splitlines()[-1]
    assert "measuring" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--configs=digit", "did you mean 'configs/digits.py'?"),
        ("--configs=digits,digits:model=unett", "did you mean 'unet'?"),
        ("--configs=", "there is no config file"),
        ("--configs=digits,fashion_mnist --data_path=nowhere", "idx3-ubyte.gz in nowhere"),
        ("--rounds=0", "rounds"),
        ("--devices=2,no", "--devices=2,no should be numbers from 1"),
        ("--override=config.model.widht=8", "there is no setting config.model.widht; did you mean"),
        ("--json=nowhere/a.json", "can't write nowhere/a.json: there is no folder nowhere"),
        ("--config=digits", "did you mean '--configs'?"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_measured(arguments, message, checked_here, capsys):
    refused(arguments, message, capsys)
    assert not checked_here


THREE_ROWS = (
    "error: --devices=3, digits: batch_size=64 does not divide over the mesh's data x "
    "fsdp = 3 device rows; 63 or 66 would"
)


@pytest.mark.parametrize(
    ("arguments", "message", "devices"),
    [
        ("--devices=1,3", THREE_ROWS, 3),
        pytest.param(
            "--devices=1 --override=config.mesh.tensor=2", "--devices=1, digits: a mesh of", 1,
            marks=pytest.mark.thorough),
        ("--devices=9", "--devices=9: there are 8 devices", 9),
        ("--split --override=config.data.test_fraction=2", "test_fraction", None),
        ("--against=torch", "--against=torch needs PyTorch: ", None),
        ("--autoencoders=sd-vae", "--autoencoders are compared with diffusers': add", None),
    ],
)  # fmt: skip
def test_what_a_later_part_refuses_is_refused_first(
    arguments, message, devices, checked_here, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(f"--configs=digits --override=config.model.depth=1 {arguments}", message, capsys)
    assert checked_here == ([] if devices is None else [("jax_num_cpu_devices", devices)])


@pytest.mark.process
def test_what_a_process_of_its_own_refuses_is_refused_first(capsys):
    """It starts with the number of devices in the flag; the rest is as in the test above."""
    refused("--configs=digits --devices=1,3", THREE_ROWS, capsys)


@pytest.mark.parity
def test_a_network_without_a_twin_is_refused_first(checked_here, capsys):
    pytest.importorskip("torch")
    arguments = "--configs=digits --against=torch --override=config.model.dropout=0.1"
    refused(arguments, "--against=torch has no twin of", capsys)


def test_a_comparison_is_refused_without_pytorch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="--against=torch needs PyTorch"):
        against_torch.torch_device()


def fail(message):
    raise UserError(message)


@pytest.mark.process
def test_a_users_error_crosses_the_process():
    with pytest.raises(UserError, match="does not fit"):
        cases.in_new_process(fail, "does not fit")
    with pytest.raises(UserError, match="was killed"):
        cases.in_new_process(os._exit, 1)
