"""Networks against closed forms, published sizes and a second implementation in NumPy."""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.models import DiT, UNet, unet
from diffjax.models.dit import patches, stages
from diffjax.models.dit.sizes import SIZES
from diffjax.models.layers import attention, blockwise, placement, remat, resampling
from diffjax.models.layers import common as layers
from diffjax.training.flops import matrix_flops

BATCH, CLASSES = 3, 10
KEYS = jax.random.split(jax.random.key(0), 8)
X = np.random.default_rng(1).standard_normal((BATCH, 8, 8, 2), np.float32)
NOISE = np.array([0.0, 37.5, 999.0], np.float32)
COND = np.array([0, 9, CLASSES], np.int32)


def small_dit(num_classes=CLASSES, **kw) -> Any:
    return DiT(num_classes, **{"hidden_size": 32, "depth": 2, "num_heads": 2, **kw})


def small_unet(num_classes=CLASSES, **kw) -> Any:
    few = {"channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "head_channels": 8}
    return UNet(num_classes, **{**few, "attention_resolutions": (4,), **kw})


SMALL = {
    "dit": small_dit,
    "unet": small_unet,
    "unet_adm": functools.partial(small_unet, residual_resampling=True),
    "unet_ddpm": functools.partial(small_unet, scale_shift=False),
}
# Of the two the DiT is quicker, and is the one of every run of the tests.
both_nets = pytest.mark.parametrize(
    "make",
    [
        pytest.param(small_dit, id="dit"),
        pytest.param(small_unet, id="unet", marks=pytest.mark.thorough),
    ],
)


def random_like(shapes):
    """Parameters as after some training: nothing is zero, so every path carries a signal."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape)
        if leaf.ndim == 1:
            return np.float32(0.1 * noise + (path[-1].key == "scale"))
        return np.float32(noise / np.sqrt(np.prod(leaf.shape[:-1])))

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def awake(net):
    return random_like(shapes(net, X.shape[1:])[1])


@functools.cache
def jitted(net):
    return jax.jit(lambda params, x, noise, cond: net.apply({"params": params}, x, noise, cond))


@functools.cache
def shapes(net, image_shape, batch=2):
    x = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    noise = jax.ShapeDtypeStruct((batch,), jnp.float32)
    cond = jax.ShapeDtypeStruct((batch,), jnp.int32)
    out, variables = jax.eval_shape(
        lambda *a: net.init_with_output(jax.random.key(0), *a), x, noise, cond
    )
    return out, variables["params"]


def count(params):
    return sum(p.size for p in jax.tree.leaves(params))


# What every network promises


# In half precision too, where they could be of another type; in single precision one has it.
@pytest.mark.parametrize(
    ("make", "image_shape", "dtype"),
    [
        pytest.param(
            make, image_shape, dtype, id=f"{name}-{dtype}",
            marks=() if dtype == "bfloat16" and name in ("dit", "unet")
            else pytest.mark.thorough(tenth=False),
        )
        for name, make in SMALL.items()
        for image_shape, dtype in (((8, 8, 1), "float32"), ((8, 12, 3), "bfloat16"))
    ],
)  # fmt: skip
def test_output_is_a_float32_image_and_parameters_are_float32(make, image_shape, dtype):
    out, params = shapes(make(dtype=dtype), image_shape)
    assert out.shape == (2, *image_shape)
    assert out.dtype == jnp.float32
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "net",
    [
        small_dit(depth=1),
        pytest.param(small_unet(channel_multipliers=(1,)), marks=pytest.mark.thorough),
    ],
)
def test_a_fresh_network_returns_zero(net):
    out, variables = jax.device_get(jax.jit(net.init_with_output)(KEYS[1], X, NOISE, COND))
    np.testing.assert_array_equal(out, 0)
    assert any(np.abs(p).max() > 0 for p in jax.tree.leaves(variables))


# The other U-Nets' blocks are those of this one, which are held to NumPy one by one.
@both_nets
def test_an_output_depends_on_its_own_example_only_and_on_all_of_it(make):
    net = make()
    run = functools.partial(jitted(net), awake(net))
    given = [np.asarray(array) for array in (X, NOISE, COND)]
    base = np.asarray(run(*given))
    for i, step in enumerate((1, 100, 1)):
        others = [array.copy() for array in given]
        others[i][0] += step
        other = np.asarray(run(*others))
        np.testing.assert_allclose(other[1:], base[1:], rtol=0, atol=1e-5)
        assert np.abs(other[0] - base[0]).max() > 1e-2
    order = [2, 0, 1]
    permuted = run(*(array[order] for array in given))
    np.testing.assert_allclose(permuted, base[order], rtol=0, atol=1e-5)


@functools.cache
def gradients_and_products(make):
    """Of the parameters; and along random directions, forwards and backwards."""
    net = make()
    cond, rng = np.arange(CLASSES + 1), np.random.default_rng(3)
    x, dx, dy = rng.standard_normal((3, CLASSES + 1, 8, 8, 2), np.float32)
    noise = np.linspace(1, 999, CLASSES + 1, dtype="f")

    @jax.jit
    def run(params, x, noise, dx, dy):
        def f(params, x, noise):
            return net.apply({"params": params}, x, noise, cond)

        dnoise = jnp.ones_like(noise)
        _, pull = jax.vjp(f, params, x, noise)
        _, dout = jax.jvp(functools.partial(f, params), (x, noise), (dx, dnoise))
        gradients, gx, gnoise = pull(dy)
        return gradients, jnp.vdot(dy, dout), jnp.vdot(gx, dx) + jnp.vdot(gnoise, dnoise)

    return jax.device_get(run(awake(net), x, noise, dx, dy))


@both_nets
def test_every_parameter_gets_a_finite_gradient_and_is_used(make):
    gradients, _, _ = gradients_and_products(make)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(gradient).all(), name
        assert np.abs(gradient).max() > 0, name


@both_nets
def test_forward_mode_is_the_transpose_of_reverse_mode(make):
    _, forward, reverse = gradients_and_products(make)
    assert abs(forward) > 1
    np.testing.assert_allclose(forward, reverse, rtol=1e-4)


@both_nets
def test_bfloat16_computes_the_same_function(make):
    params = awake(make())
    full, half = (
        np.asarray(jitted(net)(params, X, NOISE, COND)) for net in (make(), make(dtype="bfloat16"))
    )
    assert 0 < np.abs(half - full).max() < 0.05 * np.abs(full).max()


def test_none_is_the_null_label_and_a_label_beyond_it_is_nan():
    net = small_dit()
    params = awake(net)
    run = jitted(net)
    null = run(params, X, NOISE, np.full(BATCH, CLASSES))
    np.testing.assert_array_equal(run(params, X, NOISE, None), null)
    assert np.isnan(run(params, X, NOISE, np.full(BATCH, CLASSES + 1))).all()


def test_without_classes_the_label_is_ignored_and_has_no_parameters():
    net = small_dit(num_classes=0, depth=1)
    params = awake(net)
    assert "label" not in params["conditioning"]
    run = jitted(net)
    np.testing.assert_array_equal(run(params, X, NOISE, None), run(params, X, NOISE, COND))


@both_nets
def test_dropout_acts_in_training_only(make):
    net, params = make(dropout=0.5), awake(make())

    @jax.jit
    def train(key):
        variables = {"params": params}
        return net.apply(variables, X, NOISE, COND, train=True, rngs={"dropout": key})

    still = jitted(net)(params, X, NOISE, COND)
    np.testing.assert_array_equal(still, jitted(make())(params, X, NOISE, COND))
    one, same, other = (np.asarray(train(KEYS[i])) for i in (6, 6, 7))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - still).max() > 1e-2
    assert np.abs(one - other).max() > 1e-2


@pytest.mark.parametrize(
    ("net", "image_shape", "message"),
    [
        (small_dit(patch_size=3), (8, 8, 1), "patch_size=3 does not divide .* 8x8.*: 1, 2, 4, 8"),
        (small_dit(patch_size=0), (8, 8, 1), "patch_size=0 does not divide"),
        (small_dit(num_heads=5), (8, 8, 1), "5 heads do not divide a width of 32"),
        (small_dit(hidden_size=30), (8, 8, 1), "hidden_size=30 is not a multiple of 4"),
        (small_dit(dtype="bflot16"), (8, 8, 1), "'bflot16'; did you mean 'bfloat16'"),
        (small_dit(attention="bached"), (8, 8, 1), "'bached'; did you mean 'batched'"),
        (small_dit(remat="ful"), (8, 8, 1), "remat: no policy 'ful'; did you mean 'full'"),
        (small_unet(remat="ful"), (8, 8, 1), "remat: no policy 'ful'; did you mean 'full'"),
        (small_unet(attention="cudn"), (8, 8, 1), "'cudn'; did you mean 'cudnn'"),
        (small_unet(head_channels=5), (8, 8, 1), "head_channels=5 does not divide the 16 .* 4x4"),
        (small_unet(channels=7), (8, 8, 1), "channels=7 is not a positive even number"),
        (small_unet(channel_multipliers=()), (8, 8, 1), "channel_multipliers is empty"),
        (
            small_unet(channel_multipliers=(1, 2, 2, 2)),
            (28, 28, 1),
            "4 levels halve an image of 28x28 3 times.* at most 3 channel_multipliers fit",
        ),
        (small_unet(), (8, 7, 1), "at most 1 channel_multipliers fit"),
    ],
)
def test_impossible_sizes_end_in_one_line(net, image_shape, message):
    with pytest.raises(UserError) as caught:
        shapes(net, image_shape)
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)


# Attention


def attention_float64(q, k, v):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


@functools.partial(jax.jit, static_argnums=0)
def run_attention(name, *qkv):
    return attention.attention(*qkv, implementation=name)


def qkv(scale=1.0, dtype="float32"):
    rng = np.random.default_rng(3)
    q = scale * rng.standard_normal((2, 5, 3, 4))
    k, v = rng.standard_normal((2, 2, 7, 3, 4))
    return tuple(a.astype(dtype) for a in (q, k, v))


def three_normals(*shape):
    return tuple(np.random.default_rng(4).standard_normal((3, *shape), np.float32))


@pytest.fixture(autouse=True)
def _few_keys_at_a_time(monkeypatch):
    """So that the few keys of these tests are several blocks, the last one not full."""
    monkeypatch.setattr(blockwise, "_BLOCK", 3)


RUN_HERE = ["xla", "batched", "chunked", "auto"]
runs_here = pytest.mark.parametrize("name", RUN_HERE)


@runs_here
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_attention_is_the_formula(name, scale):
    q, k, v = qkv(scale)
    out = run_attention(name, q, k, v)
    np.testing.assert_allclose(out, attention_float64(q, k, v), rtol=1e-3, atol=1e-5)


@runs_here
def test_attention_in_half_precision_keeps_the_softmax_in_float32(name):
    q, k, v = qkv(3.0, "bfloat16")
    out = run_attention(name, q, k, v)
    assert out.dtype == jnp.bfloat16
    error = np.abs(np.asarray(out, np.float64) - attention_float64(q, k, v)).max()
    assert error < 0.02 * np.abs(v).max()


@functools.partial(jax.jit, static_argnums=0)
def derivatives(implementation, *qkv):
    """Output, gradients and a directional derivative, which differentiates forwards."""
    turned = (qkv[2], qkv[0], qkv[1])
    attend = functools.partial(attention.attention, implementation=implementation)
    gradients = jax.grad(lambda *qkv: jnp.sin(attend(*qkv)).sum(), argnums=(0, 1, 2))(*qkv)
    return attend(*qkv), gradients, jax.jvp(attend, qkv, turned)[1]


close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in RUN_HERE if name != "xla"])
def test_attention_implementations_have_the_same_derivatives(name):
    qkv = three_normals(2, 7, 3, 4)
    jax.tree.map(close, derivatives(name, *qkv), derivatives("xla", *qkv))


@pytest.mark.parametrize(
    "axes",
    [
        {"sequence": 4, "tensor": 2},
        pytest.param({"fsdp": 2, "sequence": 4}, marks=pytest.mark.thorough),
    ],
)
def test_keys_that_go_round_a_ring_are_the_keys_of_one_device(axes):
    mesh = jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes)
    )
    qkv = three_normals(2, 16, 2, 4)
    expected = derivatives("xla", *qkv)
    tokens = placement.fit((placement.BATCH, "sequence"), (2, 16), dict(mesh.shape))
    placed = jax.device_put(qkv, jax.sharding.NamedSharding(mesh, tokens))
    with jax.set_mesh(mesh):
        jax.tree.map(close, derivatives("ring", *placed), expected)
        close(run_attention("auto", *placed), expected[0])


def test_without_a_ring_keys_stay_where_they_are():
    np.testing.assert_array_equal(run_attention("ring", *qkv()), run_attention("chunked", *qkv()))


@pytest.mark.thorough(tenth=False)
def test_splash_is_the_formula_with_its_gradient():
    """The TPU's kernel, interpreted: seconds of tracing, in the module that only it imports."""
    qkv = three_normals(1, 128, 1, 8)

    def results(attend):
        return jax.jit(jax.value_and_grad(lambda *qkv: jnp.sin(attend(*qkv)).sum(), (0, 1, 2)))(
            *qkv
        )

    splash = functools.partial(attention.splash, interpret=True)
    loose = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(loose, results(splash), results(attention.xla))


def test_splash_takes_multiples_of_128():
    with pytest.raises(UserError, match="splash takes tokens in multiples of 128, not 7"):
        attention.splash(*three_normals(1, 7, 1, 8))


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("forward", marks=pytest.mark.thorough),
        "gradient",
        pytest.param("jvp", marks=pytest.mark.thorough),
    ],
)
def test_memory_of_chunked_attention_is_linear_in_the_tokens(mode, monkeypatch):
    monkeypatch.setattr(blockwise, "_BLOCK", 64)

    def temporaries(name, length):
        attend = functools.partial(attention.attention, implementation=name)
        run = {
            "forward": attend,
            "gradient": jax.grad(lambda *qkv: jnp.sin(attend(*qkv)).sum(), argnums=(0, 1, 2)),
            "jvp": lambda *qkv: jax.jvp(attend, qkv, qkv),
        }[mode]
        shape = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        analysis: Any = jax.jit(run).lower(shape, shape, shape).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    assert temporaries("chunked", 2048) < 2.2 * temporaries("chunked", 1024)
    assert temporaries("batched", 2048) > 3.8 * temporaries("batched", 1024)


