"""LPIPS and PatchGAN: against NumPy, and against torch where it is installed."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate

from diffjax.errors import UserError
from diffjax.models.lpips.network import LPIPS, convolutions
from diffjax.models.lpips.published import FAMILY, read
from diffjax.models.patchgan import PatchGAN
from diffjax.pretrained.files import write_safetensors
from tests.support.later import Later, needs

torch = Later("torch")
functional = Later("torch.nn.functional")

NETWORK = LPIPS(width=2)
RANDOM = np.random.default_rng(0)
X, Y = RANDOM.uniform(-1, 1, (2, 3, 16, 32, 3)).astype(np.float32)
SHIFT, SCALE = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])


@functools.cache
def theirs(width=2):
    """Random weights by the names of `lpips`; of a scale that keeps features of about 1."""
    rng = np.random.default_rng(1)
    network = LPIPS(width=width)
    shapes = FAMILY.to_theirs(
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), FAMILY.shapes(network)), network
    )

    def drawn(x):
        size = x.shape[1:] if x.ndim == 4 else (4,)
        return rng.normal(0, (2 / np.prod(size)) ** 0.5, x.shape).astype(np.float32)

    return {
        name: rng.random(x.shape, np.float32) if name.startswith("lin") else drawn(x)
        for name, x in shapes.items()
    }


def by_numpy(weights, x, y):
    """The distances, layer after layer, with channels first."""

    def features(images):
        h = ((images.astype(np.float64) - SHIFT) / SCALE).transpose(0, 3, 1, 2)
        found = []
        for stage, i, place in convolutions():
            if stage and i == 0:
                batch, channels, height, width = h.shape
                h = h.reshape(batch, channels, height // 2, 2, width // 2, 2).max((3, 5))
            name = f"net.slice{stage + 1}.{place}"
            kernel, bias = (weights[f"{name}.{kind}"] for kind in ("weight", "bias"))
            padded = np.pad(h, ((0, 0), (0, 0), (1, 1), (1, 1)))
            maps = [[correlate(each, k, "valid")[0] for k in kernel] for each in padded]
            h = np.maximum(np.array(maps) + bias[:, None, None], 0)
            found[stage:] = [h]  # The last of each stage.
        return found

    total = 0
    for stage, pair in enumerate(zip(features(x), features(y), strict=True)):
        one, other = (h / (np.sqrt((h**2).sum(1, keepdims=True)) + 1e-10) for h in pair)
        weighted = ((one - other) ** 2 * weights[f"lin{stage}.model.1.weight"]).sum(1)
        total = total + weighted.mean((1, 2))
    return total


@jax.jit
def distances_and_gradient(params, x):
    """To Y, and the gradient of their sum by x."""

    def total(x):
        distances: Any = NETWORK.apply({"params": params}, x, jnp.asarray(Y))
        return jnp.sum(distances), distances

    gradient, distances = jax.grad(total, has_aux=True)(x)
    return distances, gradient


def test_distances_are_those_of_numpy():
    params = FAMILY.to_ours(theirs(), NETWORK, "theirs")
    found, _ = distances_and_gradient(params, X)
    np.testing.assert_allclose(found, by_numpy(theirs(), X, Y), rtol=1e-5)


def test_files_of_both_kinds_are_read(tmp_path):
    """Of one file with all, and of torchvision's network beside the weights of channels."""
    places = {f"net.slice{stage + 1}.{n}": f"features.{n}" for stage, _, n in convolutions()}
    heads = {name: x for name, x in theirs().items() if name.startswith("lin")}
    body = {
        name.replace(before, after): x
        for name, x in theirs().items()
        for before, after in places.items()
        if name.startswith(f"{before}.")
    }
    files = {"all": theirs(), "vgg16": body | {"classifier.0.weight": np.zeros(1)}, "heads": heads}
    for name, state in files.items():
        write_safetensors(tmp_path / name, state)
    network, params = read(tmp_path / "all")
    assert network == NETWORK
    jax.tree.map(np.testing.assert_array_equal, params, FAMILY.to_ours(theirs(), network, "x"))
    _, pair = read(tmp_path / "vgg16", tmp_path / "heads")
    jax.tree.map(np.testing.assert_array_equal, pair, params)
    with pytest.raises(UserError, match="without the weights of channels of LPIPS: set heads to"):
        read(tmp_path / "vgg16")
    with pytest.raises(UserError, match=r"no tensor 'net\.slice5\.28\.weight'"):
        read(tmp_path / "heads")


def test_equal_images_have_no_distance_and_no_gradient():
    """Also where no feature is active, whose norm has no derivative."""
    params = FAMILY.to_ours(theirs(), NETWORK, "theirs")
    dark = jax.tree.map(lambda leaf: -abs(leaf), params)
    for weights, x in ((dark, X), (params, Y)):
        found, gradient = distances_and_gradient(weights, x)
        np.testing.assert_array_equal(found, 0)
        np.testing.assert_array_equal(gradient, 0)


