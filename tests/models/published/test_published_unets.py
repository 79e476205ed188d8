"""U-Nets in the authors' layouts, against what their code returned (tests/references/unets.py)."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.exchange.pretrained import from_pretrained
from diffjax.models import families
from diffjax.models.adm.published import CLASSIFIER, FAMILY, UPSAMPLER
from diffjax.models.ddpm.published import FAMILY as DDPM
from diffjax.models.ddpm.published import OLD as OLD_DDPM
from diffjax.models.edm.network import NCSNPP, POSITIONAL, RANDOM, SongUNet
from diffjax.models.edm.published import DHARIWAL
from diffjax.models.edm.published import FAMILY as SONG
from diffjax.models.layers import resampling
from diffjax.models.layers.common import QKV_ORDERS, SelfAttention
from diffjax.models.unet import Resampling
from diffjax.pretrained import folders
from diffjax.pretrained.files import write_safetensors
from diffjax.process.beta_tables import CosineBetas
from diffjax.process.paths import coeffs
from diffjax.sampling.sample import sample
from diffjax.training.flops import matrix_flops
from tests.references import unets as reference
from tests.support import persistent_pickles as pickles
from tests.support.witnesses import witnesses

ADM = {
    "image_shape": reference.IMAGES.shape[1:],
    "channels": 128,
    "channel_multipliers": (1, 1.5),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
}
NUM_CLASSES = reference.NUM_CLASSES
WITH_CLASSES = {**ADM, "num_classes": NUM_CLASSES}
SMALL = {"label": reference.LABELS, "small": reference.SMALL}
ORDER = {"num_classes": 0, "out_channels": 3, "num_heads": 2, "qkv_order": "parts"}
EDM = {
    "image_shape": reference.IMAGES.shape[1:],
    "num_classes": 0,
    "channels": 16,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "dropout": 0.0,
}
DDPM_SETTINGS = {
    "side": 8,
    "channel_multipliers": (1, 1.25),
    "num_res_blocks": 1,
    "dropout": 0.0,
}
SKIPS = {"images_in": "skip", "images_out": True, "embedding": replace(RANDOM, augment_dim=0)}
CASES = {
    "adm/heads": (FAMILY, WITH_CLASSES, reference.LABELS),
    "adm/parts": (FAMILY, {**ADM, **ORDER}, None),
    "adm/upsampling": (UPSAMPLER, {**WITH_CLASSES, "num_heads": 2}, SMALL),
    "adm/classifier": (CLASSIFIER, WITH_CLASSES, None),
    "edm/ddpm++": (
        SONG,
        {**EDM, "num_classes": NUM_CLASSES},
        {"label": reference.NULL_LABELS, "augmentation": reference.AUGMENT},
    ),
    "edm/ncsn++": (SONG, {**EDM, **NCSNPP}, reference.AUGMENT),
    "edm/skips": (SONG, {**EDM, **NCSNPP, **SKIPS}, None),
    "edm/dhariwal": (
        DHARIWAL,
        {**EDM, "channels": 64, "num_classes": NUM_CLASSES},
        reference.NULL_LABELS,
    ),
}
TIMES = {
    "adm": reference.TIMESTEPS,
    "edm": reference.NOISE,
}
"""Noise labels, by file."""


@functools.cache
def stored(name):
    file, case = name.split("/")
    with np.load(reference.FOLDER / f"{file}.npz", allow_pickle=False) as arrays:
        return {
            key.removeprefix(f"{case}/"): arrays[key]
            for key in arrays
            if key.startswith(f"{case}/")
        }


def theirs_of(family, denoiser):
    """The tensors that the reference drew by their published names."""
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape), family.shapes(denoiser))
    theirs = family.to_theirs(nothing, denoiser)
    filters = {name: array for name, array in theirs.items() if name.endswith("resample_filter")}
    shapes = {name: array.shape for name, array in theirs.items() if name not in filters}
    return reference.parameters(shapes) | filters


def network_of(name):
    """The network of a case, with the parameters that the reference drew by published names."""
    family, settings, cond = CASES[name]
    denoiser = family.network(**settings)
    params = family.to_ours(theirs_of(family, denoiser), denoiser, "theirs")
    return denoiser.network, params, jax.tree.map(jnp.asarray, cond)


def times_of(name):
    return jnp.asarray(TIMES[name.split("/")[0]])


def error(found, expected):
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


def test_outputs_of_ddpmpp_are_those_of_the_authors_code():
    """The quickest of the cases below, which has labels of augmentation and the null label."""
    network, params, cond = network_of("edm/ddpm++")
    times = times_of("edm/ddpm++")
    images = jnp.asarray(reference.IMAGES)
    out = jax.jit(network.apply)({"params": params}, images, times, cond)
    assert error(out, stored("edm/ddpm++")["out"]) < 1e-5


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_authors_code(name):
    """In training mode, with respect to images and parameters; entries of those as stored."""
    network, params, cond = network_of(name)
    expected, times = stored(name), times_of(name)
    factors = reference.weights(expected["out"].shape)

    def total(params, x):
        out = network.apply({"params": params}, x, times, cond, train=True)
        return (out * factors).sum(), out

    gradient = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    (of_params, of_images), out = gradient(params, jnp.asarray(reference.IMAGES))
    assert expected["out"].std() > 0.1
    assert error(out, expected["out"]) < 1e-5
    assert error(of_images, expected["of_images"]) < 1e-5
    family, settings, _ = CASES[name]
    named = family.to_theirs(of_params, family.network(**settings))
    # Random frequencies and filters are no parameters of the authors' networks.
    named = {k: x for k, x in named.items() if not k.endswith(("freqs", "resample_filter"))}
    found, known = reference.entries(named), expected["of_parameters"]
    sizes = np.linalg.norm(known, axis=1, keepdims=True)
    assert sizes.min() > 0
    assert error(found / sizes, known / sizes) < 1e-5


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_close(name):
    network, params, cond = network_of(name)
    half = network.clone(dtype="bfloat16")
    times = times_of(name)
    run = jax.jit(lambda params, x: half.apply({"params": params}, x, times, cond))
    out = run(params, jnp.asarray(reference.IMAGES))
    assert out.dtype == jnp.float32
    assert error(out, stored(name)["out"]) < 2e-2


def test_columns_of_attention_in_any_order_are_one_function():
    """NumPy permutes the columns; all queries, keys and values differ."""
    random = np.random.default_rng(0)
    heads, channels = 3, 4
    x = random.normal(size=(1, 5, heads * channels)).astype(np.float32)
    shapes = jax.eval_shape(SelfAttention(heads).init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)
    evaluate = jax.jit(
        lambda order, params: SelfAttention(heads, qkv_order=order).apply({"params": params}, x),
        static_argnums=0,
    )
    expected = evaluate("parts", params)
    for order, axes in QKV_ORDERS.items():
        places = np.arange(3 * heads * channels).reshape(3, heads, channels).transpose(axes)
        moved = jax.tree.map(lambda leaf, p=places: leaf[..., p.ravel()], params["qkv"])
        np.testing.assert_allclose(
            evaluate(order, {**params, "qkv": moved}), expected, rtol=1e-4, atol=1e-5
        )


def as_modules(state, class_name="EDMPrecond", **settings):
    """A module of NVIDIA's pickles with the tensors of these names, made with these settings."""
    inner, parameters = {}, {}
    for name, array in state.items():
        first, _, rest = name.partition(".")
        if rest:
            inner.setdefault(first, {})[rest] = array
        else:
            parameters[first] = np.ascontiguousarray(array)
    modules = {name: as_modules(tensors) for name, tensors in inner.items()}
    return pickles.module(class_name, parameters, modules=modules, **settings)