def test_equal_keys_average_the_values():
    q, k, v = qkv()
    out = run_attention("auto", q, np.ones_like(k), v)
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(1)[:, None], q.shape), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "platform", "dtype", "resolved"),
    [
        ("auto", "cpu", "float32", "batched"),
        ("auto", "cpu", "bfloat16", "batched"),
        ("auto", "gpu", "float32", "xla"),
        ("auto", "gpu", "bfloat16", "cudnn"),
        ("auto", "tpu", "bfloat16", "xla"),
        ("cudnn", "cpu", "float32", "cudnn"),
    ],
)
def test_auto_is_resolved_by_platform(name, platform, dtype, resolved):
    assert attention.resolve(name, platform, dtype) == resolved


def test_auto_is_a_ring_where_tokens_are_split():
    assert attention.resolve("auto", "tpu", "bfloat16", sequence=2) == "ring"
    assert attention.resolve("xla", "tpu", "bfloat16", sequence=2) == "xla"


# What is kept for the backward pass


REMATERIALISED = {
    "dit": functools.partial(small_dit, dropout=0.5, attention="xla"),
    "dit in a loop": functools.partial(small_dit, dropout=0.5, scan=True, attention="xla"),
    "unet": functools.partial(
        small_unet,
        dropout=0.5,
        attention="xla",
        channel_multipliers=(1,),
        attention_resolutions=(8,),
    ),
}


