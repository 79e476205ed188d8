"""Training and evaluation promote types by hand.

So they run under their users' strict flags. JAX refuses what is implicit while a function is
traced, so little here is compiled.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import choices
from diffjax.conditions import of_classes
from diffjax.evaluation.extractors.classifier import Classifier
from diffjax.evaluation.extractors.inception import resize
from diffjax.evaluation.scores import neighbours
from diffjax.models.clip.network import clip_vision
from diffjax.models.dinov2.network import dinov2
from diffjax.models.dit import DiT
from diffjax.models.edm.network import SongUNet
from diffjax.models.inception.network import InceptionV3
from diffjax.models.layers.attention import IMPLEMENTATIONS, REVERSE_ONLY
from diffjax.oracle.analytic import Gaussian
from diffjax.process.paths import Linear
from diffjax.process.precond import Meaning
from diffjax.process.targets import Noise
from diffjax.runs.setup import set_up
from diffjax.spec import spec
from diffjax.studies.validation import LossByLogSNR
from diffjax.training.nonfinite import NonFinite
from diffjax.training.step import make_train_step
from diffjax.wiring import traits_of
from tests.support.tiny_network import Plain
from tests.support.tiny_run import tiny_config

SHAPE = (8, 8, 1)


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def trace(arguments="", **changes):
    """Initialisation and one step: forwards, backwards, the update and the averages."""
    config = tiny_config(arguments, **changes)
    config.unlock()
    traits = traits_of(config)
    # Networks are seen in test_both_networks_train; this one has no activations, and one time.
    needs_dit = any(
        other in arguments for other in ("model=", "dispersive", "repa", "ladd", "adversarial")
    )
    if not needs_dit and traits.meaning is not Meaning.AVERAGE_VELOCITY:
        config.model = spec(Plain)
    if traits.meaning is Meaning.END_OF_FLOW:
        config.sampling.update(solver=choices.copy(choices.SOLVERS[traits.solver]))
        config.sampling.guidance_scale = 1.0
        config.evaluation.solvers = (traits.solver,)
    if traits.distils:
        config.teacher = "runs/teacher"
    for wrapper in config.wrappers:
        if "features" in wrapper:
            wrapper.features = (2, 2, 5)
        if "shift_std" in wrapper:  # images are shifted, and the network knows it
            config.model = spec(SongUNet, channels=8, channel_multipliers=(1,), num_res_blocks=1)
    setup = set_up(config, SHAPE, of_classes(10))
    step = make_train_step(
        setup.wired.apply,
        setup.wired.objective,
        setup.fitted(setup.optimizer),
        replace(setup.step_settings, nonfinite=NonFinite(skip_in_a_row=2)),
    )
    key, skipped = jax.random.key(0), jax.ShapeDtypeStruct((2,), jnp.int32)
    state = setup.abstract._replace(skipped=skipped)
    new, metrics = jax.eval_shape(step, state, key, setup.wired.batch_shapes(16))
    before, after = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), s) for s in (state, new))
    assert before == after
    assert metrics["loss"].dtype == jnp.float32


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("model", ["dit", "unet"])
def test_both_networks_train(model):
    trace(f"model={model}")


QUICK = "objective=imm", "objective=dmd2", "wrappers=dispersive", "uniforms=stratified"
QUICK += "optimizer=muon", "objective=edm2"
OF_V = (
    "continuous_consistency",
    "continuous_consistency_distillation",
    "score_regularised_consistency",
)
ARGUMENTS = [
    *(f"objective={name}" for name in choices.OBJECTIVES),
    *(f"wrappers={name}" for name in choices.WRAPPERS),
    "objective=mean_flow,wrappers=uncertainty",
    *(
        # Of noise and score nothing can be decoded where flow matching's path is pure noise.
        f"{'objective=v,' if axis in ('path', 'target') or name in OF_V else ''}{axis}={name}"
        for axis, table in choices.AXES.items()
        for name in table
    ),
    *(f"{axis}={name}" for axis, table in choices.TRAINING_AXES.items() for name in table),
]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(text, marks=[] if text in QUICK else pytest.mark.thorough(tenth=False))
        for text in ARGUMENTS
    ],
)
def test_objectives_and_their_parts_train(arguments):
    trace(arguments)


@pytest.mark.thorough
def test_power_function_averages_are_kept():
    trace("model=tiny", ema_lengths=(0.05, 0.1))


@pytest.mark.thorough
def test_a_batch_in_parts_trains():
    trace(accumulation_steps=2)


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name not in REVERSE_ONLY])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention(name, dtype):
    """But for what runs on a GPU or a TPU alone, and is a kernel of somebody else's."""
    q = jax.ShapeDtypeStruct((2, 16, 2, 8), dtype)
    jax.eval_shape(jax.grad(lambda q: jnp.sum(IMPLEMENTATIONS[name](q, q, q))), q)


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_bfloat16(scan):
    """Activations of half precision among parameters of single precision."""
    network = DiT(10, 4, 16, 2, 2, dropout=0.1, dtype="bfloat16", scan=scan, remat="products")
    x, t, cond = jnp.ones((2, *SHAPE)), jnp.ones((2, 2)), jnp.array([1, 10])
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}

    def total(params):
        out: Any = network.apply(params, x, t, cond, True, rngs=keys)
        return jnp.sum(out)

    jax.eval_shape(jax.grad(total), jax.eval_shape(network.init, keys, x, t, cond))


@pytest.mark.parametrize(
    "large", [pytest.param(True, marks=pytest.mark.thorough(tenth=False)), False]
)
def test_feature_networks(large):
    networks = [
        (InceptionV3(), lambda x: resize(x)),
    ]
    others = [
        (dinov2(8, 1, 2, 4), lambda x: jnp.ones((2, 28, 28, 3))),
        (clip_vision(8, 1, 2, 8, grid=2), lambda x: jnp.ones((2, 28, 28, 3))),
        (Classifier(10, (8, 8), (2, 2), 16), lambda x: x[..., :1]),
    ]
    for network, prepared in networks if large else others:
        x = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
        jax.eval_shape(
            lambda x, network=network, prepared=prepared: network.init_with_output(
                jax.random.key(0), prepared(x)
            ),
            x,
        )


def test_neighbours():
    images = np.linspace(-1, 1, 6 * 4, dtype=np.float32).reshape(6, 2, 2, 1)
    indices, distances = neighbours.nearest_neighbours(images[:2], images, k=2)
    assert indices[:, 0].tolist() == [0, 1]
    np.testing.assert_allclose(distances[:, 0], 0.0)


def test_the_loss_by_log_snr():
    predict = Gaussian(jnp.zeros(4), jnp.eye(4)).predict(Linear())
    loss = LossByLogSNR(lambda _: predict, Linear(), jax.random.key(0), {"noise": Noise()})
    rows, x0 = np.arange(3), np.ones((3, 2, 2, 1), np.float32)
    low, high = np.float32(-1.0), np.float32(1.0)
    jax.eval_shape(loss._one_bin, None, x0, rows, rows, (1, low, high))
