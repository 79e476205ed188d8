"""EDM2 against outputs of the authors' code (tests/references/edm2.py), and its magnitudes."""

import functools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import diffjax
from diffjax import config_files
from diffjax.data import digits
from diffjax.errors import UserError
from diffjax.models.edm2.network import MPConditioning
from diffjax.models.edm2.published import FAMILY, edm2
from diffjax.models.layers import magnitude
from diffjax.optimizers.descent import descent
from diffjax.optimizers.normalised import NormalisedAdam, with_unit_filters
from diffjax.process.precond import LogSNRLabel, Precond, UnitVariance, denoiser
from diffjax.process.schedules import EDM
from diffjax.process.targets import F
from diffjax.runs.samples.model import Request
from diffjax.sampling.sample import sample_padded
from diffjax.training.averages import Averages
from diffjax.training.state import init_state
from diffjax.training.step import StepSettings, make_train_step
from diffjax.wiring import wire
from tests.references import edm2 as reference
from tests.support.compiling import FAST
from tests.support.persistent_pickles import dumped, module, persistent
from tests.support.witnesses import witnesses

SETTINGS = {
    "channels": 8,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_levels": (1,),
    "head_channels": 4,
    "label_balance": 0.4,
    "skip_balance": 0.6,
    "residual_balance": 0.35,
    "attention_balance": 0.25,
    "clip": 1.5,
    "uncertainty_terms": 16,
}
"""Those of `reference.THEIRS`, by our names."""
SHAPE = reference.HEIGHT, reference.WIDTH, reference.CHANNELS
DENOISER = edm2(SHAPE, reference.NUM_CLASSES, **SETTINGS)
NETWORK: Any = DENOISER.network
HEAD = magnitude.MPFunction(SETTINGS["uncertainty_terms"])
C_NOISE = np.log(reference.SIGMAS) / 4


@pytest.fixture(scope="module")
def stored():
    with np.load(reference.FOLDER / "EDM2.npz", allow_pickle=False) as file:
        return dict(file)


@functools.cache
def redrawn(mode="eval"):
    """Our parameters for their drawn tensors."""
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape), FAMILY.shapes(DENOISER))
    names = FAMILY.to_theirs(nothing, DENOISER)
    state = reference.parameters({name: x.shape for name, x in names.items()})
    params = FAMILY.to_ours(state, DENOISER, "theirs")
    # In training, theirs normalises the weights that it holds before it evaluates.
    return params if mode == "eval" else jax.jit(with_unit_filters)(params)


@functools.cache
def forward():
    return jax.jit(lambda params, x, label, cond: NETWORK.apply({"params": params}, x, label, cond))


def assert_close(found, expected, relative=1e-5):
    assert np.abs(expected).max() > 1e-3
    assert np.linalg.norm(found - expected) < relative * np.linalg.norm(expected)


@jax.jit
def all_outputs(params, images, sigmas, labels):
    """Of the network, the denoiser with its preconditioning, and the uncertainty."""
    outputs = []

    def apply(params, x, label, cond):
        outputs.append(NETWORK.apply({"params": params}, x, label, cond))
        return outputs[-1]

    precond = Precond(F(0.5), LogSNRLabel(), UnitVariance(0.5))
    found = denoiser(apply, params, EDM(), precond)(images, sigmas, labels)
    return *outputs, found.x0, HEAD.apply({"params": params["uncertainty"]}, C_NOISE)


@pytest.mark.parametrize("mode", witnesses(["eval", "train"], ["train"]))
def test_outputs_are_those_of_the_authors_code(stored, mode):
    inputs = reference.IMAGES, reference.SIGMAS, reference.LABELS
    found = all_outputs(redrawn(mode), *inputs)
    for output, name in zip(found, ("out", "denoised", "logvar"), strict=True):
        assert_close(output, stored[f"{mode}/{name}"])