def loss_and_gradient(make, policy):
    net = make(remat=policy)

    def loss(params):
        variables, rngs = {"params": params}, {"dropout": KEYS[6]}
        out = net.apply(variables, X, NOISE, COND, train=True, rngs=rngs)
        return jnp.square(out - X).sum()

    return jax.value_and_grad(loss)


with_loop_or_levels = pytest.mark.parametrize(
    "make",
    [
        pytest.param(REMATERIALISED["dit in a loop"], id="dit in a loop"),
        pytest.param(REMATERIALISED["unet"], id="unet", marks=pytest.mark.thorough(tenth=False)),
    ],
)


@with_loop_or_levels
def test_policies_change_the_work(make):
    """Matrix products are done again as declared."""
    params = awake(make())
    work = {p: matrix_flops(loss_and_gradient(make, p), params) for p in remat.REMAT}
    assert work["none"] == work["products"] < work["dense"] < work["attention"] < work["full"]
    assert work["full"] <= 4 / 3 * work["none"]


@pytest.mark.thorough(tenth=False)
@with_loop_or_levels
def test_policies_change_no_value_and_no_gradient(make):
    """Not all of them: each takes seconds to compile, and "dense" keeps by rule and by name."""
    params = awake(make())
    kept, none = (jax.jit(loss_and_gradient(make, p))(params) for p in ("dense", "none"))
    same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(same, kept, none)


