"""A saved config of an earlier version, in the terms of this one."""

from collections.abc import Mapping
from typing import Any

from diffjax.spec import TARGET

_MOVED = {
    "diffjax.evaluation.clip": "diffjax.evaluation.extractors.clip",
    "diffjax.evaluation.dinov2": "diffjax.evaluation.extractors.dinov2",
    "diffjax.evaluation.features": "diffjax.evaluation.extractors.features",
    "diffjax.evaluation.inception": "diffjax.evaluation.extractors.inception",
}
"""Modules whose callables a config may name, by their old names."""
_RENAMED = {
    "diffjax.sampling.guidance:NullLabel": "diffjax.sampling.guidance:NullCondition",
    "diffjax.sampling.guidance:OtherLabel": "diffjax.sampling.guidance:OtherCondition",
}
"""Callables by their old names."""


def upgrade(config: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the names of callables that have moved; everything else stays.

    Every reader of a saved config calls it, so nothing else has to know how a config once looked.
    What a later version changes gets its line here, and a run that was saved before it becomes a
    fixture of `tests/runs/test_old_runs.py`.

    Args:
        config: the content of a `config.json`.

    Example:
        >>> upgrade({"extractor": {"_target_": "diffjax.evaluation.features:pixels"}})
        {'extractor': {'_target_': 'diffjax.evaluation.extractors.features:pixels'}}
    """
    return {name: _upgraded(name, value) for name, value in config.items()}


def _upgraded(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return upgrade(value)
    if isinstance(value, list):
        return [_upgraded("", each) for each in value]
    if name == TARGET and isinstance(value, str):
        module, colon, callable_name = value.partition(":")
        moved = _MOVED.get(module, module) + colon + callable_name
        return _RENAMED.get(moved, moved)
    return value