def loss(params, x):
    """That of the reference: of the network's output and of the uncertainty."""
    scaled = x / np.hypot(reference.SIGMAS, np.float32(0.5))[:, None, None, None]
    out = NETWORK.apply({"params": params}, scaled, 200 * C_NOISE, reference.LABELS)
    u: Any = HEAD.apply({"params": params["uncertainty"]}, C_NOISE)
    return jnp.sum(out * reference.COTANGENT) + jnp.sum(u * reference.SIGMAS)


@functools.cache
def gradient():
    return jax.jit(jax.grad(loss, (0, 1)))


def assert_seen(tree, expected, relative):
    """Of each array, the norm and inner products, up to a share of the norm; of gains together."""
    named = FAMILY.to_theirs(tree, DENOISER)
    trained = {name: x for name, x in named.items() if not name.endswith(("freqs", "phases"))}
    norms = expected[:, 0].copy()
    gains = [x.ndim == 0 for _, x in sorted(trained.items())]
    norms[gains] = np.linalg.norm(norms[gains])
    error = np.abs(reference.seen(trained) - expected) / norms[:, None]
    assert error.max() < relative, sorted(trained)[error.max(axis=1).argmax()]


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradients_are_those_of_the_authors_code(stored, mode):
    of_params, of_images = gradient()(redrawn(mode), reference.IMAGES)
    assert_close(of_images, stored[f"{mode}/of_images"])
    assert_seen(of_params, stored[f"{mode}/of_parameters"], 1e-5)
    constants = of_params["conditioning"]["fourier"], of_params["uncertainty"]["fourier"]
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(constants))


@pytest.mark.thorough
def test_three_steps_of_training_are_those_of_the_authors_code(stored):
    """Theirs normalises before each evaluation, ours after each step."""
    optimizer = descent(
        reference.STEPS, NormalisedAdam(), reference.RATE, warmup_steps=0, clip_norm=np.inf
    ).transform
    params = redrawn("train")
    state = optimizer.init(params)
    for _ in range(reference.STEPS):
        of_params, _ = gradient()(params, reference.IMAGES)
        updates, state = jax.jit(optimizer.update)(of_params, state, params)
        params = optax.apply_updates(params, updates)
    assert_seen(params, stored["trained"], 1e-4)


# The authors' files.


def pickled(state, settings):
    """A pickle of the authors, as far as it is read, with the numbers in half precision."""
    tree: dict[str, Any] = {}
    for name, x in state.items():
        *path, own = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[own] = np.asarray(x, np.float16)

    def built(node, **settings):
        kinds = {"modules": {}, "buffers": {}, "parameters": {}}
        for name, x in node.items():
            if isinstance(x, dict):
                kinds["modules"][name] = built(x)
            else:
                kinds["buffers" if name in ("freqs", "phases") else "parameters"][name] = x
        return module("Precond", **kinds, **settings)

    return dumped({"ema": built(tree, **settings), "loss_fn": persistent("EDM2Loss", {})})


CONFIG: Any = FAMILY.config
THEIRS = {
    "img_resolution": reference.HEIGHT,
    "img_channels": reference.CHANNELS,
    "label_dim": reference.NUM_CLASSES,
    "use_fp16": True,
    "sigma_data": 0.5,
    **reference.THEIRS,
}


def test_a_pickle_has_the_network_and_its_settings(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickled(FAMILY.to_theirs(redrawn(), DENOISER), THEIRS))
    found, params = FAMILY.read(tmp_path / "x.pkl")
    assert found.network == NETWORK
    assert found.image_shape == (reference.HEIGHT, reference.HEIGHT, reference.CHANNELS)
    rounded = jax.tree.map(lambda x: np.float32(np.float16(x)), redrawn())
    jax.tree.map(np.testing.assert_array_equal, params, rounded)
    # The same tensors without settings: what shapes do not show is as in all published sizes.
    state = FAMILY.to_theirs(params, found)
    plain, published = FAMILY.network_of(state, "x").network, FAMILY.size("EDM2-XS").network
    no_trace = ("head_channels", "label_balance", "skip_balance", "clip")
    no_trace += ("residual_balance", "attention_balance")
    of_sizes = {name: getattr(published, name) for name in no_trace}
    assert plain == NETWORK.clone(**of_sizes)
    other = THEIRS | {"num_blocks": 2}
    with pytest.raises(UserError, match="x: the pickle has num_res_blocks=2, but its tensors"):
        FAMILY.network_of(state, "x", other)