def test_what_is_not_kept_is_computed_again():
    """Without a loop; the tests above are of one, and of the U-Net."""
    net, full = (REMATERIALISED["dit"](depth=1, remat=policy) for policy in ("none", "full"))

    def work(net):
        def loss(params):
            variables, rngs = {"params": params}, {"dropout": KEYS[6]}
            return net.apply(variables, X, NOISE, COND, train=True, rngs=rngs).sum()

        return matrix_flops(jax.grad(loss), shapes(net, X.shape[1:])[1])

    none = work(net)
    assert none < work(full) <= 4 / 3 * none


# DiT


@pytest.mark.parametrize(
    ("name", "published_millions"),
    [
        ("DiT-S/4", 33),
        pytest.param("DiT-S/8", 33, marks=pytest.mark.thorough),
        pytest.param("DiT-B/2", 130, marks=pytest.mark.thorough),
        pytest.param("DiT-L/2", 458, marks=pytest.mark.thorough),
    ],
)
def test_dit_sizes_are_the_published_ones(name, published_millions):
    size = SIZES[name].settings
    _, params = shapes(DiT(1000, **size), (32, 32, 4))
    width, patch = size["hidden_size"], size["patch_size"] ** 2 * 4

    def dense(rows, columns):
        return (rows + 1) * columns

    block = (
        dense(width, 6 * width)  # modulation
        + dense(width, 3 * width)
        + dense(width, width)
        + dense(width, 4 * width)
        + dense(4 * width, width)
    )
    conditioning = dense(256, width) + dense(width, width) + 1001 * width
    ends = dense(patch, width) + dense(width, 2 * width) + dense(width, patch)
    assert count(params) == size["depth"] * block + conditioning + ends
    assert abs(count(params) / 1e6 - published_millions) < 0.6


