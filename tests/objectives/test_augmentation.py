"""Non-leaky augmentation, and with it the first steps of EDM's training, as by its authors' code.

The stored arrays and the script that made them are in `tests/references/edm_training.py`.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from diffjax.conditions import Classes
from diffjax.errors import UserError
from diffjax.models.edm.network import AUGMENT_DIM
from diffjax.models.edm.published import FAMILY
from diffjax.models.unet import UNet
from diffjax.objectives.augmentation import Change, NonLeaky, with_labels
from diffjax.objectives.base import Progress
from diffjax.objectives.couplings import Independent
from diffjax.objectives.denoising import Denoising
from diffjax.optimizers.adam import Adam
from diffjax.optimizers.descent import descent
from diffjax.optimizers.schedules import RiseFromZero
from diffjax.process.paths import Pair
from diffjax.training.averages import Averages
from diffjax.training.state import init_state
from diffjax.training.step import StepSettings, make_train_step
from diffjax.wiring import build_objective
from tests.references import edm_training as reference
from tests.support.tiny_run import tiny_config

IMAGES = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)


def changed(images=IMAGES, flips=((False, False),) * 2, **change):
    """Images after a change; what is not named stays."""
    none = dict.fromkeys(("scale", "angle", "stretch", "direction"), np.zeros(2, np.float32))
    none["shift"] = np.zeros((2, 2), np.float32)
    of = {name: np.asarray(value, np.float32) for name, value in change.items()}
    given = Change(flips=np.asarray(flips), **{**none, **of})
    return np.asarray(_changed(images, given)), np.asarray(given.labels)


_changed = jax.jit(lambda images, change: NonLeaky(None).changed(images, change))


def test_no_change_is_none_and_has_no_labels():
    found, labels = changed()
    np.testing.assert_allclose(found, IMAGES, atol=2e-6)
    assert labels.shape == (2, AUGMENT_DIM)
    assert not labels.any()


def test_flips_and_whole_shifts_move_pixels_and_edges_are_mirrors():
    """0.125 of the width of 12 pixels, and of the height of 8, are the unit of a shift."""
    flipped, labels = changed(flips=((True, False), (True, True)))
    np.testing.assert_allclose(flipped[0], IMAGES[0, :, ::-1], atol=2e-6)
    np.testing.assert_allclose(flipped[1], IMAGES[1, ::-1, ::-1], atol=2e-6)
    assert labels.tolist() == [[1, 0] + 7 * [0], [1, 1] + 7 * [0]]
    shifted, labels = changed(shift=((2 / 1.5, 0.0), (0.0, -3.0)))
    np.testing.assert_allclose(shifted[0, :, 2:], IMAGES[0, :, :-2], atol=2e-6)
    np.testing.assert_allclose(shifted[0, :, :2], IMAGES[0, :, 2:0:-1], atol=2e-6)
    np.testing.assert_allclose(shifted[1, :-3], IMAGES[1, 3:], atol=2e-6)
    np.testing.assert_allclose(labels[:, -2:], ((2 / 1.5, 0.0), (0.0, -3.0)), rtol=1e-6)


def test_waves_are_turned_and_scaled_as_their_equations_say():
    """Long waves pass the filters; their values at the moved places are known."""
    y, x = np.meshgrid(np.arange(24) - 11.5, np.arange(24) - 11.5, indexing="ij")

    def wave(x, y):
        return np.sin(0.25 * x + 0.1 * y)[..., None].astype(np.float32)

    images = np.stack([wave(x, y)] * 2)
    angle, log_scale, stretch, direction = 0.5, 0.5, 1.0, 0.3
    found, labels = changed(
        images,
        angle=[angle, 0.0],
        scale=[log_scale, 0.0],
        stretch=[0.0, stretch],
        direction=[0.0, direction],
    )
    cos, sin, size = np.cos(angle), np.sin(angle), 2 ** (0.2 * log_scale)
    turned = wave((cos * x - sin * y) / size, (sin * x + cos * y) / size)
    # Along the direction, from which y is below x, by the factor; across it by the inverse.
    cos, sin, factor = np.cos(direction), np.sin(direction), 2 ** (0.2 * stretch)
    along, across = (cos * x - sin * y) / factor, (sin * x + cos * y) * factor
    stretched = wave(cos * along + sin * across, -sin * along + cos * across)
    inside = np.s_[6:-6, 6:-6]  # away from the mirrors
    np.testing.assert_allclose(found[0][inside], turned[inside], atol=0.02)
    np.testing.assert_allclose(found[1][inside], stretched[inside], atol=0.02)
    told = [0, 0, log_scale, np.cos(angle) - 1, np.sin(angle), 0, 0, 0, 0]
    np.testing.assert_allclose(labels[0], told, atol=1e-6)
    told = [0, 0, 0, 0, 0, stretch * np.cos(direction), stretch * np.sin(direction), 0, 0]
    np.testing.assert_allclose(labels[1], told, atol=1e-6)


def test_each_kind_of_change_has_its_probability_and_spread():
    n, p = 4_000, 0.25
    change = jax.jit(lambda key: NonLeaky(None, probability=p).draw(key, n))(jax.random.key(0))
    error = 4 * np.sqrt(0.25 / n)  # four standard errors of a share, at most
    flips = np.asarray(change.flips).mean(axis=0)
    np.testing.assert_allclose(flips, (0.5, p / 2), atol=error)
    for each in (change.scale, change.angle, change.stretch, change.shift[:, 0]):
        happened = np.asarray(each) != 0
        np.testing.assert_allclose(happened.mean(), p, atol=error)
    assert ((np.asarray(change.shift) != 0).sum(axis=1) != 1).all()
    drawn = np.asarray(change.scale)[np.asarray(change.scale) != 0]
    np.testing.assert_allclose(drawn.std(), 1.0, atol=0.1)
    turned = np.asarray(change.angle)[np.asarray(change.angle) != 0]
    np.testing.assert_allclose(turned.std(), np.pi / np.sqrt(3), atol=0.15)


def test_flips_from_top_to_bottom_and_rotations_can_be_left_out():
    wrapper = NonLeaky(None, probability=1.0, vertical_flips=0.0, rotations=0.0)
    change = wrapper.draw(jax.random.key(0), 50)
    assert change.flips[:, 0].any()
    assert not change.flips[:, 1].any()
    assert not np.asarray(change.angle).any()
    assert np.asarray(change.scale).all()


def test_the_loss_is_that_of_the_changed_images_and_the_network_has_the_labels():
    """A stand-in for a network, whose output is its labels of augmentation."""
    seen = []

    def apply(params, x, noise_label, cond, *, key=None):
        seen.append(cond)
        return jnp.zeros_like(x)

    inner = build_objective(tiny_config("objective=flow"))
    outer = NonLeaky(inner)
    key, batch = jax.random.key(3), {"image": jnp.asarray(IMAGES), "cond": jnp.array([1, 2])}
    progress = Progress(jnp.zeros((), jnp.int32))
    loss, _ = outer(apply, None, None, key, batch, progress)
    first, second = jax.random.split(key)
    change = outer.draw(first, 2)
    images = outer.changed(batch["image"], change)
    cond = with_labels(batch["cond"], change.labels)
    expected, _ = inner(apply, None, None, second, {"image": images, "cond": cond}, progress)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert set(seen[0]) == {"condition", "augmentation"}
    np.testing.assert_allclose(seen[0]["augmentation"], change.labels)


@dataclass(frozen=True)
class GivenTimes:
    """Times that are known beforehand."""

    t: Any

    def quantile(self, u, path):
        return self.t


@dataclass(frozen=True)
class GivenNoise(Independent):
    """Noise that is known beforehand."""

    noise: Any = None

    def __call__(self, key, batch, noise):
        return Pair(batch["image"], self.noise)


@dataclass(frozen=True)
class GivenChange(NonLeaky):
    """Changes that are known beforehand."""

    change: Any = None

    def draw(self, key, batch_size):
        return self.change


def drawn(step):
    """What EDM's code draws in a step, in its order: σ, the change, noise."""
    random, batch = reference.numbers(step), reference.BATCH
    sigma = np.exp(1.2 * random.normal(size=(batch, 1, 1, 1)).astype(np.float32) - 1.2)

    def happens(value, probability=reference.CHANGED, shape=(batch,)):
        return np.where(random.uniform(size=shape) < probability, value, 0)

    wide = (batch, 1, 1, 1)
    right = happens(random.integers(2, size=wide), 1.0, wide)
    down = happens(random.integers(2, size=wide), shape=wide)
    scale = happens(random.normal(size=batch))
    angle = happens((random.uniform(size=batch) * 2 - 1) * np.pi)
    stretch, direction = random.normal(size=batch), (random.uniform(size=batch) * 2 - 1) * np.pi
    stretch, direction = happens(stretch), happens(direction, 0.5)
    shift = happens(random.normal(size=(2, batch)), shape=(1, batch))
    noise = random.normal(size=(batch, 3, reference.SIDE, reference.SIDE))
    change = Change(
        np.concatenate([right.reshape(-1, 1), down.reshape(-1, 1)], axis=1).astype(bool),
        *(x.astype(np.float32) for x in (scale, angle, stretch, direction, shift.T)),
    )
    return sigma.reshape(-1), change, noise.transpose(0, 2, 3, 1).astype(np.float32)