def test_images_that_are_too_small_for_a_patchgan():
    PatchGAN(num_layers=3).check(24, 32)
    with pytest.raises(UserError, match="needs images of 24x24 pixels, not 16x64: num_layers=2 wo"):
        PatchGAN(num_layers=3).check(16, 64)
    with pytest.raises(UserError, match="not 5x5: leave it out, by weight 0"):
        PatchGAN(num_layers=1).check(5, 5)


def assert_close(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parity
@needs("torch")
def test_distances_and_gradients_are_those_of_torch():
    """As `lpips.LPIPS(net="vgg")` computes them, `lpips/lpips.py`."""
    weights = {name: torch.tensor(x, requires_grad=True) for name, x in theirs(8).items()}
    pair = [torch.tensor(each.transpose(0, 3, 1, 2), requires_grad=True) for each in (X, Y)]

    def features(images):
        h = (images - torch.tensor(SHIFT, dtype=torch.float32)[:, None, None]) / torch.tensor(
            SCALE, dtype=torch.float32
        )[:, None, None]
        found = []
        for stage, i, place in convolutions():
            if stage and i == 0:
                h = functional.max_pool2d(h, 2)
            name = f"net.slice{stage + 1}.{place}"
            kernel, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
            h = functional.relu(functional.conv2d(h, kernel, bias, padding=1))
            found[stage:] = [h]
        return found

    total = torch.zeros(len(X))
    for stage, both in enumerate(zip(*map(features, pair), strict=True)):
        one, other = (h / (torch.sqrt((h**2).sum(1, keepdim=True)) + 1e-10) for h in both)
        mapped = functional.conv2d((one - other) ** 2, weights[f"lin{stage}.model.1.weight"])
        total = total + mapped.mean((2, 3))[:, 0]
    torch.sum(total).backward()

    network = LPIPS(width=8)
    params = FAMILY.to_ours(theirs(8), network, "theirs")

    def distances(params, x, y):
        found = network.apply({"params": params}, x, y)
        return jnp.sum(found), found

    function = jax.jit(jax.grad(distances, (0, 1, 2), has_aux=True))
    (to_params, *to_images), found = function(params, X, Y)
    assert_close(found, total.detach())
    for ours, image in zip(to_images, pair, strict=True):
        assert_close(ours, image.grad.numpy().transpose(0, 2, 3, 1))
    for name, gradient in FAMILY.to_theirs(to_params, network).items():
        assert_close(gradient, weights[name].grad)


@pytest.mark.parity
@needs("torch")
def test_logits_and_gradients_of_a_patchgan_are_those_of_torch():
    """As `NLayerDiscriminator` of taming-transformers in training, with batch norm."""
    nn = torch.nn
    layers = [nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2)]
    for before, after, stride in ((4, 8, 2), (8, 16, 2), (16, 32, 1)):
        layers += [nn.Conv2d(before, after, 4, stride, 1, bias=False), nn.BatchNorm2d(after)]
        layers += [nn.LeakyReLU(0.2)]
    reference = nn.Sequential(*layers, nn.Conv2d(32, 1, 4, 1, 1))
    generator = torch.Generator().manual_seed(0)
    for weight in reference.parameters():
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator) + 0.1
    images = np.random.default_rng(2).uniform(-1, 1, (3, 24, 40, 3)).astype(np.float32)
    given = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
    logits = reference(given)
    torch.sum(logits * torch.cos(logits)).backward()

    names = ["conv_0", "conv_1", "norm_1", "conv_2", "norm_2", "conv_3", "norm_3", "logits"]
    modules = [module for module in reference if not isinstance(module, nn.LeakyReLU)]

    def ours(of):
        tree = {}
        for name, module in zip(names, modules, strict=True):
            weight = of(module.weight)
            kernel = name.startswith(("conv", "logits"))
            tree[name] = {"kernel": weight.transpose(2, 3, 1, 0)} if kernel else {"scale": weight}
            if module.bias is not None:
                tree[name]["bias"] = of(module.bias)
        return tree

    def total(params, images):
        found = PatchGAN(width=4).apply({"params": params}, images)
        return jnp.sum(found * jnp.cos(found)), found

    function = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    gradients, found = function(ours(lambda x: x.detach().numpy()), images)
    assert_close(found, logits.detach().numpy().transpose(0, 2, 3, 1))
    assert_close(gradients[1], given.grad.numpy().transpose(0, 2, 3, 1))
    jax.tree.map(assert_close, gradients[0], ours(lambda x: x.grad.numpy()))