def test_dit_xl_has_the_reference_count_to_the_last_parameter():
    # 675,129,632 is what the public reference code counts; it includes the fixed positions (16x16
    # tokens) and a second set of output channels for the learned variance.
    # Stacked blocks, which are traced once, have the parameters of separate ones.
    _, params = shapes(DiT(1000, **SIZES["DiT-XL/2"].settings, scan=True), (32, 32, 4))
    positions, learned_variance = 256 * 1152, 16 * (1152 + 1)
    assert count(params) + positions + learned_variance == 675_129_632


patchify = jax.jit(patches.patchify, static_argnums=1)
unpatchify = jax.jit(patches.unpatchify, static_argnums=(1, 2, 3))


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_unpatchify_undoes_patchify(patch_size):
    x = np.random.default_rng(0).standard_normal((2, 8, 12, 3), np.float32)
    tokens = np.asarray(patchify(x, patch_size))
    np.testing.assert_array_equal(unpatchify(tokens, patch_size, 8, 12), x)
    # Token number 1 is the patch to the right of the first one.
    second = x[:, :patch_size, patch_size : 2 * patch_size]
    np.testing.assert_array_equal(tokens[:, 1], second.reshape(2, -1))


def test_positions_know_only_the_offset_between_two_tokens():
    # sin a sin b + cos a cos b = cos(a − b), so inner products are sums of cosines of the offset.
    height, width, features = 3, 5, 16
    table = patches.positions_2d(height, width, features).astype(np.float64)
    row, column = np.repeat(np.arange(height), width), np.tile(np.arange(width), height)
    frequencies = np.array([1.0, 0.1, 0.01, 0.001])
    expected = sum(
        np.cos(frequencies * (at[:, None, None] - at[None, :, None])).sum(-1)
        for at in (row, column)
    )
    np.testing.assert_allclose(table @ table.T, expected, atol=1e-5)