@pytest.mark.thorough
def test_two_hundred_steps_of_edm_are_those_of_its_authors():
    """Loss, augmentation, dropout, rate, Adam and average: all random numbers are NumPy's.

    Their loss is a sum over pixels and ours a mean, which for Adam is another epsilon.
    """
    denoiser = FAMILY.network(
        image_shape=(reference.SIDE, reference.SIDE, 3),
        num_classes=reference.NUM_CLASSES,
        channels=16,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        dropout=reference.DROPOUT,
    )
    assert isinstance(denoiser.network, UNet)
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape), FAMILY.shapes(denoiser))
    theirs = FAMILY.to_theirs(nothing, denoiser)
    filters = {name: array for name, array in theirs.items() if name.endswith("resample_filter")}
    named = [name for name in theirs if name not in filters]
    initial = {name: reference.drawn(name, theirs[name].shape) for name in named}
    params = FAMILY.to_ours({**filters, **initial}, denoiser, "theirs")
    shapes: list[tuple[int, ...]] = []

    def network(params, x, noise_label, cond, masks):
        layers = iter(masks)

        def dropped(call, args, kwargs, context):
            if not isinstance(context.module, nn.Dropout):
                return call(*args, **kwargs)
            shapes.append(args[0].shape)
            mask = next(layers, jnp.ones(args[0].shape, bool))
            return jnp.where(mask, args[0] / (1 - reference.DROPOUT), 0.0)

        with nn.intercept_methods(dropped):
            return denoiser.network.apply({"params": params}, x, noise_label, cond, train=True)

    edm = build_objective(tiny_config("objective=edm,noise_label=log_sigma"))
    assert isinstance(edm, Denoising)
    size = reference.SIDE**2 * 3
    optimizer = descent(
        reference.NUM_STEPS,
        Adam(eps=1e-8 / size),
        reference.RATE,
        warmup_steps=0,
        schedule=RiseFromZero(reference.RAMP_STEPS),
        clip_norm=np.inf,
    )
    decay = 0.5 ** (1 / reference.HALF_LIFE_STEPS)
    averages = Averages((decay,), rampup_ratio=reference.RAMPUP_RATIO)

    @jax.jit
    def step(state, batch, sigma, change, noise, masks):
        given = replace(edm, times=GivenTimes(sigma), coupling=GivenNoise(noise=noise))
        make = make_train_step(
            lambda params, x, label, cond, *, key=None: network(params, x, label, cond, masks),
            GivenChange(given, change=change),
            optimizer,
            StepSettings(
                num_steps=reference.NUM_STEPS,
                averages=averages,
                condition=Classes(reference.NUM_CLASSES),
            ),
        )
        return make(state, jax.random.key(0), batch)

    images, labels = reference.images_and_labels()
    images = images.astype(np.float32) / 127.5 - 1
    x = jnp.asarray(images[0])
    jax.eval_shape(lambda: network(params, x, jnp.ones(len(x)), jnp.asarray(labels[0]), ()))
    layers, losses = tuple(shapes), []
    state = init_state(params, optimizer, averages)
    for number in range(reference.NUM_STEPS):
        masks = [reference.kept(number, *each) for each in enumerate(layers)]
        batch = {"image": images[number], "label": labels[number].astype(np.int32)}
        state, metrics = step(state, batch, *drawn(number), masks)
        losses.append(float(metrics["loss"]))
    with np.load(reference.FILE) as stored:
        np.testing.assert_allclose(losses, stored["losses"], rtol=1e-5)
        for name, found in (("trained", state.params), ("averaged", state.ema[averages.names[0]])):
            here = FAMILY.to_theirs(found, denoiser)
            entries = reference.entries({name: np.asarray(here[name]) for name in named})
            moved = stored[name] - reference.entries(initial)
            error = np.linalg.norm(entries - stored[name]) / np.linalg.norm(moved)
            assert error < 0.01, (name, error)


def test_what_has_other_places_of_the_image_is_refused():
    outer = NonLeaky(build_objective(tiny_config("objective=translation")))
    with pytest.raises(UserError, match="changes images alone"):
        outer(None, None, None, jax.random.key(0), {}, Progress(jnp.zeros((), jnp.int32)))