def test_a_pickle_of_edm_is_recognised_and_read(tmp_path):
    """A small NCSN++ with labels: which one it is follows from names and shapes alone."""
    settings = {**EDM, **NCSNPP, "num_classes": NUM_CLASSES, "image_shape": (32, 32, 3)}
    settings = {**settings, "attention_resolutions": (16,), "dropout": 0.13}
    size = replace(SONG.sizes["edm-cifar10-32x32-cond-ve"], settings=settings)
    family = replace(SONG, sizes={"small": size})
    denoiser = family.size("small")
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: random.random(leaf.shape, np.float32), family.shapes(denoiser)
    )
    network = as_modules(family.to_theirs(params, denoiser), dropout=0.13)
    tree = {"ema": network, "loss_fn": None}
    path = tmp_path / "network-snapshot.pkl"
    path.write_bytes(pickles.dumped(tree))
    found, read = family.read(path)
    assert found == denoiser
    jax.tree.map(np.testing.assert_array_equal, read, params)


@pytest.mark.thorough
def test_a_pickle_is_sampled_as_by_its_authors(tmp_path):
    """By EDM's own sampler, from the same noise: Heun's steps on its grid, and its preconditioning.

    The null label among the labels, as theirs of zeros.
    """
    settings = {**EDM, "image_shape": (8, 8, 3), "num_classes": NUM_CLASSES}
    denoiser = SONG.network(**settings, embedding=replace(POSITIONAL, augment_dim=0))
    theirs = theirs_of(SONG, denoiser)
    path = tmp_path / "edm.pkl"
    path.write_bytes(pickles.dumped({"ema": as_modules(theirs, "VPPrecond")}))
    with pytest.raises(UserError, match="_class_name='VPPrecond', and only 'EDMPrecond' is known"):
        from_pretrained(path)
    path.write_bytes(pickles.dumped({"ema": as_modules(theirs, dropout=0.2)}))
    model = from_pretrained(path)
    assert model.parts.wired.network.dropout == 0.2
    wired, labels = model.parts.wired, jnp.asarray(reference.NULL_LABELS)
    assert wired.recipe.num_steps == 18
    times = wired.recipe.grid(wired.path, 5)
    predict = wired.predict(model.params)

    def denoise(x, t):
        return predict(x, jnp.broadcast_to(t, x.shape[:1]), labels)

    def run(x):
        keys = jax.random.split(jax.random.key(0), len(x))
        return sample(denoise, wired.recipe.solver, wired.path, times, keys, x)

    found = jax.jit(run)(80.0 * jnp.asarray(reference.NOISE_IMAGES))
    with np.load(reference.FOLDER / "edm.npz", allow_pickle=False) as arrays:
        assert error(found, arrays["sampled/out"]) < 1e-5


