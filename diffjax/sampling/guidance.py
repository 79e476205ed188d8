"""Guidance: two predictions for the same `x` are combined into one.

`on` is the prediction of the model with its condition. `off` is a second, weaker prediction that
guidance leads away from. Its source (`Against`) may be the model without the condition or with
another one, a model with other weights, or the model without attention in some layers. A rule
(`Rule`) combines both, most simply as `off + scale·(on - off)`. Some rules change the result of
another rule, so rules can be nested.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from diffjax.compiling import once
from diffjax.conditions import Condition, Unconditional
from diffjax.errors import UserError
from diffjax.kinds import Limit, Positive, Probability, Range
from diffjax.process.paths import Coeffs, Pair, Path, Scalar, coeffs, log_snr_of
from diffjax.process.precond import Predict, time_of
from diffjax.process.targets import Mix, decode
from diffjax.shapes import Intervals, PerSample, Samples

Rule = Callable[[Array, Coeffs, Pair, Pair, Scalar], Pair]
"""`(x[B, …], coefficients, on, off, scale) -> Pair`."""
LogSNR = Annotated[float, Range("[-inf, inf]")]
CLASSIFIER = "classifier:"
"""The prefix of a classifier's name in `Against.weights`; the rest of the name is its file."""


class GuidanceModels(NamedTuple):
    """A model and the variants of it that guidance may evaluate.

    Attributes:
        predict: the model.
        condition: the kind of its condition, which defines the null condition.
        weaker: the model with the weights that `Against.weights` names.
        without_attention: `pattern -> model`, where the attention map of each self-attention layer
            whose name matches is the identity: each token attends to itself alone.
        without_blocks: `pattern -> model`, where the blocks whose names match are skipped.
        other: the condition that guidance leads away from: one row for all samples
            (`OtherCondition`), or one row for each sample (`NegativeCondition`).
        path: the path that they were trained on; `guide` sets it.
    """

    predict: Predict
    condition: Condition = Unconditional()
    weaker: Predict | None = None
    without_attention: Callable[[str], Predict] | None = None
    without_blocks: Callable[[str], Predict] | None = None
    other: Any = None
    path: Path | None = None


class Against:
    """The source of the second prediction; a subclass is a frozen dataclass.

    Attributes:
        weights: the name of the weights of `GuidanceModels.weaker`; "" if it is not evaluated.
        needs_null: whether the model of the second prediction must have been trained with the null
            condition.
        calls: network evaluations for one guided prediction.
        embedded: whether the scale is an input of the network, and there is no second prediction.
    """

    embedded: ClassVar[bool] = False
    weights: str = ""
    needs_null: bool = False
    calls: ClassVar[int] = 2

    def __call__(
        self, models: GuidanceModels, x: Samples, t: PerSample | Intervals, cond: Any
    ) -> tuple[Pair, Pair]:
        """`on` and `off` for `x[B, …]` at `t[B]`: two evaluations."""
        return _with_both(models, x, t, cond, self.other(models, cond))

    def other(self, models: GuidanceModels, cond: Any) -> Any:
        """The condition of the second prediction, rows as those of `cond`."""
        raise NotImplementedError

    def parsed(self, condition: Condition) -> "tuple[Against, Any]":
        """The static part that a program is compiled for, and the other condition as an array.

        The condition has one row, and is None if this source has no condition of its own. With
        another row the same program is used.
        """
        del condition
        return self, None

    def unfit(self, condition: Condition, layers: Sequence[str]) -> str | None:
        """The reason why a model can't be guided against this source; None if it can.

        Args:
            condition: the kind of the model's condition.
            layers: the names of its attention layers.
        """
        del condition, layers
        return None


@dataclass(frozen=True)
class Embedded(Against):
    """No second prediction: the network has the scale as an input, and returns what is guided.

    Such networks are distilled, or guided in training (`EmbeddedGuidance`). One evaluation, which
    the rule sees as both: most rules then return it as it is. Meng et al. 2023 (arXiv:2210.03142).
    """

    calls: ClassVar[int] = 1
    embedded: ClassVar[bool] = True

    def __call__(
        self, models: GuidanceModels, x: Samples, t: PerSample | Intervals, cond: Any
    ) -> tuple[Pair, Pair]:
        pair = models.predict(x, t, cond)
        return pair, pair