def test_settings_of_the_authors_are_ours_and_back():
    assert edm2(**CONFIG.settings(THEIRS, "x")) == edm2(
        (8, 8, 3), reference.NUM_CLASSES, **SETTINGS
    )
    default = CONFIG.settings({"img_resolution": 64, "img_channels": 4, "label_dim": 1000}, "x")
    assert edm2(**default) == FAMILY.size("EDM2-S")
    for changes in ({}, {"clip_act": None, "dropout": 0.2}):
        entries = CONFIG.entries(edm2(**CONFIG.settings(THEIRS | changes, "x")))
        assert entries.items() >= {**reference.THEIRS, **changes}.items()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"channel_mult_emb": 2}, "x: the pickle has channel_mult_emb=2, and only None is known"),
        ({"unknown": 1}, "x: the pickle can't be used: EDM2 has no unknown here"),
    ],
)
def test_settings_without_a_like_are_refused(changes, said):
    with pytest.raises(UserError, match=said):
        CONFIG.settings(THEIRS | changes, "x")


@pytest.mark.thorough
def test_a_pickle_is_sampled_as_the_authors_do(stored, tmp_path):
    """Heun's 5 steps from their noise, on their times, with their preconditioning."""
    (tmp_path / "x.pkl").write_bytes(pickled(FAMILY.to_theirs(redrawn(), DENOISER), THEIRS))
    model = diffjax.from_pretrained(tmp_path / "x.pkl")

    def from_their_noise(denoise, solver, path, times, keys, x):
        noise = path.t_noise * jnp.asarray(reference.NOISE)
        return sample_padded(denoise, solver, path, times, keys, noise)

    recipe = replace(model.recipe, num_steps=reference.NUM_STEPS)
    assert recipe.nfe == 2 * reference.NUM_STEPS - 1
    times = recipe.times(model.parts.wired.path)
    labels = Request(reference.SAMPLED_LABELS)
    found = model.model().walk(from_their_noise, recipe, labels, times)
    assert_close(found, stored["samples"], 1e-4)
    assert model.family == "EDM2"
    assert model.sample([0, 1], num_steps=2).shape == (2, 8, 8, 3)


# Magnitudes.


def test_parts_keep_the_magnitude_of_normal_numbers():
    """Moments of the normal distribution, by quadrature in NumPy."""
    x, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    silu = np.asarray(magnitude.mp_silu(jnp.asarray(x)), np.float64)
    assert math.isclose(weights @ silu**2, 1.0, rel_tol=2e-3)  # 0.596 has three digits
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(4_000, n)).astype(np.float32) for n in (8, 24))
    for balance in (0.0, 0.3, 1.0):
        both = np.asarray(magnitude.mp_concatenate(a, b, balance))
        share = np.array([(1 - balance) ** 2, balance**2])
        share = 32 * share / share.sum()  # of the sum of squares, of all channels
        squares = np.square(both).mean(0)
        np.testing.assert_allclose([squares[:8].sum(), squares[8:].sum()], share, rtol=0.03)
        added = np.asarray(magnitude.mp_sum(a, b[:, :8], balance))
        np.testing.assert_allclose(np.square(added).mean(), 1.0, rtol=0.03)
    features = magnitude.MPFourier(4_000)
    points = np.linspace(-1.5, 1.5, 5, dtype=np.float32)
    found, _ = jax.jit(features.init_with_output)(jax.random.key(0), points)
    np.testing.assert_allclose(np.square(found).mean(1), 1.0, rtol=0.06)


