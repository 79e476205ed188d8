"""How well images show their texts, by embeddings of both: CLIP score and retrieval."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffjax.evaluation.further_metrics import image_counts
from diffjax.evaluation.image_statistics import MOST_FEATURES, CollectedStatistics, thinned_rows
from diffjax.evaluation.intervals import wilson_interval
from diffjax.evaluation.reference import Reference

_ROWS = 1024  # images at a time: of 10,000 texts their cosines take 40 MB


def clip_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """The CLIP score of each image with its own text, `[n]` float64, from 0 to 100.

        score = 100·max(cos(image, text), 0)

    Its mean over images is the CLIP score of a set. Hessel et al. 2021 (arXiv:2104.08718) with the
    factor 100 in the place of 2.5, as papers on text-to-image models state it. With the factor of a
    published CLIP, `exp(logit_scale)`, which is 100, it is the logit of the image and the text.
    torchmetrics takes the maximum of the mean, which is the same where all cosines are above 0.

    Args:
        images: `[n, F]`, embeddings of length 1.
        texts: `[n, F]`, embeddings of length 1, one for each image.

    Example:
        >>> clip_scores(np.eye(2), np.array([[0.6, 0.8], [0.0, -1.0]])).tolist()
        [60.0, 0.0]
    """
    cosines = np.sum(images.astype(np.float64) * texts.astype(np.float64), axis=1)
    return 100.0 * np.maximum(cosines, 0.0)


def retrieved(images: np.ndarray, texts: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Whether no other text is nearer to an image than its own, bool `[n]`.

    The share of true ones is the retrieval accuracy, the recall at 1 of texts by images; by chance
    it is 1/N.

    Args:
        images: `[n, F]`, embeddings of length 1.
        texts: `[N, F]`, embeddings of length 1 of N different texts.
        own: `[n]`, the row in `texts` of each image's text.

    Example:
        >>> retrieved(np.eye(2), np.eye(2), np.array([0, 0])).tolist()
        [True, False]
    """
    found = []
    for start in range(0, len(images), _ROWS):
        cosines = images[start : start + _ROWS] @ texts.T
        rows = own[start : start + _ROWS]
        found.append(cosines[np.arange(len(rows)), rows] >= cosines.max(axis=1))
    return np.concatenate(found)


def facts_of(texts: Sequence[str]) -> dict[str, Any]:
    """The part of the provenance of metrics of samples that have texts."""
    digest = hashlib.sha256("\n".join(texts).encode("utf-8", "surrogatepass"))
    return {"texts_sha256": digest.hexdigest(), "num_texts": len(set(texts))}


def text_metrics(
    collected: CollectedStatistics,
    texts: Sequence[str] | None,
    reference: Reference,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """CLIP score and retrieval accuracy; both None without texts or an encoder of texts.

    Args:
        collected: statistics of the samples.
        texts: what each sample is to show.
        reference: whose extractor embeds images and texts.
        provenance: provenance that all metrics share.
    """
    embed = reference.extractor.texts
    if embed is None or texts is None:
        return {"clip_score": None, "retrieval_accuracy": None}
    seed, n = reference.seed, len(collected.features)
    given = [texts[int(row)] for row in thinned_rows(len(texts), MOST_FEATURES, seed)]
    found, floor = _measured(collected.features, given, embed), None
    if reference.test_texts:
        rows = thinned_rows(len(reference.test_texts), n, seed)
        captions = [reference.test_texts[int(row)] for row in rows]
        floor = _measured(reference.test_features[rows], captions, embed)
    stated = provenance | image_counts(n, len(floor.scores) if floor else 0, 0)
    right = int(found.right.sum())
    return {
        "clip_score": {
            "value": float(found.scores.mean()),
            "standard_error": float(found.scores.std(ddof=1) / np.sqrt(n)),
            "floor": floor and float(floor.scores.mean()),
            "provenance": stated | {"definition": "arXiv:2104.08718, mean of 100 max(cos, 0)"},
        },
        "retrieval_accuracy": {
            "value": right / n,
            "interval": list(wilson_interval(right, n)),
            "by_chance": 1.0 / found.among,
            "floor": floor and float(floor.right.mean()),
            "provenance": stated
            | {"definition": "own text nearest to the image", "among": found.among},
        },
    }


class _Measured(NamedTuple):
    """CLIP scores `[n]`, whether the own text is the nearest `[n]`, and among how many."""

    scores: np.ndarray
    right: np.ndarray
    among: int


def _measured(
    images: np.ndarray, texts: Sequence[str], embed: Callable[[Sequence[str]], np.ndarray]
) -> _Measured:
    """Embeddings `[n, F]` of images compared with those of their texts."""
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    own, embedded = np.array([places[text] for text in texts]), embed(tuple(places))
    right = retrieved(images, embedded, own)
    return _Measured(clip_scores(images, embedded[own]), right, len(places))