@pytest.mark.thorough
def test_a_file_of_adm_is_a_run_with_its_recipe(tmp_path, monkeypatch):
    """Of 64 pixels and a third of the width: the cosine schedule, and no null label."""
    settings = {**FAMILY.sizes["ADM-64"].settings, "channels": 64}
    small = {"small": replace(FAMILY.sizes["ADM-64"], settings=settings)}
    network = {families.AUTHORS: replace(FAMILY, sizes=small)}
    monkeypatch.setitem(families.LAYOUTS, families.ADM, network)
    denoiser = FAMILY.network(**settings)
    path = tmp_path / "64x64_diffusion.safetensors"
    write_safetensors(path, theirs_of(FAMILY, denoiser))
    model = from_pretrained(path)
    wired = model.parts.wired
    assert wired.network.clone(attention="auto") == denoiser.network
    assert isinstance(wired.path, CosineBetas)
    assert wired.objective.traits.learned_variance
    step = coeffs(wired.path, jnp.array([0.001, 1.0]), 1)  # the first and the last of 1,000
    np.testing.assert_allclose(wired.precond.noise_label(step), [0.0, 999.0], atol=1e-3)
    with pytest.raises(UserError, match="is trained with condition_dropout=0"):
        model.sample([3], guidance_scale=2.0, num_steps=1)


@pytest.mark.thorough
def test_a_learned_variance_is_left_out_where_the_network_has_none():
    theirs = theirs_of(FAMILY, FAMILY.network(**WITH_CLASSES))
    without = FAMILY.network(**{**WITH_CLASSES, "out_channels": 0})
    fitting = FAMILY.without_variance(theirs, without)
    FAMILY.check(fitting, without, "x")
    for name in ("out.2.weight", "out.2.bias"):
        np.testing.assert_array_equal(fitting[name], theirs[name][:3])