def dropped_and_sown(net, params):
    """Output and sown tokens in training, with dropout."""
    collection, name = layers.HIDDEN
    out, sown = net.apply(
        {"params": params}, X, NOISE, COND, train=True, rngs={"dropout": KEYS[6]},
        mutable=[collection],
    )  # fmt: skip
    return out, *sown[collection][name]


def test_stacked_blocks_are_the_same_function():
    """Output and sown tokens in training, where dropout draws the same masks; so are gradients."""
    how = {"dropout": 0.5, "hidden_depths": (2, 1)}
    net, loop = (small_dit(**how, scan=scan) for scan in (False, True))
    params = awake(net)

    @jax.jit
    def both(params, stack):
        return dropped_and_sown(net, params), dropped_and_sown(loop, stack)

    stack = jax.tree.map(np.asarray, stages.stack_blocks(params))
    same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    found, expected = both(params, stack)
    jax.tree.map(same, found, expected)
    first, second = expected[1:]
    assert np.abs(first - second).max() > 0.1
    jax.tree.map(np.testing.assert_array_equal, stages.unstack_blocks(stack), params)


def test_fresh_stacked_blocks_have_the_layout_of_stacked_ones_and_differ():
    net, loop = small_dit(), small_dit(scan=True)
    assert shapes(loop, (8, 8, 2))[1] == jax.eval_shape(
        stages.stack_blocks, shapes(net, (8, 8, 2))[1]
    )

    @jax.jit
    def kernel_of(key):
        return loop.init(key, X, NOISE)["params"]["blocks"]["mlp"]["up"]["kernel"]

    kernel = np.asarray(kernel_of(KEYS[1]))
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1
    # Xavier's bound for one layer: the stack is no part of the fans.
    assert 0.9 < np.abs(kernel).max() / np.sqrt(6 / (32 + 128)) <= 1


@pytest.mark.parametrize(
    "pattern",
    [
        "block_[02]/attention",
        pytest.param("", marks=pytest.mark.thorough),
        pytest.param("block_7", marks=pytest.mark.thorough),
    ],
)
def test_attention_is_switched_off_by_number_in_stacked_blocks_too(pattern):
    net, loop = small_dit(depth=3), small_dit(depth=3, scan=True)
    params = awake(net)
    stack = jax.eval_shape(stages.stack_blocks, params)
    assert layers.attention_layers(stack) == layers.attention_layers(params)

    @jax.jit
    def both(params):
        stack = stages.stack_blocks(params)
        return [
            each.apply({"params": p}, X, NOISE, COND) for each, p in ((net, params), (loop, stack))
        ]

    with layers.attention_off(pattern):
        expected, out = both(params)
    np.testing.assert_allclose(out, expected, atol=1e-4)
    whole = jitted(net)(params, X, NOISE, COND)
    assert np.allclose(expected, whole, atol=1e-4) == (pattern == "block_7")