@dataclass(frozen=True)
class NullCondition(Against):
    """The unconditional prediction: the model with the null condition (`Condition.nulled`).

    This is the source of classifier-free guidance. Both predictions are evaluated as one batch. Ho
    & Salimans 2022 (arXiv:2207.12598).
    """

    needs_null: ClassVar[bool] = True

    def other(self, models: GuidanceModels, cond: Any) -> Any:
        return models.condition.nulled(cond)


@dataclass(frozen=True)
class OtherCondition(Against):
    """The model with another condition for all samples: another label, or a negative prompt.

    Attributes:
        text: the other condition as text, such as the number or the name of a label.
    """

    text: str = "0"

    def other(self, models: GuidanceModels, cond: Any) -> Any:
        n = jax.tree.leaves(cond)[0].shape[0]
        row = self._row(models.condition) if models.other is None else models.other
        other = jax.tree.map(lambda row: jnp.repeat(row, n, axis=0), row)
        return models.condition.replaced(cond, other)

    def _row(self, condition: Condition) -> Any:
        return condition.negative.parse([self.text])

    def parsed(self, condition: Condition) -> tuple[Against, Any]:
        return OtherCondition(), self._row(condition)

    def unfit(self, condition: Condition, layers: Sequence[str]) -> str | None:
        del layers
        if not condition.can_be_dropped:
            return "this model has no condition"
        try:
            self._row(condition)
        except UserError as error:
            return str(error)
        return None


@dataclass(frozen=True)
class NegativeCondition(Against):
    """The model with a negative condition of its own for each sample (`Request.negative`)."""

    def other(self, models: GuidanceModels, cond: Any) -> Any:
        if models.other is None:
            raise UserError(
                "guidance away from negative conditions needs one for each sample: Run.sample and "
                "Request take them"
            )
        return models.condition.replaced(cond, models.other)

    def unfit(self, condition: Condition, layers: Sequence[str]) -> str | None:
        del layers
        return None if condition.can_be_dropped else "this model has no condition"


