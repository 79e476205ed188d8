"""Whether pictures match their prompts, by classifiers of pixels that see no text.

A classifier is trained on real captioned pictures, a class for each caption or for each value of an
attribute, such as a colour. A sample matches if the class of its prompt has the largest logit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from diffjax.errors import UserError

SIDE = 16
"""The side of the small pictures that are classified."""
_LARGER = 4  # Copies are shifted by parts of their pixels.
_NOISE = 0.05  # standard deviation, of small pixels
_LEVELS, _OF_SHARES = 4, 4.0  # of a channel; and the weight of shares beside pixels


@dataclass(frozen=True, eq=False)
class Discriminant:
    """A linear discriminant: Gaussians of one covariance.

        logit_k(x) = μ_k·S⁻¹·x − μ_k·S⁻¹·μ_k/2

    Attributes:
        weights: `S⁻¹ μ`, `[D, K]`.
        biases: `[K]`.

    References:
        Fisher, "The use of multiple measurements in taxonomic problems", 1936
    """

    weights: np.ndarray
    biases: np.ndarray

    def logits(self, features: Float[np.ndarray, " images D"]) -> Float[np.ndarray, " images K"]:
        """The logits of all classes."""
        return features @ self.weights + self.biases


def discriminant(
    features: Float[np.ndarray, " images D"],
    labels: Int[np.ndarray, " images"],
    num_classes: int,
    ridge: float = 0.1,
) -> Discriminant:
    """Fits a linear discriminant.

    Args:
        features: the features of real pictures, with several for each class.
        labels: 0 to num_classes - 1, all of which occur.
        num_classes: K.
        ridge: added to the diagonal of S, in units of its mean; 0.001 to 0.1.

    Raises:
        UserError: a class has no picture.

    Example:
        >>> x = np.array([[0.0], [0.2], [1.0], [1.2]])
        >>> fitted = discriminant(x, np.array([0, 0, 1, 1]), 2)
        >>> fitted.logits(np.array([[0.5], [0.7]])).argmax(-1).tolist()
        [0, 1]
    """
    counts = np.bincount(labels, minlength=num_classes)
    if not counts.all():
        raise UserError(f"class {int(np.argmin(counts))} has no picture to train on")
    means = np.zeros((num_classes, features.shape[1]))
    np.add.at(means, labels, features)
    means /= counts[:, None]
    within = features - means[labels].astype(features.dtype)
    covariance = (within.T @ within / len(features)).astype(np.float64)
    level = np.trace(covariance) / len(covariance) or 1.0
    covariance += ridge * level * np.eye(len(covariance))
    weights = np.linalg.solve(covariance, means.T)
    return Discriminant(weights, -0.5 * (means.T * weights).sum(0))


@dataclass(frozen=True, eq=False)
class Judge:
    """Classifiers of pictures, which are trained by `judge_of`.

    Attributes:
        captions: the class of each text.
        of_captions: the classifier of captions.
        of_attributes: the classifier of each attribute, with its values in the order of classes.
    """

    captions: Mapping[str, int]
    of_captions: Discriminant
    of_attributes: Mapping[str, tuple[Discriminant, tuple[str, ...]]]

    def matched(self, features: np.ndarray, captions: Sequence[str], of: int = 50) -> np.ndarray:
        """The probability of each picture to match its caption among `of` captions (`right_of`).

        Args:
            features: the features of the pictures (`features_of`).
            captions: the caption of each picture.
            of: the number of captions that the right one is among.

        Raises:
            UserError: a caption is not one of those that the classifier was trained on.
        """
        unknown = [text for text in captions if text not in self.captions]
        if unknown:
            raise UserError(f"no picture with the caption {unknown[0]!r} was there to train on")
        rows = np.array([self.captions[text] for text in captions])
        return right_of(self.of_captions.logits(features), rows, of)

    def has(self, features: np.ndarray, attribute: str, values: Sequence[str]) -> np.ndarray:
        """Whether the classifier of an attribute finds each picture's value, bool."""
        classifier, names = self.of_attributes[attribute]
        found = classifier.logits(features).argmax(-1)
        return np.array([names[i] for i in found]) == np.asarray(values)


def judge_of(
    images: Float[np.ndarray, " images H W C"],
    captions: Sequence[str],
    attributes: Sequence[Mapping[str, str]],
    copies: int = 4,
    seed: int = 0,
) -> Judge:
    """Trains the classifiers on real pictures and on changed copies of them.

    Args:
        images: in [-1, 1]; the sides are multiples of 64.
        captions: a text for each.
        attributes: values by attribute for each, such as `{"colour": "green"}`.
        copies: changed copies of each picture.
        seed: the seed of the changes.
    """
    features = with_copies(images, copies, seed).reshape(copies + 1, len(images), -1)
    classes = {text: i for i, text in enumerate(dict.fromkeys(captions))}

    def fitted(rows: list[int], labels: list[int], count: int) -> Discriminant:
        some = features[:, rows].reshape(-1, features.shape[-1])
        return discriminant(some, np.tile(labels, copies + 1), count)

    of_attributes = {}
    for name in dict.fromkeys(name for each in attributes for name in each):
        rows = [row for row, each in enumerate(attributes) if name in each]
        values = tuple(sorted({attributes[row][name] for row in rows}))
        labels = [values.index(attributes[row][name]) for row in rows]
        of_attributes[name] = fitted(rows, labels, len(values)), values
    everything = [*range(len(images))]
    of_captions = fitted(everything, [classes[text] for text in captions], len(classes))
    return Judge(classes, of_captions, of_attributes)


