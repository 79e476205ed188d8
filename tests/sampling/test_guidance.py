"""Guidance: closed forms, and what each rule promises."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import choices, lookup
from diffjax.conditions import Classes, of_classes
from diffjax.errors import UserError
from diffjax.models import DiT
from diffjax.models.dit.stages import stack_blocks
from diffjax.models.layers.common import attention_layers, attention_off, blocks_off
from diffjax.oracle import analytic
from diffjax.process.paths import Coeffs, Cosine, Linear, Pair, coeffs
from diffjax.sampling import solvers
from diffjax.sampling.grids import Power
from diffjax.sampling.guidance import (
    ClassifierFree,
    Clipped,
    FirstChannels,
    GuidanceModels,
    Limited,
    OtherCondition,
    OtherWeights,
    PlusPlus,
    Projected,
    Rescaled,
    SkipLayers,
    Thresholded,
    WithoutAttention,
    ZeroStar,
    classifier_guidance,
    guide,
    mixes,
)
from diffjax.sampling.sample import Recipe
from diffjax.sampling.solvers import Interval
from diffjax.spec import build
from experiments import sample, train
from experiments.flags import cli

IDDPM = ":objective=iddpm,model=dit"
PATH = Linear()
TIMES = np.array([0.2, 0.5, 0.9], np.float32)
RULES = {name: build(lookup.guidance_called(name)) for name in choices.GUIDANCE}
every_rule = pytest.mark.parametrize("name", RULES)


def two_predictions(size=0.4):
    """`x`, coefficients and two predictions that mix to the same `x`, by NumPy."""
    drawn = np.random.default_rng(0).standard_normal((3, 3, 4, 4, 1))
    x, strong, weak = (size * drawn).astype(np.float32)
    t = TIMES[:, None, None, None]
    c = Coeffs(t, 1.0 - t, t, -np.ones_like(t), np.ones_like(t))
    return x, c, *(Pair(x0, (x - c.a * x0) / c.s) for x0 in (strong, weak))


@jax.jit
def by_every_rule(x, c, on, off, scale):
    return {name: rule(x, c, on, off, scale) for name, rule in RULES.items()}


def assert_pairs(found, expected, atol=2e-5):
    for one, other in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


def test_guided_scores_are_those_of_the_sharpened_density():
    """`p(x|c)^s·p(x)^(1-s)` of two Gaussians at a noise level is one too; its score is linear."""
    path, t = Cosine(), 0.4
    with_label = analytic.Gaussian(jnp.full(1, 0.7), jnp.full((1, 1), 0.2))
    without = analytic.Gaussian(jnp.full(1, -0.3), jnp.full((1, 1), 0.6))
    x = np.linspace(-2, 2, 5, dtype="f")[:, None]

    def predict(x, t, cond):
        on, off = (one.predict(path)(x, t, None) for one in (with_label, without))
        return jax.tree.map(partial(jnp.where, cond[:, None] == 9), off, on)

    @jax.jit
    def eps(scale):
        guided = guide(GuidanceModels(predict, Classes(9)), path, scale=scale)
        return guided(x, jnp.full(len(x), t), jnp.zeros(len(x), jnp.int32)).eps

    a, s = np.cos(0.5 * np.pi * t), np.sin(0.5 * np.pi * t)
    score_on = -(x - a * 0.7) / (a**2 * 0.2 + s**2)
    score_off = -(x - a * -0.3) / (a**2 * 0.6 + s**2)
    for scale in (0.0, 1.0, 3.0):
        score = scale * score_on + (1.0 - scale) * score_off
        np.testing.assert_allclose(eps(scale), -s * score, atol=1e-5, err_msg=str(scale))


@every_rule
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_what_a_rule_says_mixes_to_x(name, scale):
    (x, c, on, off), rule = two_predictions(), RULES[name]
    pair = jax.device_get(by_every_rule(x, c, on, off, scale)[name])
    again = c.a * pair.x0 + c.s * pair.eps
    assert np.allclose(again, x, atol=1e-5) == mixes(rule) == (rule != PlusPlus())


@every_rule
def test_a_scale_of_one_changes_nothing_that_is_within_range(name):
    x, c, on, off = two_predictions(size=0.1)
    pair = by_every_rule(x, c, on, off, 1.0)[name]
    np.testing.assert_allclose(pair.x0, on.x0, atol=2e-5)
    np.testing.assert_allclose(pair.eps, on.eps if mixes(RULES[name]) else off.eps, atol=2e-5)


def test_a_negative_velocity_is_scaled_to_fit():
    """Where one velocity is a multiple of the other there is no direction to go: p·off is on."""
    x, c, on, _ = two_predictions()
    half = 0.5 * (c.da * on.x0 + c.ds * on.eps)
    x0 = x - c.t * half  # of the linear path, x0 = x - t·v
    off = Pair(x0, (x - c.a * x0) / c.s)
    assert_pairs(ZeroStar()(x, c, on, off, 5.0), on)


def test_projected_guidance_moves_at_right_angles():
    x, c, on, off = two_predictions()
    moved = Projected()(x, c, on, off, 6.0).x0 - on.x0
    np.testing.assert_allclose(jnp.sum(moved * on.x0, (1, 2, 3)), 0.0, atol=1e-4)
    assert_pairs(
        Projected(parallel=1.0)(x, c, on, off, 6.0), ClassifierFree()(x, c, on, off, 6.0), 1e-4
    )
    short = Projected(parallel=1.0, longest=0.1)(x, c, on, off, 6.0).x0 - on.x0
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(short**2, (1, 2, 3))), 0.5, rtol=1e-5)


def test_limited_guidance_is_plain_outside_its_interval():
    x, c, on, off = two_predictions()  # at log-SNRs of 2.8, 0 and -4.4
    pair = Limited(low=-1.0, high=1.0)(x, c, on, off, 3.0)
    guided = ClassifierFree()(x, c, on, off, 3.0)
    for found, outside, inside in zip(pair[:2], on[:2], guided[:2], strict=True):
        np.testing.assert_array_equal(found[::2], outside[::2])
        np.testing.assert_array_equal(found[1], inside[1])


@every_rule
def test_any_rule_guides_the_first_channels_alone(name):
    """Three of four channels by the rule, which sees no other; the fourth is that of `on`."""
    drawn = np.random.default_rng(1).normal(size=(3, 3, 4, 4, 4)).astype(np.float32)
    x, (_, c, *_) = drawn[0], two_predictions()
    on, off = (Pair(x0, (x - c.a * x0) / c.s) for x0 in drawn[1:])
    rule = FirstChannels(RULES[name])
    found, alone = jax.device_get(by_first_channels(rule, x, c, on, off))
    for here, there, old in zip(found[:2], alone[:2], on[:2], strict=True):
        np.testing.assert_array_equal(here[..., 3:], old[..., 3:])
        np.testing.assert_allclose(here[..., :3], there, rtol=1e-6)
    if name == "cfg":  # the authors' `forward_with_cfg`, in NumPy
        eps = np.concatenate(
            [off.eps[..., :3] + 4.0 * (on.eps - off.eps)[..., :3], on.eps[..., 3:]], axis=-1
        )
        np.testing.assert_allclose(found.eps, eps, rtol=1e-5, atol=1e-5)


@partial(jax.jit, static_argnums=0)
def by_first_channels(rule, x, c, on, off):
    first = jax.tree.map(lambda leaf: leaf[..., : rule.channels], (x, on, off))
    return rule(x, c, on, off, 4.0), rule.rule(first[0], c, *first[1:], 4.0)


def test_rescaled_guidance_has_the_deviation_of_plain_prediction():
    x, c, on, off = two_predictions()
    found = Rescaled(share=1.0)(x, c, on, off, 5.0).x0
    np.testing.assert_allclose(jnp.std(found, (1, 2, 3)), jnp.std(on.x0, (1, 2, 3)), rtol=1e-5)
    assert_pairs(
        Rescaled(share=0.0)(x, c, on, off, 5.0), ClassifierFree()(x, c, on, off, 5.0), 1e-4
    )


@pytest.mark.parametrize("rule", [Clipped(), Thresholded(quantile=0.9)])
def test_thresholds_keep_x0_in_range(rule):
    x, c, on, off = two_predictions(size=2.0)
    assert float(jnp.abs(ClassifierFree()(x, c, on, off, 4.0).x0).max()) > 1.0
    assert float(jnp.abs(rule(x, c, on, off, 4.0).x0).max()) <= 1.0


@pytest.mark.parametrize(("scale", "rows"), [(None, 3), (jnp.float32(2.0), 6)])
def test_no_scale_costs_one_evaluation(scale, rows):
    seen = []

    def predict(x, t, cond):
        seen.append(len(x))
        return Pair(x, 5.0 * x)

    x = np.full((3, 2), 7.0, np.float32)
    guided = jax.jit(guide(GuidanceModels(predict, Classes(1)), PATH, Clipped(), scale))
    pair = guided(x, TIMES, np.zeros(3, np.int32))
    assert seen == [rows]
    np.testing.assert_array_equal(pair.x0, np.ones((3, 2)))


def test_parts_nest_in_the_order_given():
    rule = build(lookup.guidance_called("projected+limited+clipped"))
    assert rule == Clipped(Limited(Projected()))
    with pytest.raises(UserError, match="'projected' does not wrap another"):
        lookup.guidance_called("limited+projected")
    with pytest.raises(UserError, match="did you mean 'limited'"):
        lookup.guidance_called("cfg+limitd")


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("path", [Cosine(), Linear()])
def test_cfg_plus_plus_is_cfg_whose_scale_follows_the_step(path, share):
    """One of DDIM's steps: `w = share·a'/(a' - s'·a/s)`, from equating the two."""
    t, t_next = jnp.float32(0.6), jnp.float32(0.45)
    x, _, on, off = two_predictions()

    def predict(x, t, cond):
        c = coeffs(path, t, x.ndim)
        without = (cond == 9)[:, None, None, None]
        x0 = jnp.where(without, np.tile(off.x0, (2, 1, 1, 1)), np.tile(on.x0, (2, 1, 1, 1)))
        return Pair(x0, (x - c.a * x0) / c.s)

    @partial(jax.jit, static_argnums=0)
    def step(rule, scale):
        guided = guide(GuidanceModels(predict, Classes(9)), path, rule, scale)
        labels = jnp.zeros(len(x), jnp.int32)

        def denoise(x, t):
            return guided(x, jnp.full(len(x), t), labels)

        return solvers.ddim().step(denoise, Interval(path, t, t_next, jnp.zeros(3)), (), x)[0]

    a, s, a_next, s_next = (float(of(u)) for u in (t, t_next) for of in (path.alpha, path.sigma))
    scale = share * a_next / (a_next - s_next * a / s)
    np.testing.assert_allclose(step(PlusPlus(), share), step(ClassifierFree(), scale), atol=1e-5)


def test_a_weaker_model_and_another_label_are_where_off_comes_from():
    x, c, on, off = two_predictions()
    labels = jnp.array([0, 1, 2])
    seen = []

    def predict(x, t, cond):
        seen.append(cond.tolist())
        pairs = {3: on, 6: jax.tree.map(lambda *p: jnp.concatenate(p), on, off)}
        return pairs[len(x)]

    expected = ClassifierFree()(x, c, on, off, 3.0)
    against = OtherWeights("ema-0.9")
    guided = guide(
        GuidanceModels(predict, weaker=lambda *given: off), PATH, scale=3.0, against=against
    )
    assert_pairs(guided(x, TIMES, labels), expected)
    guided = guide(
        GuidanceModels(predict, Classes(9)), PATH, scale=3.0, against=OtherCondition("7")
    )
    assert_pairs(guided(x, TIMES, labels), expected)
    assert seen == [[0, 1, 2], [0, 1, 2, 7, 7, 7]]


def test_a_classifier_makes_the_conditional_of_the_unconditional_model():
    """Two classes, a Gaussian each: Bayes' rule at a noise level, by the scores' difference."""
    path, t = Cosine(), 0.4
    means, variance = np.array([-0.6, 0.9], "f"), 0.2
    mixture = analytic.GaussianMixture(
        jnp.array([0.3, 0.7]), jnp.asarray(means)[:, None], jnp.full((2, 1, 1), variance)
    )
    a, s = (np.float32(of(0.5 * np.pi * t)) for of in (np.cos, np.sin))

    def log_probability(x, t, cond):
        log_likely = -0.5 * (x - a * means[None]) ** 2 / (a**2 * variance + s**2)
        log_joint = np.log([[0.3, 0.7]]).astype("f") + log_likely
        return jnp.take_along_axis(jax.nn.log_softmax(log_joint), cond[:, None], axis=1)[:, 0]

    x, labels = np.linspace(-2, 2, 9, dtype="f")[:, None], np.arange(9) % 2
    guided = jax.jit(classifier_guidance(mixture.predict(path), path, log_probability))
    found = jax.device_get(guided(x, np.full(9, t, "f"), labels))
    score = -(x - a * means[labels][:, None]) / (a**2 * variance + s**2)
    np.testing.assert_allclose(found.eps, -s * score, atol=1e-5)
    np.testing.assert_allclose(a * found.x0 + s * found.eps, x, atol=1e-5)


def test_skipped_blocks_change_nothing_stacked_or_not():
    """Without the second of two blocks it is the network of the first alone."""
    how = {"num_classes": 2, "patch_size": 2, "hidden_size": 16, "num_heads": 2}
    x, t = np.random.default_rng(0).standard_normal((1, 4, 4, 1), np.float32), np.ones(1, "f")
    net, rng = DiT(depth=2, **how), np.random.default_rng(1)
    shapes = jax.eval_shape(net.init, jax.random.key(1), x, t)["params"]
    params = jax.tree.map(lambda p: 0.2 * rng.standard_normal(p.shape, np.float32), shapes)

    def evaluated(net, params, blocks="none"):
        with blocks_off(blocks):
            return net.apply({"params": params}, x, t)

    @jax.jit
    def all_of(params):
        first = {name: x for name, x in params.items() if name != "block_1"}
        loop = DiT(depth=2, scan=True, **how)
        return (
            evaluated(DiT(depth=1, **how), first),
            evaluated(net, params, "block_[17]"),
            evaluated(loop, stack_blocks(params), "block_1"),
            evaluated(net, params),
        )

    expected, found, stacked, whole = map(np.asarray, all_of(params))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(stacked, expected, atol=1e-6)
    assert np.abs(whole - expected).max() > 1e-3


def test_skipped_layers_add_to_guidance_at_some_noise_levels():
    """`off + 3·(on − off) + 2·(on − skipped)` at log-SNR -4.4 alone, of 2.8, 0 and -4.4."""
    x, c, on, off = two_predictions()
    skipped = Pair(0.5 * off.x0, 2.0 * on.eps)

    def predict(x, t, cond):
        return jax.tree.map(lambda *p: jnp.concatenate(p), on, off)

    models = GuidanceModels(predict, Classes(9), without_blocks=lambda blocks: lambda *_: skipped)
    against = SkipLayers("block_1", strength=2.0, high=-1.0, against=OtherCondition("7"))
    guided = guide(models, PATH, scale=3.0, against=against)
    plain, inside = ClassifierFree()(x, c, on, off, 3.0), np.array([0.0, 0.0, 1.0])
    factor = 2.0 * inside.reshape(-1, *(1,) * (x.ndim - 1)).astype("f")
    expected = Pair(
        plain.x0 + factor * (on.x0 - skipped.x0), plain.eps + factor * (on.eps - skipped.eps)
    )
    assert_pairs(guided(x, TIMES, jnp.array([0, 1, 2])), expected)
    assert Recipe(solvers.ddim(), Power(), 4, guidance_scale=3.0, against=against).nfe == 12
    assert against.unfit(Classes(9), ["block_1/attention"]) is None
    assert "there are block_0" in str(against.unfit(Classes(9), ["block_0/attention"]))


def test_a_pattern_names_layers_or_says_what_is_wrong():
    condition, layers = of_classes(10), ("block_0", "block_1")
    assert WithoutAttention("k_1$").unfit(condition, layers) is None
    assert "'[' is no regular expression" in (WithoutAttention("[").unfit(condition, layers) or "")
    there = "no attention layer matches 'x'; there are block_0, block_1"
    assert WithoutAttention("x").unfit(condition, layers) == there


def test_without_attention_a_token_sees_itself_alone():
    """Moving one pixel then changes its own patch and no other."""
    net = DiT(num_classes=2, patch_size=2, hidden_size=16, depth=2, num_heads=2)
    x, t = np.random.default_rng(0).standard_normal((1, 4, 4, 1), np.float32), np.ones(1, "f")
    rng, shapes = np.random.default_rng(1), jax.eval_shape(net.init, jax.random.key(1), x, t)
    params = jax.tree.map(
        lambda p: 0.2 * rng.standard_normal(p.shape, np.float32), shapes["params"]
    )
    moved = x.copy()
    moved[0, 0, 0, 0] += 1.0

    def changed(layers):
        with attention_off(layers):
            # Of this call alone: what is switched off is no argument of the program.
            apply = jax.jit(lambda image: net.apply({"params": params}, image, t))
            outputs = [np.asarray(apply(image)) for image in (x, moved)]
        return np.abs(outputs[0] - outputs[1])[0, :, :, 0] > 1e-6

    own = np.zeros((4, 4), bool)
    own[:2, :2] = True
    np.testing.assert_array_equal(changed(""), own)
    assert changed("block_1").all()
    assert attention_layers(params) == ["block_0/attention", "block_1/attention"]


def run(script, *arguments):
    return cli.run(script.main, script.FLAGS, usage=script.USAGE, argv=arguments)


@pytest.mark.thorough
def test_a_run_is_guided_against_whatever_is_named(tmp_path, capsys):
    tiny = [
        "--config.num_steps=20", "--config.batch_size=16", "--config.model.hidden_size=16",
        "--config.model.depth=1", "--config.evaluation.num_samples=20",
        "--config.evaluation.solvers=()", "--config.evaluation.batch_size=104",
        "--config.sampling.num_steps=2",
    ]  # fmt: skip
    for name, axes in {"run": IDDPM, "other": IDDPM, "flow": ""}.items():
        given = f"--config=configs/digits.py{axes}", f"--workdir={tmp_path / name}"
        assert run(train, *given, *tiny, f"--config.seed={len(name)}") == 0
    draw = [f"--workdir={tmp_path / 'run'}", "--num_samples=4", "--num_steps=3", "--solver=ddpm"]

    def images(*how):
        out = tmp_path / "images.png"
        assert run(sample, *draw, "--guidance_scale=3", f"--out={out}", *how) == 0
        with np.load(out.with_suffix(".npz")) as file:
            return file["images"], int(file["nfe"])

    plain, nfe = images()
    assert nfe == 6
    for how in ("label:3", "weights:live", f"weights:{tmp_path / 'other'}", "attention:block_0"):
        other, nfe = images(f"--against={how}")
        assert nfe == 6
        assert np.abs(other - plain).max() > 1e-5
    learned, _ = images("--solver=ddpm_learned")
    assert np.abs(learned - plain).max() > 1e-3
    for wrong, message in {
        "--against=label:10": "no label is called '10'",
        "--against=label:x": "no label is called 'x'",
        "--against=null:3": "takes nothing after a colon",
        "--against=weights:ema-0.5": "neither of this run's (live, ema-0.99, ema-0.999) nor",
        f"--against=weights:{tmp_path / 'flow'}": "its path is Linear",
        "--against=attention:block_7": "no attention layer matches 'block_7'; there are block_0",
        "--against=attention:[": "'[' is no regular expression",
        "--guidance=cfg_pp --solver=heun": "PlusPlus returns x0 and noise that do not mix to x",
        f"--workdir={tmp_path / 'flow'} --solver=ddpm_learned": "take the solver ddpm, or train",
    }.items():
        capsys.readouterr()
        assert run(sample, *draw, "--guidance_scale=3", *wrong.split()) == 2
        assert message in capsys.readouterr().err