def test_outputs_have_the_magnitude_of_inputs_whatever_the_length_of_weights():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 6, 6, 16)).astype(np.float32)
    for layer, many in ((magnitude.MPDense(512), x), (magnitude.MPConv(512), x[:8])):
        params, apply = jax.jit(layer.init)(jax.random.key(0), many), jax.jit(layer.apply)
        out = apply(params, many, 1.0)
        inside = np.asarray(out)[:, 1:-1, 1:-1]  # padded zeros make the others smaller
        np.testing.assert_allclose(np.square(inside).mean(), 1.0, rtol=0.03)
        longer = jax.tree.map(lambda w: 100 * w, params)
        np.testing.assert_allclose(apply(longer, many, 3.0), 3 * out, rtol=2e-4, atol=1e-4)


def test_the_gradient_is_orthogonal_to_each_filter():
    """Of long filters, whose length is not changed by the 1e-4 that is added to it."""
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(size=(2, 5, 5, n)).astype(np.float32) for n in (3, 4))
    layer = magnitude.MPConv(4)
    kernel = 1e3 * rng.normal(size=(3, 3, 3, 4)).astype(np.float32)

    def inner(kernel):
        out: Any = layer.apply({"params": {"kernel": kernel}}, x)
        return jnp.sum(out * dy)

    gradient = jax.jit(jax.grad(inner))(kernel)
    product = np.sum(kernel * gradient, axis=(0, 1, 2))
    squares = (np.sum(np.square(array), axis=(0, 1, 2)) for array in (kernel, gradient))
    lengths = np.sqrt(math.prod(squares))
    assert np.abs(product / lengths).max() < 1e-5


@pytest.mark.thorough
def test_activations_keep_their_magnitude_over_all_blocks():
    """With kernels of normal numbers of any size, and gains of 0, as in a fresh network."""
    side, blocks = 16, 3
    settings: dict[str, Any] = {"channel_multipliers": (1, 2), "attention_levels": ()}
    denoiser = edm2((side, side, 4), 10, channels=32, num_res_blocks=blocks, **settings)
    rng = np.random.default_rng(0)

    def draw(leaf):
        x = rng.normal(size=leaf.shape, scale=6.28 if leaf.ndim == 1 else 30.0)
        return np.float32(x if leaf.ndim else 0.0)

    params = jax.tree.map(draw, FAMILY.shapes(denoiser))
    x = np.float32(rng.normal(size=(4, side, side, 4)))
    noise, labels = np.float32([-300, -100, 0, 200]), np.array([3, 1, 0, 2])

    @jax.jit
    def magnitudes(params):
        how: Any = {"capture_intermediates": True, "mutable": ["intermediates"]}
        _, seen = denoiser.network.apply({"params": params}, x, noise, labels, **how)
        return {
            name: jnp.sqrt(jnp.mean(jnp.square(inner["__call__"][0])))
            for name, inner in seen["intermediates"].items()
            if isinstance(inner, dict) and "__call__" in inner
        }

    found = jax.device_get(magnitudes(params))
    assert found.pop("final_conv") == 0  # its gain is
    # The conditioning, the first convolution, and all blocks.
    assert len(found) == 2 + 2 * blocks + 1 + 2 + 2 * (blocks + 1) + 1
    for name, size in found.items():
        assert 0.85 < size < 1.15, (name, size)


# Inputs and settings.