@pytest.mark.thorough
def test_a_folder_of_ddpm_is_sampled(tmp_path):
    denoiser = DDPM.network(**{**DDPM_SETTINGS, "channels": 128, "channel_multipliers": (1,)})
    assert DDPM.config is not None
    entries = DDPM.config.entries(denoiser)
    folders.write_folder(tmp_path / "ddpm", theirs_of(DDPM, denoiser), entries)
    model = from_pretrained(tmp_path / "ddpm")
    images = model.sample(2, num_steps=2)
    assert images.shape == (2, 8, 8, 3)
    assert np.isfinite(images).all()
    assert images.std() > 0.1


@pytest.mark.thorough
def test_tensors_are_of_one_network_alone():
    """ADM's upsampler differs from ADM in the channels of its input, its classifier in names."""
    for family, settings in (
        (FAMILY, ADM), (UPSAMPLER, ADM), (CLASSIFIER, ADM), (SONG, EDM),
        (DHARIWAL, {**EDM, "channels": 64}), (DDPM, DDPM_SETTINGS),
    ):  # fmt: skip
        denoiser = family.network(**settings)
        state = theirs_of(family, denoiser)
        assert families.networks_of(state) == [type(denoiser.network).__name__]


MULTIPLY_ADDS = {
    "ADM": (("ADM-256",), 1120),
    "ADM-U": (("ADM-64", "ADM-64-to-256"), 742),
    "ADM at 512": (("ADM-512",), 1983),
    "ADM-U at 512": (("ADM-128", "ADM-128-to-512"), 2813),
}
"""Networks, and the billions of multiply-adds of an image in Peebles & Xie 2022, tables 2 and 3."""


@pytest.mark.thorough
def test_networks_cost_what_was_published():
    for name, (sizes, published) in MULTIPLY_ADDS.items():
        total = 0.0
        for size in sizes:
            family = FAMILY if size in FAMILY.sizes else UPSAMPLER
            denoiser = family.size(size)
            variables = {"params": family.shapes(denoiser)}
            total += matrix_flops(denoiser.network.apply, variables, *family.inputs(denoiser))
        assert total / 2e9 == pytest.approx(published, rel=2e-3), name


TAPS = {"two": (1, 1), "four": (1, 3, 3, 1), "six": (1, 5, 10, 10, 5, 1), "uneven": (1, 2, 4, 8)}


