"""Checks whether metrics of several evaluations can be compared, by their provenance."""

from collections.abc import Mapping
from typing import Any

from diffjax.errors import UserError

# Facts about a metric's floor; its value does not depend on them.
_OF_THE_FLOOR = ("num_floor_images",)
# Facts that older evaluations do not state, and their values at that time.
_BEFORE = {"codec": "none", "codec_sha256": "", "resize": "none", "labels": "balanced"}


def check_comparable(evaluations: Mapping[str, Mapping[str, Any]], number: str) -> None:
    """Checks that a metric has the same provenance in all evaluations.

    The extractor and its hash, the reference and its hash, the numbers of images, the seed and
    all other facts of the provenance must be equal. How the samples were drawn is not part of the
    provenance, because that is what is compared.

    Args:
        evaluations: content of each `evaluation.json`, by the run's name.
        number: name of the metric, such as `"frechet_distance"`. Evaluations without it are
            ignored.

    Raises:
        UserError: two runs differ (the message lists the facts), or a metric has no provenance.

    Example:
        >>> def made_with(n):
        ...     return {"precision": {"value": 0.9, "provenance": {"k": 5, "num_samples": n}}}
        >>> check_comparable({"a": made_with(1000), "b": made_with(1000)}, "precision")
        >>> check_comparable({"a": made_with(1000), "b": made_with(50)}, "precision")
        Traceback (most recent call last):
            ...
        diffjax.errors.UserError: precision of a and b can't be compared: num_samples is 1000 and 50
    """
    found = {
        name: evaluation[number]
        for name, evaluation in evaluations.items()
        if evaluation.get(number) is not None
    }
    if len(found) < 2:
        return
    for name, entry in found.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("provenance"), Mapping):
            raise UserError(
                f"{number} of {name} can't be compared, because it has no provenance: evaluate "
                "that run again"
            )
    (first, entry), *others = found.items()
    for name, other in others:
        differences = _differences(entry["provenance"], other["provenance"])
        if differences:
            raise UserError(
                f"{number} of {first} and {name} can't be compared: {'; '.join(differences)}"
            )


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    keys = [key for key in {**one, **other} if key not in _OF_THE_FLOOR]
    facts = [(key, *(each.get(key, _BEFORE.get(key)) for each in (one, other))) for key in keys]
    return [
        f"{key} is {_short(here)} and {_short(there)}"
        for key, here, there in facts
        if here != there
    ]


def _short(value: Any) -> str:
    """A fact as text; a hash is shortened."""
    text = "not stated" if value is None else str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