def test_programs_of_stacked_blocks_do_not_grow_with_depth():
    """What is traced: the lines of the program, with and without a loop."""

    def lines(**kw):
        net = small_dit(**kw)
        traced = jax.make_jaxpr(net.apply)({"params": shapes(net, (8, 8, 2))[1]}, X, NOISE, COND)
        return len(str(traced).splitlines())

    assert lines(depth=9, scan=True) == lines(depth=2, scan=True)
    assert lines(depth=2) > 1.2 * lines(depth=1)


def test_dit_equals_numpy_in_float64():
    """The whole network once more, from the equations of Peebles & Xie (2022)."""
    net = small_dit(depth=1)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), awake(net))
    x, noise, cond = np.asarray(X, np.float64), np.asarray(NOISE, np.float64), np.asarray(COND)

    def dense(h, layer):
        return h @ layer["kernel"] + layer["bias"]

    def silu(h):
        return h / (1 + np.exp(-h))

    def gelu(h):
        return 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))

    def norm(h):
        return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)

    angles = noise[:, None] * 10_000.0 ** (-np.arange(128) / 128)
    waves = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    embed = p["conditioning"]
    c = dense(silu(dense(waves, embed["hidden"])), embed["out"]) + embed["label"]["embedding"][cond]

    cut = [
        x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(BATCH, -1)
        for i in range(4)
        for j in range(4)
    ]
    h = dense(np.stack(cut, axis=1), p["patch_embedding"]) + patches.positions_2d(4, 4, 32)

    block = p["block_0"]
    parts = np.split(dense(silu(c), block["modulation"])[:, None], 6, axis=-1)
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
    joint = dense(norm(h) * (1 + scale_1) + shift_1, block["attention"]["qkv"])
    q, k, v = (a.reshape(BATCH, 16, 2, 16) for a in np.split(joint, 3, axis=-1))
    mixed = attention_float64(q, k, v).reshape(BATCH, 16, 32)
    h = h + gate_1 * dense(mixed, block["attention"]["out"])
    hidden = gelu(dense(norm(h) * (1 + scale_2) + shift_2, block["mlp"]["up"]))
    h = h + gate_2 * dense(hidden, block["mlp"]["down"])

    shift, scale = np.split(dense(silu(c), p["final_modulation"])[:, None], 2, axis=-1)
    tokens = dense(norm(h) * (1 + scale) + shift, p["final_out"])
    expected = np.zeros_like(x)
    for n in range(16):
        i, j = divmod(n, 4)
        expected[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = tokens[:, n].reshape(BATCH, 2, 2, 2)

    out = jitted(net)(awake(net), X, NOISE, COND)
    np.testing.assert_allclose(out, expected, atol=2e-5 * np.abs(expected).max())


# U-Net


def test_unet_attends_at_the_named_sizes_and_in_the_middle():
    _, params = shapes(small_unet(channel_multipliers=(1, 2, 2)), (16, 16, 1))
    attending = {name.removesuffix("_attention") for name in params if name.endswith("attention")}
    assert attending == {"down_2_0", "middle", "up_2_0", "up_2_1"}


@pytest.mark.parametrize(
    ("channels", "groups"), [(128, 32), (192, 32), (64, 16), (48, 12), (4, 1), (37, 1)]
)
def test_group_norm_groups_divide_the_channels(channels, groups):
    assert unet.num_groups(channels) == groups


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.thorough)])
def test_group_norm_is_flaxs(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(3.0 + rng.standard_normal((2, 4, 6, 24)), dtype)
    variables = {
        "params": {name: rng.standard_normal(24).astype("f") for name in ("scale", "bias")}
    }
    ours, flaxs = unet.GroupNorm(3, x.dtype), nn.GroupNorm(3, epsilon=1e-5, dtype=x.dtype)

    @jax.jit
    def both(variables, x):
        out, pull = jax.vjp(ours.apply, variables, x)
        expected, pull_expected = jax.vjp(flaxs.apply, variables, x)
        return (out, pull(out)), (expected, pull_expected(out))

    found, known = both(variables, x)
    (out, _), (expected, _) = found, known
    assert out.dtype == expected.dtype == x.dtype
    error = 0.05 if dtype == "bfloat16" else 1e-5
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(known), strict=True):
        np.testing.assert_allclose(a.astype("f"), b.astype("f"), rtol=error, atol=10 * error)