@dataclass(frozen=True)
class OtherWeights(Against):
    """Autoguidance: a weaker model, which is smaller, less trained, or averaged over fewer steps.

    Karras et al. 2024 (arXiv:2406.02507).

    Attributes:
        weights: an average of the same run (`ema-0.99`), a run's folder, or `FOLDER:average`.
        condition: the source of the weaker model's condition. None is the condition of the model
            itself, as in the paper. `NullCondition()` is classifier-free guidance with a smaller
            unconditional network, as in EDM2 (arXiv:2312.02696).
    """

    weights: str = "live"
    condition: Against | None = None

    @property
    def needs_null(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.condition is not None and self.condition.needs_null

    def __call__(
        self, models: GuidanceModels, x: Samples, t: PerSample | Intervals, cond: Any
    ) -> tuple[Pair, Pair]:
        assert models.weaker is not None
        other = cond if self.condition is None else self.condition.other(models, cond)
        return models.predict(x, t, cond), models.weaker(x, t, other)

    def parsed(self, condition: Condition) -> tuple[Against, Any]:
        if self.condition is None:
            return self, None
        inner, row = self.condition.parsed(condition)
        return replace(self, condition=inner), row

    def unfit(self, condition: Condition, layers: Sequence[str]) -> str | None:
        if not self.weights:
            return "name the weaker weights, weights:ema-0.99 or weights:FOLDER"
        return None if self.condition is None else self.condition.unfit(condition, layers)


@dataclass(frozen=True)
class Classifier(Against):
    """Classifier guidance, by the gradient `∇ log p(label | x)` of a classifier of noisy images.

        guided score = score + (scale - 1)·∇ log p(label | x)

    So a scale of 1 is off, and the scale of the paper is this one less 1. The second prediction has
    the score less the gradient. The gradient is added to the score, as in the authors' DDIM. Their
    DDPM adds it to the mean of a step, times the variance of the step, which is the same in the
    limit of many steps. Dhariwal & Nichol 2021 (arXiv:2105.05233).

    Attributes:
        file: the weights of the published classifier (`from_pretrained` reads its network).
    """

    file: str = ""

    @property
    def weights(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"{CLASSIFIER}{self.file}"

    def __call__(
        self, models: GuidanceModels, x: Samples, t: PerSample | Intervals, cond: Any
    ) -> tuple[Pair, Pair]:
        """`weaker` returns what the classifier adds to a prediction."""
        assert models.weaker is not None
        on, added = models.predict(x, t, cond), models.weaker(x, t, cond)
        return on, on._replace(x0=on.x0 - added.x0, eps=on.eps - added.eps)

    def unfit(self, condition: Condition, layers: Sequence[str]) -> str | None:
        del layers
        if not self.file:
            return "name the file of the classifier, classifier:FILE"
        return None if condition.can_be_dropped else "this model has no labels"


@dataclass(frozen=True)
class WithoutAttention(Against):
    """Perturbed-attention guidance: the model with identity maps in some self-attention layers.

    In these layers each token attends to itself alone. Ahn et al. 2024 (arXiv:2403.17377); their
    scale is this one less 1.

    Attributes:
        layers: a regular expression for the names of these layers, such as `block_2`.
    """

    layers: str = ""

    def __call__(
        self, models: GuidanceModels, x: Samples, t: PerSample | Intervals, cond: Any
    ) -> tuple[Pair, Pair]:
        assert models.without_attention is not None
        return models.predict(x, t, cond), models.without_attention(self.layers)(x, t, cond)

    def unfit(self, condition: Condition, layers: Sequence[str]) -> str | None:
        del condition
        try:
            if any(re.search(self.layers, name) for name in layers):
                return None
        except re.error as error:
            return f"{self.layers!r} is no regular expression: {error}"
        there = ", ".join(layers) or "none"
        return f"no attention layer matches {self.layers!r}; there are {there}"


@dataclass(frozen=True)
class SkipLayers(Against):
    """Skip-layer guidance, in addition to guidance against another source.

        guided + strength·(on − without blocks)

    The second term is added while the log-SNR is between `low` and `high`, to the result of any
    rule. It takes three evaluations. From Stable Diffusion 3.5 Medium
    (github.com/Stability-AI/sd3.5), after Hyung et al. 2024 (arXiv:2411.18664).

    Attributes:
        blocks: a regular expression for the names of the blocks that are skipped; 7, 8 and 9 in
            3.5 Medium.
        strength: the factor of the second term; 2.5 in 3.5 Medium, 2.8 in diffusers.
        low: the lowest log-SNR, at the most noise, where the term is added. The defaults correspond
            approximately to the authors' interval, from 1 % to 20 % of the steps.
        high: the highest log-SNR where it is added.
        against: the other source.
    """

    blocks: str = "block_[789]"
    strength: float = 2.5
    low: LogSNR = -12.0
    high: LogSNR = -5.0
    against: Against = NullCondition()

    calls: ClassVar[int] = 3

    @property
    def weights(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.against.weights

    @property
    def needs_null(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.against.needs_null

    def __call__(
        self, models: GuidanceModels, x: Samples, t: PerSample | Intervals, cond: Any
    ) -> tuple[Pair, Pair]:
        assert models.without_blocks is not None
        assert models.path is not None
        on, off = self.against(models, x, t, cond)
        without = models.without_blocks(self.blocks)(x, t, cond)
        level = log_snr_of(coeffs(models.path, time_of(t), x.ndim))
        factor = jnp.where((level >= self.low) & (level <= self.high), self.strength, 0.0)

        def moved_on(pair: Pair) -> Pair:
            return pair._replace(
                x0=pair.x0 + factor * (on.x0 - without.x0),
                eps=pair.eps + factor * (on.eps - without.eps),
            )

        # A rule that weighs both by numbers whose sum is 1 adds the same to its result.
        return moved_on(on), moved_on(off)

    def parsed(self, condition: Condition) -> tuple[Against, Any]:
        inner, row = self.against.parsed(condition)
        return replace(self, against=inner), row

    def unfit(self, condition: Condition, layers: Sequence[str]) -> str | None:
        firsts = dict.fromkeys(layer.partition("/")[0] for layer in layers)
        names = [name for name in firsts if re.fullmatch(r"block_[0-9]+", name)]
        try:
            if not any(re.fullmatch(self.blocks, name) for name in names):
                there = ", ".join(names) or "none"
                return f"no block is called {self.blocks!r}; there are {there}"
        except re.error as error:
            return f"{self.blocks!r} is no regular expression: {error}"
        return self.against.unfit(condition, layers)


def _with_both(
    models: GuidanceModels, x: Array, t: Array, cond: Any, other: Any
) -> tuple[Pair, Pair]:
    both = models.predict(
        jnp.concatenate([x, x]),
        jnp.concatenate([t, t]),
        jax.tree.map(lambda on, off: jnp.concatenate([on, off]), cond, other),
    )
    n = x.shape[0]
    return jax.tree.map(lambda p: p[:n], both), jax.tree.map(lambda p: p[n:], both)


@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance, `off + scale·(on - off)`.

    Scale 1 is the conditional prediction, 0 the unconditional one; typically 1.5 to 7.5. Ho &
    Salimans 2022 (arXiv:2207.12598), with `scale = 1 + w`.
    """

    def __call__(self, x: Samples, c: Coeffs, on: Pair, off: Pair, scale: Scalar) -> Pair:
        x0, eps = (
            weak + scale * (strong - weak) for strong, weak in ((on.x0, off.x0), (on.eps, off.eps))
        )
        return Pair(x0, eps)


@dataclass(frozen=True)
class PlusPlus:
    """CFG++: the guided x0, `off + scale·(on - off)`, with the noise of `off`.

    Its scale is between 0 and 1; typically 0.2 to 0.8. The pair does not mix to x, so it is only
    for solvers that re-noise the prediction: DDIM and DDPM. Chung et al. 2024 (arXiv:2406.08070),
    algorithm 2.
    """

    def __call__(self, x: Samples, c: Coeffs, on: Pair, off: Pair, scale: Scalar) -> Pair:
        return Pair(off.x0 + scale * (on.x0 - off.x0), off.eps)


@dataclass(frozen=True)
class ZeroStar:
    """CFG-Zero*: `p·off + scale·(on - p·off)` with `p = <on, off>/|off|²`, each a velocity.

    `p`, one number per image, corrects the velocity of a network that is not fully trained. The
    other part of the paper, no movement in the first steps, is not included. Fan et al. 2025
    (arXiv:2503.18886), algorithm 1.
    """

    def __call__(self, x: Samples, c: Coeffs, on: Pair, off: Pair, scale: Scalar) -> Pair:
        strong, weak = (c.da * pair.x0 + c.ds * pair.eps for pair in (on, off))
        p = _dot(strong, weak) / jnp.maximum(_dot(weak, weak), 1e-12)
        velocity = p * weak + scale * (strong - p * weak)
        return decode(c, Mix(c.da, c.ds), velocity, x)


@dataclass(frozen=True)
class Projected:
    """APG: reduces the part of the difference `on - off` in x0 that is parallel to `on`.

        x0 = on + (scale - 1)·(orthogonal + parallel·along)

    Large scales then saturate less. The paper's momentum over steps is not included. Sadat et al.
    2025 (arXiv:2410.02416), algorithm 1.

    Attributes:
        parallel: the factor of the parallel part, from 0 to 1; 0 in the paper, 1 is
            classifier-free guidance.
        longest: the largest root mean square of the difference over an image; infinity is no limit.
    """

    parallel: float = 0.0
    longest: Limit[float] = jnp.inf

    def __call__(self, x: Samples, c: Coeffs, on: Pair, off: Pair, scale: Scalar) -> Pair:
        change = on.x0 - off.x0
        size = jnp.sqrt(jnp.mean(change**2, axis=_axes(x), keepdims=True))
        change = change * jnp.minimum(1.0, self.longest / jnp.maximum(size, 1e-12))
        along = _dot(change, on.x0) / jnp.maximum(_dot(on.x0, on.x0), 1e-12) * on.x0
        return _with_x0(x, c, on.x0 + (scale - 1.0) * (change - (1.0 - self.parallel) * along))


@dataclass(frozen=True)
class Limited:
    """Guidance in a limited interval: another rule between `low` and `high`, and `on` elsewhere.

    The second prediction is evaluated at every step, also outside of the interval. Kynkäänniemi et
    al. 2024 (arXiv:2404.07724).

    Attributes:
        rule: the other rule.
        low: the lowest log-SNR with guidance, the most noise. The defaults are the paper's interval
            of noise levels for ImageNet, `σ` from 0.28 to 2.9.
        high: the highest log-SNR with guidance.
    """

    rule: Rule = ClassifierFree()
    low: LogSNR = -2.13
    high: LogSNR = 2.55

    def __call__(self, x: Samples, c: Coeffs, on: Pair, off: Pair, scale: Scalar) -> Pair:
        level = log_snr_of(c)
        inside = (level >= self.low) & (level <= self.high)
        guided = self.rule(x, c, on, off, scale)
        return Pair(jnp.where(inside, guided.x0, on.x0), jnp.where(inside, guided.eps, on.eps))


@dataclass(frozen=True)
class FirstChannels:
    """Another rule in the first channels, and `on` in the others.

    The rule is computed from the first channels alone. The authors' samplers of DiT (Peebles & Xie
    2022, arXiv:2212.09748) and SiT (Ma et al. 2024, arXiv:2401.08740) guide three of four channels
    of the latents, by `ClassifierFree`; their published distances depend on it.

    Attributes:
        rule: the other rule.
        channels: the number of channels with guidance; 3 in both.

    Example:
        >>> x, c = jnp.zeros((1, 1, 1, 4)), Coeffs(*(jnp.full((1, 1, 1, 1), 0.5),) * 5)
        >>> on, off = (Pair(x + size, x - size) for size in (1.0, 0.0))
        >>> FirstChannels()(x, c, on, off, 3.0).x0[0, 0, 0].tolist()
        [3.0, 3.0, 3.0, 1.0]
    """

    rule: Rule = ClassifierFree()
    channels: Positive[int] = 3

    def __call__(self, x: Samples, c: Coeffs, on: Pair, off: Pair, scale: Scalar) -> Pair:
        first, strong, weak = jax.tree.map(lambda leaf: leaf[..., : self.channels], (x, on, off))
        guided = self.rule(first, c, strong, weak, scale)
        x0, eps = (
            jnp.concatenate([new, old[..., self.channels :]], axis=-1)
            for new, old in ((guided.x0, on.x0), (guided.eps, on.eps))
        )
        return Pair(x0, eps)


@dataclass(frozen=True)
class Rescaled:
    """Another rule's x0, scaled towards the standard deviation of `on`.

        x0·(share·std(on)/std(x0) + 1 - share)

    with standard deviations over one image. Lin et al. 2024 (arXiv:2305.08891), equations 15 and
    16, on x0.

    Attributes:
        rule: the other rule.
        share: from 0, which changes nothing, to 1; 0.7 in the paper.
    """

    rule: Rule = ClassifierFree()
    share: Probability[float] = 0.7

    def __call__(self, x: Samples, c: Coeffs, on: Pair, off: Pair, scale: Scalar) -> Pair:
        x0 = self.rule(x, c, on, off, scale).x0
        there, here = (jnp.std(image, axis=_axes(x), keepdims=True) for image in (on.x0, x0))
        ratio = there / jnp.maximum(here, 1e-12)
        return _with_x0(x, c, x0 * (self.share * ratio + 1.0 - self.share))


@dataclass(frozen=True)
class Clipped:
    """Another rule's x0, clipped to [-limit, limit]: static thresholding. Ho et al. 2020.

    Attributes:
        rule: the other rule.
        limit: 1 for images in [-1, 1]; more for latents.
    """

    rule: Rule = ClassifierFree()
    limit: Positive[float] = 1.0

    def __call__(self, x: Samples, c: Coeffs, on: Pair, off: Pair, scale: Scalar) -> Pair:
        x0 = self.rule(x, c, on, off, scale).x0
        return _with_x0(x, c, jnp.clip(x0, -self.limit, self.limit))


@dataclass(frozen=True)
class Thresholded:
    """Another rule's x0, clipped at a quantile and divided by it, where this is above 1.

    Dynamic thresholding, for images in [-1, 1]. Saharia et al. 2022 (arXiv:2205.11487),
    section 2.3.

    Attributes:
        rule: the other rule.
        quantile: that of the absolute values of an image; 0.995 in the paper.
        largest: what x0 is clipped at and divided by at most; 2 in Kandinsky 2.2, infinite in the
            paper.
    """

    rule: Rule = ClassifierFree()
    quantile: Probability[float] = 0.995
    largest: Limit[float] = float("inf")

    def __call__(self, x: Samples, c: Coeffs, on: Pair, off: Pair, scale: Scalar) -> Pair:
        x0 = self.rule(x, c, on, off, scale).x0
        edge = jnp.quantile(jnp.abs(x0), self.quantile, axis=_axes(x), keepdims=True)
        edge = jnp.clip(edge, 1.0, self.largest)
        return _with_x0(x, c, jnp.clip(x0, -edge, edge) / edge)


def guide(
    models: GuidanceModels,
    path: Path,
    rule: Rule = ClassifierFree(),
    scale: Scalar | None = None,
    against: Against = NullCondition(),
) -> Predict:
    """A guided predictor: a rule combines the model's prediction with a second one.

    It evaluates the network `against.calls` times. Without a scale it evaluates it once, and the
    rule receives this prediction twice: rules such as `Clipped` then still have an effect.

    Args:
        models: the model and its variants.
        path: the path that it was trained on.
        rule: combines both predictions.
        scale: the strength of guidance; None is off.
        against: the source of the second prediction.
    """

    def guided(x: Array, t: Array, cond: Any) -> Pair:
        c = coeffs(path, time_of(t), x.ndim)
        if scale is None:
            on = off = models.predict(x, t, cond)
        else:
            on, off = against(models._replace(path=path), x, t, cond)
        # A learned variance is that of the model itself, as in DiT.
        return rule(x, c, on, off, 1.0 if scale is None else scale)._replace(share=on.share)

    return guided


def mixes(rule: Rule) -> bool:
    """Whether a rule's result mixes to x if both predictions do, `a·x0 + s·eps = x`; by trial.

    Example:
        >>> mixes(ClassifierFree()), mixes(Clipped(PlusPlus()))
        (True, True)
        >>> mixes(Limited(PlusPlus()))
        False
    """
    return bool(_mixed(rule))


@once()  # One program instead of one for each operation.
def _mixed(rule: Rule) -> Array:
    half = jnp.full((1, 1), 0.5)
    c = Coeffs(t=half[0], a=half, s=half, da=-2.0 * half, ds=2.0 * half)
    x = half
    on, off = (Pair(x0, (x - c.a * x0) / c.s) for x0 in (0.4 * half, -0.6 * half))
    pair = rule(x, c, on, off, 2.0)
    return jnp.allclose(c.a * pair.x0 + c.s * pair.eps, x, atol=1e-4)


def classifier_guidance(
    predict: Predict,
    path: Path,
    log_probability: Callable[[Array, Array, Any], Array],
    scale: Scalar = 1.0,
) -> Predict:
    """Classifier guidance: adds a classifier's gradient to the score.

        guided score = score + scale·∇ log p(cond | x)

    Dhariwal & Nichol 2021 (arXiv:2105.05233), algorithm 1.

    Args:
        predict: the model, unconditional or not.
        path: the path that it was trained on.
        log_probability: `(x[B, …], t[B], cond) -> [B]`, of a classifier of noisy images.
        scale: 1 is Bayes' rule.
    """

    def guided(x: Array, t: Array, cond: Any) -> Pair:
        c = coeffs(path, time_of(t), x.ndim)
        pair = predict(x, t, cond)
        slope = jax.grad(lambda x: jnp.sum(log_probability(x, t, cond)))(x)
        return moved(x, c, pair.x0, scale * slope)._replace(share=pair.share)

    return guided


def moved(x: Samples, c: Coeffs, x0: Samples, score: Samples) -> Pair:
    """The pair of a prediction `x0` after `score` was added to its score (`change_of_pair`)."""
    change = change_of_pair(c, score)
    return Pair(x0 + change.x0, (x - c.a * x0) / c.s + change.eps)


def change_of_pair(c: Coeffs, score: Samples) -> Pair:
    """The change of a pair when `score` is added to its score: `s²/a·score` and `-s·score`.

    In pure noise (`a = 0`), where x0 can't be computed from x, the change of x0 is 0.
    """
    some = c.a > 1e-6
    return Pair(jnp.where(some, c.s**2 / jnp.where(some, c.a, 1.0) * score, 0.0), -c.s * score)


def _axes(x: Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


def _dot(x: Array, y: Array) -> Array:
    return jnp.sum(x * y, axis=_axes(x), keepdims=True)


def _with_x0(x: Array, c: Coeffs, x0: Array) -> Pair:
    """The pair with this x0 that mixes to x."""
    return Pair(x0, (x - c.a * x0) / c.s)