def right_of(
    logits: Float[np.ndarray, " samples K"], right: Int[np.ndarray, " samples"], of: int = 50
) -> Float[np.ndarray, " samples"]:
    """The probability that the right class is first among `of` classes: it and random others.

    Of K − 1 others, r have a larger logit (equal ones count half):
    `C(K − 1 − r, of − 1) / C(K − 1, of − 1)`, without drawing any. Chance is 1/of.

    Args:
        logits: the logits of each sample for all classes.
        right: the class of its prompt.
        of: the number of classes, at most K.

    Raises:
        UserError: there are fewer classes.

    Example:
        >>> right_of(np.array([[3.0, 1.0, 2.0], [1.0, 3.0, 2.0]]), np.array([0, 0]), of=2).tolist()
        [1.0, 0.0]
    """
    others = logits.shape[1] - 1
    if not 2 <= of <= others + 1:
        raise UserError(f"the right one of {of}, among {others + 1} classes")
    own = logits[np.arange(len(logits)), right][:, None]
    larger = (logits > own).sum(1) + 0.5 * ((logits == own).sum(1) - 1)
    number = of - 1

    def chance(worse: float) -> float:
        left = others - worse
        steps = ((left - i) / (others - i) for i in range(number))
        return math.prod(max(step, 0.0) for step in steps)

    return np.array([chance(float(worse)) for worse in larger])


def features_of(images: Float[np.ndarray, " images H W C"]) -> Float[np.ndarray, " images D"]:
    """Small pictures as vectors: means over squares of pixels, and how often each colour occurs.

    Colours are counted in 4 levels of each channel, wherever they are in the picture.
    """
    return _features(_small(images, SIDE))


def with_copies(
    images: Float[np.ndarray, " images H W C"], copies: int, seed: int = 0
) -> Float[np.ndarray, " all D"]:
    """Features of pictures and of changed copies: shifted, blurred, paler or darker, with noise.

    Args:
        images: in [-1, 1].
        copies: the number of changed copies of each picture.
        seed: the seed of the changes.

    Returns:
        The features of all pictures, then those of all first copies, and so on.
    """
    rng = np.random.default_rng(seed)
    large = _small(images, SIDE * _LARGER)
    found = [features_of(images)]
    for _ in range(copies):
        small = _small(_changed(large, rng), SIDE)
        noise = np.float32(_NOISE) * rng.standard_normal(small.shape, np.float32)
        found.append(_features(np.clip(small + noise, -1, 1)))
    return np.concatenate(found)


def _changed(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One changed copy of each picture, `[N, 4·SIDE, 4·SIDE, C]`."""
    most = _LARGER // 2 + 1
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    side = images.shape[1]
    shifts = rng.integers(0, 2 * most + 1, (len(images), 2))
    moved = np.stack(
        [
            image[row : row + side, column : column + side]
            for image, (row, column) in zip(padded, shifts, strict=True)
        ]
    )
    share = rng.uniform(0, 1, (len(images), 1, 1, 1)).astype(np.float32)
    blurred = sum(np.roll(moved, k, axis) for axis in (1, 2) for k in (-3, -1, 1, 3)) / 8
    moved = moved + share * (blurred - moved)
    contrast = rng.uniform(0.8, 1.1, (len(images), 1, 1, 1)).astype(np.float32)
    return 1 + contrast * (moved - 1)  # 1 is white, the background.


def _features(small: np.ndarray) -> np.ndarray:
    """The vectors of small pictures `[N, SIDE, SIDE, C]`."""
    n, channels = len(small), small.shape[-1]
    levels = np.clip((small + 1) * (_LEVELS / 2), 0, _LEVELS - 1).astype(int)
    colours = (levels * _LEVELS ** np.arange(channels)).sum(-1).reshape(n, -1)
    count = _LEVELS**channels
    places = colours + count * np.arange(n)[:, None]
    shares = np.bincount(places.ravel(), minlength=n * count).reshape(n, count) / SIDE**2
    return np.concatenate([small.reshape(n, -1), _OF_SHARES * shares], 1, dtype=np.float32)


def _small(images: np.ndarray, side: int) -> np.ndarray:
    """Means over squares; the sides are multiples of `side`, or `side` itself."""
    n, height, width, channels = images.shape
    if height % side or width % side:
        raise UserError(f"pictures of {height}x{width} pixels are not multiples of {side}")
    squares = images.reshape(n, side, height // side, side, width // side, channels)
    return squares.mean((2, 4))