@pytest.mark.parametrize("taps", TAPS.values(), ids=TAPS)
def test_resampling_is_a_convolution_with_zeros_around(taps):
    """Against NumPy's own convolution of rows and columns; doubling is four times the transpose."""
    random, weights = np.random.default_rng(0), np.array(taps) / sum(taps)
    x, before = random.normal(size=(6, 8)), (len(taps) - 1) // 2

    def halves(size):
        wide = np.zeros((size // 2, size + len(taps)))
        for i in range(size // 2):
            wide[i, 2 * i : 2 * i + len(taps)] = weights
        return wide[:, before : before + size]

    rows, columns = halves(6), halves(8)
    image = jnp.asarray(x[None, :, :, None], jnp.float32)
    small = jax.jit(resampling.halved, static_argnums=1)(image, taps)[0, :, :, 0]
    np.testing.assert_allclose(small, rows @ x @ columns.T, atol=1e-6)
    large = jax.jit(resampling.doubled, static_argnums=1)(image, taps)[0, :, :, 0]
    expected = 4 * halves(12).T @ x @ halves(16)
    np.testing.assert_allclose(large, expected, atol=1e-6)


def test_a_filter_of_odd_length_and_an_unknown_name_are_refused():
    x, t = np.zeros((1, 8, 8, 3), np.float32), np.zeros(1, np.float32)
    for settings, said in (
        ({"resampling": Resampling((1, 2, 1))}, "an even number of taps"),
        ({"images_in": "residul"}, "no way 'residul'; did you mean 'residual'"),
        ({"qkv_order": "head"}, "no order 'head'; did you mean 'heads'"),
        ({"num_heads": 3}, "num_heads=3 does not divide the 16 channels"),
    ):
        network = SongUNet(0, channels=8, channel_multipliers=(1, 2), num_res_blocks=1, **settings)
        with pytest.raises(UserError, match=said):
            jax.eval_shape(network.init, jax.random.key(0), x, t)


@pytest.mark.parity
@pytest.mark.parametrize("num_classes", witnesses([0, NUM_CLASSES], [NUM_CLASSES]))
def test_ddpm_in_a_folder_is_that_of_diffusers(num_classes, tmp_path):
    """Outputs, and gradients with respect to images and parameters, at unlike times."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers", reason="pip install -e '.[parity]'")
    ours = DDPM.network(**DDPM_SETTINGS, num_classes=num_classes)
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape), DDPM.shapes(ours))
    shapes = {name: array.shape for name, array in DDPM.to_theirs(nothing, ours).items()}
    params = DDPM.to_ours(reference.parameters(shapes), ours, "theirs")
    assert DDPM.config is not None
    folders.write_folder(tmp_path, DDPM.to_theirs(params, ours), DDPM.config.entries(ours))
    found = families.find_published(tmp_path)
    assert (found.network, found.layout) == (ours, "diffusers")
    peer = diffusers.UNet2DModel.from_pretrained(tmp_path).train().double()

    cond = reference.LABELS if num_classes else None
    labels = None if cond is None else torch.tensor(cond)
    x: Any = torch.tensor(reference.IMAGES.transpose(0, 3, 1, 2)).double().requires_grad_()
    expected = peer(x, torch.tensor(reference.TIMESTEPS), labels).sample
    factors = reference.weights(reference.IMAGES.shape)
    (expected * torch.tensor(factors.transpose(0, 3, 1, 2))).sum().backward()

    def total(params, x):
        times = jnp.asarray(reference.TIMESTEPS)
        out = ours.network.apply({"params": params}, x, times, cond, train=True)
        return (out * factors).sum(), out

    gradient = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    (of_params, of_images), out = gradient(params, jnp.asarray(reference.IMAGES))
    assert error(out, expected.detach().numpy().transpose(0, 2, 3, 1)) < 1e-5
    assert error(of_images, x.grad.numpy().transpose(0, 2, 3, 1)) < 1e-5
    named = DDPM.to_theirs(of_params, ours)
    for name, value in peer.named_parameters():
        if not name.endswith("to_k.bias"):  # zero up to rounding: a softmax ignores constants
            assert error(named[name], value.grad.numpy()) < 1e-5, name


@pytest.mark.parity
def test_old_names_of_ddpm_are_read_by_diffusers_too(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="pip install -e '.[parity]'")
    ours = DDPM.network(**DDPM_SETTINGS)
    theirs = theirs_of(DDPM, ours)
    params = DDPM.to_ours(theirs, ours, "theirs")
    assert DDPM.config is not None
    folders.write_folder(tmp_path, OLD_DDPM.to_theirs(params, ours), DDPM.config.entries(ours))
    peer = diffusers.UNet2DModel.from_pretrained(tmp_path)
    for name, value in peer.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), theirs[name], name)
    assert families.find_published(tmp_path).layout == "old diffusers"


def test_what_diffusers_would_compute_otherwise_is_refused():
    assert DDPM.config is not None
    with pytest.raises(UserError, match="64 channels have 16 here: take a multiple of 32"):
        DDPM.config.entries(DDPM.network(8, channels=64))
    entries = DDPM.config.entries(DDPM.network(8))
    for change, said in (
        ({"flip_sin_to_cos": True}, "has flip_sin_to_cos=True, and only False is known"),
        ({"block_out_channels": [64, 64]}, "64 channels have 16 here"),
        ({"down_block_types": ["Attention"]}, "config.json lacks 'Attention'"),
    ):
        with pytest.raises(UserError, match=said):
            DDPM.config.settings({**entries, **change}, "x")