@pytest.mark.parametrize(
    ("scale_shift", "resample"), [(True, "same"), (True, "halved"), (False, "doubled")]
)
def test_residual_block_equals_numpy_in_float64(scale_shift, resample):
    """One block from 6 to 10 channels, hence one group (4 or more channels) and two (5 each)."""
    sizes = {
        "same": (unet._same, lambda a: a),
        "halved": (resampling.halved, lambda a: a.reshape(BATCH, 4, 2, 4, 2, 6).mean((2, 4))),
        "doubled": (resampling.doubled, lambda a: np.kron(a, np.ones((1, 2, 2, 1)))),
    }
    to_size, resized = sizes[resample]
    block = unet.ResidualBlock(10, scale_shift, 0.0, "float32", to_size)
    rng = np.random.default_rng(5)
    x = rng.standard_normal((BATCH, 8, 8, 6), np.float32)
    c = rng.standard_normal((BATCH, 12), np.float32)
    shapes = jax.eval_shape(functools.partial(block.init, train=False), KEYS[5], x, c)["params"]
    params = random_like(shapes)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def norm(h, layer):
        groups = np.split(h, {6: 1, 10: 2}[h.shape[-1]], axis=-1)
        axes = {"axis": (1, 2, 3), "keepdims": True}
        normal = [(g - g.mean(**axes)) / np.sqrt(g.var(**axes) + 1e-5) for g in groups]
        return np.concatenate(normal, axis=-1) * layer["scale"] + layer["bias"]

    def silu(h):
        return h / (1 + np.exp(-h))

    def conv(h, layer):
        _, height, width, _ = h.shape
        padded = np.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)))
        taps = [
            padded[:, i : i + height, j : j + width] @ layer["kernel"][i, j]
            for i in range(3)
            for j in range(3)
        ]
        return sum(taps) + layer["bias"]

    start = np.asarray(x, np.float64)
    h = conv(resized(silu(norm(start, p["norm_1"]))), p["conv_1"])
    vector = silu(np.asarray(c, np.float64)) @ p["modulation"]["kernel"] + p["modulation"]["bias"]
    vector = vector[:, None, None]
    if scale_shift:
        h = norm(h, p["norm_2"]) * (1 + vector[..., :10]) + vector[..., 10:]
    else:
        h = norm(h + vector, p["norm_2"])
    skip = resized(start) @ p["skip"]["kernel"] + p["skip"]["bias"]
    expected = skip + conv(silu(h), p["conv_2"])
    out = jax.jit(functools.partial(block.apply, train=False))({"params": params}, x, c)
    np.testing.assert_allclose(out, expected, atol=2e-5)


# Embedding of the noise label


embedding = jax.jit(layers.frequency_embedding, static_argnums=1)


def test_frequency_embedding_knows_only_the_difference_of_two_labels():
    labels = np.array([0.0, 1.0, 500.0, 999.0], np.float32)
    embedded = np.asarray(embedding(labels, 64), np.float64)
    frequencies = 10_000.0 ** (-np.arange(32) / 32)
    differences = np.asarray(labels[:, None] - labels[None, :], np.float64)
    expected = np.cos(differences[..., None] * frequencies).sum(-1)
    np.testing.assert_allclose(embedded @ embedded.T, expected, atol=1e-2)


def test_frequency_embedding_is_float32_for_half_precision_labels_and_refuses_odd_widths():
    half = jax.ShapeDtypeStruct((2,), jnp.bfloat16)
    assert jax.eval_shape(lambda x: layers.frequency_embedding(x, 8), half).dtype == jnp.float32
    with pytest.raises(UserError, match="7 features is odd; use 8"):
        layers.frequency_embedding(jnp.ones(2), 7)
