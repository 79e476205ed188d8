"""REPA: closed forms, the authors' loss and gradients, which parameters learn, and whole runs."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.conditions import Tokens, TokenStates, of_classes
from diffjax.data import Augment, digits, featured
from diffjax.errors import UserError
from diffjax.models.dit.published import FAMILY
from diffjax.models.sd3 import MMDiT
from diffjax.objectives.base import Progress
from diffjax.objectives.denoising import Denoising
from diffjax.objectives.repa import PROJECTOR, REPA
from diffjax.process import paths, targets, times, weights
from diffjax.process.precond import Precond, TimeLabel
from diffjax.runs.checks import check_pairs
from diffjax.runs.parts import build_parts
from diffjax.spec import spec
from diffjax.training.sharding import make_mesh
from diffjax.wiring import check_wired, wire
from tests.references import dit, repa, transformers
from tests.support.patches import patches
from tests.support.tiny_run import tiny_config

FLOW = Denoising(
    paths.Linear(), Precond(targets.Velocity(), TimeLabel(1.0)), weights.Constant(), times.Uniform()
)
SMALL = REPA(FLOW, features=(2, 2, 5), hidden_size=8)
PROGRESS = Progress(jnp.zeros((), jnp.int32))


def tokens(seed=0, batch=3, width=4):
    shape = (batch, 2, 2, width)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def small(**changes):
    """An objective, and drawn parameters of its projector."""
    objective = replace(SMALL, **changes)
    shapes = jax.eval_shape(lambda key: objective.init_params(key, 4), jax.random.key(0))
    random = np.random.default_rng(1)
    draw = lambda leaf: random.normal(size=leaf.shape).astype(np.float32)  # noqa: E731
    return objective, jax.tree.map(draw, shapes)[PROJECTOR]


def test_tokens_that_are_aligned_have_cosine_1_and_orthogonal_ones_0():
    objective, params = small()
    found = np.asarray(objective.projector.apply({"params": params}, tokens()))
    turned = found.copy()
    turned[..., 0], turned[..., 1] = -found[..., 1], found[..., 0]
    turned[..., 2:] = 0.0  # Orthogonal in the first two numbers, and nothing else.
    for features, cosine in ((3.0 * found, 1.0), (-found, -1.0), (turned, 0.0)):
        batch = {"features": features}
        cosines = objective.alignment(params, jnp.asarray(tokens()), batch)
        np.testing.assert_allclose(cosines, cosine, atol=1e-6)


@pytest.mark.thorough
def test_the_loss_is_the_objectives_minus_the_cosines():
    """With a network whose hidden tokens are known, in the order of NumPy."""
    objective, params = small(scale=0.7)
    hidden, features = tokens(), tokens(2, width=5)
    batch = {"image": tokens(3), "features": features, "cond": jnp.zeros(3, jnp.int32)}

    def apply(params, x, noise_label, cond, *, key=None, hidden=False):
        return (0.5 * x, (jnp.asarray(tokens()),)) if hidden else 0.5 * x

    key = jax.random.key(5)
    loss, metrics = objective(apply, {PROJECTOR: params}, None, key, batch, PROGRESS)
    plain, _ = FLOW(apply, {}, None, key, batch, PROGRESS)
    h = hidden.astype(np.float64)
    for name in ("in", "middle", "out"):
        h = h @ params[name]["kernel"] + params[name]["bias"]
        h = h if name == "out" else h / (1 + np.exp(-h))
    lengths = np.linalg.norm(h, axis=-1) * np.linalg.norm(features, axis=-1)
    cosines = (np.sum(h * features, -1) / lengths).mean((1, 2))
    np.testing.assert_allclose(loss, plain - 0.7 * cosines, rtol=1e-5)
    assert metrics.keys() == {"log_snr"}


@pytest.mark.thorough
def test_irepa_standardises_features_over_places_and_convolves_tokens():
    objective, params = small(spatial=True)
    assert params["conv"]["kernel"].shape == (3, 3, 4, 5)
    features = tokens(2, width=5)
    alike = objective.alignment(params, jnp.asarray(tokens()), {"features": 4 * features + 7})
    expected = objective.alignment(params, jnp.asarray(tokens()), {"features": features})
    np.testing.assert_allclose(alike, expected, atol=1e-5)
    mean = features.mean((1, 2), keepdims=True)
    target = (features - mean) / (features.std((1, 2), keepdims=True, ddof=1) + 1e-6)
    padded = np.pad(tokens(), ((0, 0), (1, 1), (1, 1), (0, 0)))
    found = np.zeros((3, 2, 2, 5))
    for i in range(2):
        for j in range(2):
            window = padded[:, i : i + 3, j : j + 3]
            found[:, i, j] = np.tensordot(window, params["conv"]["kernel"], 3)
    found += params["conv"]["bias"]
    lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(target, axis=-1)
    np.testing.assert_allclose(
        expected, (np.sum(found * target, -1) / lengths).mean((1, 2)), atol=1e-5
    )


@pytest.mark.thorough
def test_tokens_of_length_0_have_a_gradient():
    """As of rows that another part of an accumulated batch computes, before any step."""
    objective, params = small()
    params = jax.tree.map(np.zeros_like, params)
    slope = jax.grad(
        lambda h: objective.alignment(params, h, {"features": tokens(1, width=5)}).sum()
    )
    assert np.isfinite(slope(jnp.zeros((3, 2, 2, 4)))).all()


class _Given(Denoising):
    """With the times and the noise of the stored arrays."""

    def at_random_times(self, key, batch):
        noised = super().noised(jnp.asarray(repa.TIMES), key, batch)
        pair = noised.pair._replace(eps=jnp.asarray(repa.NOISE))
        return noised._replace(pair=pair, x_t=noised.c.a * pair.x0 + noised.c.s * pair.eps)


def test_losses_and_gradients_are_those_of_the_authors_code():
    with np.load(repa.FOLDER / "REPA.npz", allow_pickle=False) as file:
        stored = dict(file)
    denoiser = FAMILY.network((dit.SIDE, dit.SIDE, dit.CHANNELS), dit.NUM_CLASSES, **dit.SETTINGS)
    network: Any = denoiser.network.clone(out_channels=repa.CHANNELS, hidden_depths=(repa.DEPTH,))
    denoiser = replace(denoiser, network=network)
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape), FAMILY.shapes(denoiser))
    shapes = {name: x.shape for name, x in FAMILY.to_theirs(nothing, denoiser).items()}
    positions = FAMILY.to_theirs(nothing, denoiser)["pos_embed"]
    shapes.pop("pos_embed")
    layers = {"in": 0, "middle": 2, "out": 4}
    sizes = (dit.SETTINGS["hidden_size"], repa.HIDDEN_SIZE, repa.HIDDEN_SIZE, repa.NUMBERS)
    of_projector = {}
    for i, place in enumerate(layers.values()):
        of_projector[f"projectors.0.{place}.weight"] = (sizes[i + 1], sizes[i])
        of_projector[f"projectors.0.{place}.bias"] = (sizes[i + 1],)
    drawn = dit.drawn(shapes | of_projector)
    own = {name: x for name, x in drawn.items() if name not in of_projector}
    params = FAMILY.to_ours(own | {"pos_embed": positions}, denoiser, "theirs") | {
        PROJECTOR: {
            name: {
                "kernel": drawn[f"projectors.0.{place}.weight"].T,
                "bias": drawn[f"projectors.0.{place}.bias"],
            }
            for name, place in layers.items()
        }
    }
    given = _Given(FLOW.path, FLOW.precond, FLOW.weight, FLOW.times)
    objective = REPA(
        given,
        scale=repa.SCALE,
        features=repa.FEATURES.shape[1:],
        depth=repa.DEPTH,
        hidden_size=repa.HIDDEN_SIZE,
    )
    batch = {"image": dit.IMAGES, "cond": dit.LABELS, "features": repa.FEATURES}
    batch = jax.tree.map(jnp.asarray, batch)

    def apply(params, x, noise_label, cond, *, key=None, hidden=False):
        variables = {"params": {k: x for k, x in params.items() if k != PROJECTOR}}
        out, sown = network.apply(variables, x, noise_label, cond, mutable=["intermediates"])
        return (out, sown["intermediates"]["hidden"]) if hidden else out

    @jax.jit
    def run(params):
        def mean_loss(params):
            loss, _ = objective(apply, params, None, jax.random.key(0), batch, PROGRESS)
            return loss.mean(), loss

        return jax.value_and_grad(mean_loss, has_aux=True)(params)

    (mean, loss), gradients = jax.device_get(run(params))
    expected = stored["denoising"].mean() + repa.SCALE * stored["alignment"]
    assert abs(mean - expected) < 1e-5 * abs(expected)
    assert np.ptp(loss - stored["denoising"]) > 1e-3  # Cosines of each example, not of the batch.
    ours = gradients.pop(PROJECTOR)
    theirs = FAMILY.to_theirs(gradients, denoiser)
    theirs.pop("pos_embed")
    for name, place in layers.items():
        theirs[f"projectors.0.{place}.weight"] = ours[name]["kernel"].T
        theirs[f"projectors.0.{place}.bias"] = ours[name]["bias"]
    found = transformers.projections(theirs)
    error = np.linalg.norm(found - stored["projections"]) / np.linalg.norm(stored["projections"])
    assert error < 1e-5


def repa_config(arguments="wrappers=repa", **changes):
    config = tiny_config(arguments)
    config.unlock()
    config.data = spec(featured, data=spec(digits), extractor=spec(patches))
    for wrapper in config.wrappers:
        if "features" in wrapper:
            wrapper.update(features=(2, 2, 5), hidden_size=8)
    config.update_from_flattened_dict(changes)
    return config.lock()


def wired_of(config):
    return wire(config, (8, 8, 1), of_classes(10))


@pytest.mark.parametrize(
    "arguments",
    [
        "objective=sit,wrappers=repa",
        *(
            pytest.param(text, marks=pytest.mark.thorough)
            for text in (
                "objective=ddpm,wrappers=irepa",
                "objective=jit,wrappers=repa",
                "objective=dit,wrappers=learned_variance+repa",
                "wrappers=dispersive+repa",
                "wrappers=repa+uncertainty",
                "loss=interpolant,wrappers=repa",
            )
        ),
    ],
)
def test_it_goes_around_any_objective(arguments):
    config = repa_config(arguments)
    check_wired(wired_of(config), config.batch_size, config.num_steps)


@pytest.mark.thorough
@pytest.mark.parametrize("scan", [False, True])
def test_blocks_up_to_the_depth_and_the_projector_learn_from_it_and_nothing_above(scan):
    changes = {"model.depth": 4, "model.dropout": 0.0, "model.scan": scan}
    config = repa_config(**changes)
    config.unlock()
    config.wrappers[0].depth = 2
    wired = wired_of(config)
    random = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.3 * random.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    params = jax.tree.map(draw, wired.params_shape)
    shapes = wired.batch_shapes(4)
    images, features = (draw(shapes[name]) for name in ("image", "features"))
    batch = {"image": images, "features": features, "cond": jnp.arange(4)}

    def term(params):
        both = (replace(wired.objective, scale=scale) for scale in (0.0, 1.0))
        key = jax.random.key(1)
        without, with_it = (
            each(wired.apply, params, None, key, batch, PROGRESS)[0].mean() for each in both
        )
        return with_it - without

    gradient = jax.jit(jax.grad(term))(params)
    size = lambda tree: max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))  # noqa: E731
    if scan:
        gradient |= {f"block_{i}": jax.tree.map(lambda x, i=i: x[i], gradient["blocks"])
                     for i in range(4)}  # fmt: skip
    learn = ("block_0", "block_1", "patch_embedding", "conditioning", PROJECTOR)
    assert all(size(gradient[name]) > 1e-4 for name in learn)
    # The two losses of the network cancel but for rounding.
    rest = ("block_2", "block_3", "final_modulation", "final_out")
    assert all(size(gradient[name]) < 1e-6 for name in rest)


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("scan", [False, True])
def test_image_tokens_of_mmdit_learn_from_it_up_to_the_depth(scan):
    """Blocks up to the depth, those of the text within them too: attention joins both."""
    config = repa_config()
    config.unlock()
    config.model = spec(MMDiT, hidden_size=16, depth=4, num_heads=2, patch_size=4, scan=scan)
    config.wrappers[0].depth = 2
    condition = Tokens(length=3, width=6, pooled_width=5)
    wired = wire(config.lock(), (8, 8, 1), condition)
    random = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.3 * random.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    params = jax.tree.map(draw, wired.params_shape)
    batch = {"image": draw(jnp.zeros((4, 8, 8, 1))), "features": draw(jnp.zeros((4, 2, 2, 5)))}
    states, pooled = draw(jnp.zeros((4, 3, 6))), draw(jnp.zeros((4, 5)))
    batch["cond"] = TokenStates(states, jnp.ones((4, 3), bool), pooled)
    x, t = batch["image"], jnp.full(4, 0.5)

    def alignment(params):
        _, (hidden,) = wired.apply(params, x, t, batch["cond"], hidden=True)
        objective: Any = wired.objective
        return objective.alignment(params[PROJECTOR], hidden, batch).mean()

    gradient = jax.jit(jax.grad(alignment))(params)
    size = lambda tree: max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))  # noqa: E731
    if scan:
        blocks = [jax.tree.map(lambda x, i=i: x[i], gradient["blocks"]) for i in range(3)]
        gradient |= {f"block_{i}": block for i, block in enumerate(blocks)}
        gradient["block_3"] = gradient["blocks_3"]
    learn = "block_0", "block_1", "context_embedding", "pooled_hidden", PROJECTOR
    assert all(size(gradient[name]) > 1e-5 for name in learn)
    assert all(size(gradient[name]) == 0 for name in ("block_2", "block_3", "final_out"))
    check_wired(wired, config.batch_size, config.num_steps)


@pytest.mark.parametrize(
    ("arguments", "changes", "said"),
    [
        ("model=unet,wrappers=repa", {}, "REPA takes the tokens after a block .* UNet has none"),
        ("wrappers=repa", {"model.patch_size": 2}, "features=2x2x5 do not lie on the 4x4 tokens"),
        pytest.param(
            "wrappers=repa",
            {"wrappers": 3},
            "no tokens after 3 blocks in a network of depth=1",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            "objective=mean_flow,wrappers=repa",
            {},
            "MeanFlow evaluates the network within a deriv",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_what_has_no_such_tokens_is_refused_in_one_line(arguments, changes, said):
    config = repa_config(arguments)
    config.unlock()
    if depth := changes.pop("wrappers", 0):
        config.wrappers[0].depth = depth
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=said):
        check_wired(wired_of(config), config.batch_size, config.num_steps)


def parts_of(config, data):
    mesh = make_mesh(data=-1, fsdp=1, tensor=1, sequence=1)
    return build_parts(config, data.image_shape, data.condition, mesh)


def test_data_without_features_are_refused_before_the_first_step():
    data = digits()
    with pytest.raises(UserError, match="aligns with features of 2x2x5, and digits has none"):
        check_pairs(parts_of(repa_config(), data), data)


@pytest.mark.thorough
def test_other_features_and_changed_images_are_refused_before_the_first_step():
    data, config = digits(), repa_config()
    parts = parts_of(config, data)
    with pytest.raises(UserError, match="those of digits are 4x2x5"):
        check_pairs(parts, featured(data, patches(rows=4)))
    with_features = featured(data, patches())
    check_pairs(parts, with_features)
    batch: Any = with_features.train.gather([5, 900])
    images = (batch["image"] / 127.5 - 1).astype(np.float32)
    np.testing.assert_allclose(batch["features"], patches().features(images), atol=1e-6)
    config.unlock()
    config.augment = spec(Augment, flip_probability=0.5)
    with pytest.raises(UserError, match="augment changes them"):
        check_pairs(replace(parts, config=config), with_features)