def test_conditioning_by_null_unknown_and_several_labels():
    module = MPConditioning(4, 32, 16, 0.005, 0.5)
    one, two = np.float32([10.0, -20.0, 30.0]), np.float32([[10.0, 5.0]] * 3)
    labels = np.array([1, 4, 5])
    params: Any = jax.jit(module.init)(jax.random.key(0), one, labels)
    apply = jax.jit(module.apply)
    found = np.asarray(apply(params, one, labels))
    nothing = np.asarray(apply(params, one, None))
    np.testing.assert_array_equal(found[1], nothing[1])
    assert np.abs(found[0] - nothing[0]).max() > 0.1
    assert np.isnan(found[2]).all()
    without = MPConditioning(0, 32, 16, 0.005, 0.5)
    del params["params"]["label"]
    alone = np.asarray(jax.jit(without.apply)(params, one, labels))
    silu = lambda x: x / (1 + np.exp(-x)) / 0.596  # noqa: E731
    # A term of zeros for the class halves the noise's, and √½ is the size of both.
    logits = np.linspace(-6, 6, 4_001)
    back = np.interp(alone[1][alone[1] > 0.1], silu(logits)[2_000:], logits[2_000:])
    np.testing.assert_allclose(
        nothing[1][alone[1] > 0.1], silu(back / np.sqrt(2)), rtol=1e-3, atol=1e-4
    )
    several = MPConditioning(4, 32, 16, 0.005, 0.5)
    variables = jax.eval_shape(several.init, jax.random.key(0), two, None)["params"]
    assert {"noise", "noise_1"} <= variables.keys()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"head_channels": 5}, "EDM2: head_channels=5 does not divide the 16 channels of a level"),
        ({"channel_multipliers": ()}, "EDM2: channel_multipliers is empty"),
        ({"channel_multipliers": (1,) * 5}, "EDM2: 5 levels halve an image of 8x12 4 times, which"),
    ],
)
def test_settings_that_do_not_fit(settings, said):
    with pytest.raises(UserError, match=said):
        jax.eval_shape(NETWORK.clone(**settings).init, jax.random.key(0), *DENOISER.inputs)


@pytest.mark.thorough
def test_half_precision_and_dropout():
    params, x = redrawn(), reference.IMAGES / np.hypot(reference.SIGMAS, 0.5)[:, None, None, None]
    args = np.float32(x), np.float32(200 * C_NOISE), reference.LABELS
    full = np.asarray(forward()(params, *args))

    @jax.jit
    def others(params, key):
        half, dropped = NETWORK.clone(dtype="bfloat16"), NETWORK.clone(dropout=0.1)
        how: Any = {"train": True, "rngs": {"dropout": key}}
        return (
            half.apply({"params": params}, *args),
            dropped.apply({"params": params}, *args),
            dropped.apply({"params": params}, *args, **how),
        )

    half, off, on = jax.device_get(others(params, jax.random.key(0)))
    assert 0 < np.abs(half - full).max() < 0.05 * np.abs(full).max()
    np.testing.assert_allclose(off, full, rtol=1e-4, atol=1e-5)
    assert np.abs(on - full).max() > 0.01


@pytest.mark.thorough
def test_a_small_one_learns_digits():
    """Its loss is finite in each step and falls, and filters keep their length."""
    config = config_files.load(
        "configs/digits.py:objective=edm2,model=edm2,optimizer=normalised_adam"
    )
    data, steps = digits(), 60
    wired = wire(config, data.image_shape, data.condition)
    optimizer = descent(steps, NormalisedAdam(), 1e-2, warmup_steps=10)
    averages = Averages(())
    step = make_train_step(
        wired.apply,
        wired.objective,
        optimizer,
        StepSettings(
            num_steps=steps, averages=averages, condition_dropout=0.1, condition=wired.condition
        ),
    )
    train = jax.jit(step, compiler_options=FAST)
    params = jax.jit(wired.init)(jax.random.key(0))
    state, rng, losses = init_state(params, optimizer, averages), np.random.default_rng(0), []
    for _ in range(steps):
        batch = data.train.gather(rng.integers(len(data.train), size=32))
        state, metrics = train(state, jax.random.key(1), batch)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    kernel = np.asarray(state.params["down_0_0"]["conv_1"]["kernel"])
    lengths = np.sqrt(np.sum(np.square(kernel), axis=(0, 1, 2)))
    np.testing.assert_allclose(lengths, np.sqrt(kernel[..., 0].size), rtol=3e-4)
    constants = params["conditioning"]["fourier"], state.params["conditioning"]["fourier"]
    jax.tree.map(np.testing.assert_array_equal, *constants)
