"""A saved config of an earlier version, in the terms of this one."""

from collections.abc import Mapping
from typing import Any

from diffjax.spec import TARGET

RENAMED: Mapping[str, str] = {
    "diffjax.models.dit:DiT": "diffjax.models.dit.network:DiT",
    "diffjax.sampling.guidance:NullLabel": "diffjax.sampling.guidance:NullCondition",
    "label_dropout": "condition_dropout",
}
"""Callables that a config may name, `module:name`, and settings, from their names since 0.1.0 to
today's."""

_RULES: Mapping[str, str] = {
    "diffjax.optimizers.adam:adamw": "diffjax.optimizers.adam:AdamW",
    "diffjax.optimizers.adam:adam": "diffjax.optimizers.adam:Adam",
    "diffjax.optimizers.lion:lion": "diffjax.optimizers.lion:Lion",
    "diffjax.optimizers.normalised:normalised_adam": "diffjax.optimizers.normalised:NormalisedAdam",
}
"""Optimizers that had their warm-up, schedule and clipping themselves, and the rules of today."""
_DESCENT = ("learning_rate", "warmup_steps", "schedule", "clip_norm")
_LORA = {"rank": 0, "alpha": 0.0, "dropout": 0.0, "layers": "*"}
ADDED: Mapping[str, Any] = {
    "best_by": "",
    "ema_rampup_ratio": 0.0,
    "evaluation": {"prompts": ""},
    "evaluators": {},
    "sample_prompts": [],
    "teacher": "ema",
    "trackers": {},
    "patience_evaluations": 0,
    "lora": {TARGET: "diffjax.models.low_rank:LoraLayers", **_LORA},
}
"""Settings that configs have since 0.1.0, with the values by which a run is what it was before."""


def upgrade(
    config: Mapping[str, Any],
    renamed: Mapping[str, str] = RENAMED,
    added: Mapping[str, Any] = ADDED,
) -> dict[str, Any]:
    """Replaces the names of callables and of settings that have others now, and adds new settings.

    Every reader of a saved config calls it, so nothing else has to know how configs once looked.
    A version that adds or renames a setting, or renames or moves a callable, adds its line; a run
    that was saved before becomes a folder of `tests/runs/old_runs`.

    Args:
        config: the content of a `config.json`.
        renamed: new names by old ones.
        added: settings that a config may lack.

    Example:
        >>> upgrade({"data": {"_target_": "toys:dots"}}, {"toys:dots": "toys:points"}, {"seed": 0})
        {'seed': 0, 'data': {'_target_': 'toys:points'}}
    """
    return _with(added, _renamed(_with_rules(config), renamed))


def _with_rules(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose optimizers are `descent` by a rule."""

    def changed(value: Any) -> Any:
        if not isinstance(value, Mapping) or value.get(TARGET) not in _RULES:
            return value
        rule = {name: number for name, number in value.items() if name not in _DESCENT}
        shared = {name: value[name] for name in _DESCENT if name in value}
        rule[TARGET] = _RULES[value[TARGET]]
        return {TARGET: "diffjax.optimizers.descent:descent", "rule": rule, **shared}

    return {name: changed(value) for name, value in config.items()}


def _with(added: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with added settings where it lacks them, also within its groups."""
    merged = {
        name: _with(value, config[name])
        for name, value in added.items()
        if isinstance(value, Mapping) and isinstance(config.get(name), Mapping)
    }
    return {**added, **config, **merged}


def _renamed(config: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    def changed(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return _renamed(value, renamed)
        if isinstance(value, list):
            return [changed("", each) for each in value]
        return renamed.get(value, value) if name == TARGET and isinstance(value, str) else value

    return {renamed.get(name, name): changed(name, value) for name, value in config.items()}
