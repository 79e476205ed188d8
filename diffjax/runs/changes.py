"""Differences between two configs of one run, and which of them a resumed run may have."""

from collections.abc import Mapping
from typing import Any

Changes = dict[str, tuple[Any, Any]]
"""`{"optimizer.rule.b1": (value in the folder, value here)}`."""

# No array of the state, no batch and no loss depends on these.
_MAY_CHANGE = (
    "num_steps",
    "optimizer",
    "accumulation_steps",
    "nonfinite.rollbacks",
    "weights",
    "sampling",
    "evaluation",
    "evaluators",
    "best_by",
    "patience_evaluations",
    "trackers",
    "log_every_steps",
    "snapshot_every_steps",
    "sample_every_steps",
    "sample_images",
    "sample_prompts",
    "checkpoint_every_steps",
    "checkpoints_to_keep",
    "checkpoints_kept_every_steps",
)
_KEEPS: Mapping[str, str] = {
    "seed": "its seed, which decides its batches and its noise",
    "data": "its data",
    "augment": "its data",
    "batch_size": "its batches",
    "model": "its network, whose arrays have these shapes",
    "path": "what it learns",
    "precond": "what it learns",
    "objective": "what it learns",
    "wrappers": "what it learns",
    "condition_dropout": "what it learns",
    "teacher": "what it learns from",
    "ema_decays": "its averages, which began with it",
    "ema_lengths": "its averages, which began with it",
    "ema_rampup_ratio": "its averages, which began with it",
    "nonfinite": "what its state counts",
    "trainable": "the parameters that it trains",
    "lora": "the parameters that it trains",
    "init_from": "the weights that it began with",
}


def differences(saved: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> Changes:
    """The differences of two configs; a value that one of them lacks is "absent".

    Example:
        >>> differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
        {'b.c': (2, 3)}
    """
    found: Changes = {}
    for key in dict.fromkeys([*saved, *here]):
        there, mine = saved.get(key, "absent"), here.get(key, "absent")
        if isinstance(there, Mapping) and isinstance(mine, Mapping):
            found |= differences(there, mine, f"{prefix}{key}.")
        elif there != mine:
            found[f"{prefix}{key}"] = there, mine
    return found


def refusal(changes: Changes) -> str | None:
    """The reason why a run can't continue with these changes; None if it can.

    Example:
        >>> refusal({"num_steps": (10, 20)})
        >>> refusal({"num_steps": (10, 20), "seed": (0, 1)})
        'seed: 0 there, 1 here; a run keeps its seed, which decides its batches and its noise'
        >>> refusal({"evaluators.e.num_samples": (100, 200)})
        'evaluators.e.num_samples: 100 there, 200 here; values of the two would be compared, so add
        an evaluator of another name'
    """
    for key, (there, here) in changes.items():
        if not any(key == may or key.startswith(f"{may}.") for may in _MAY_CHANGE):
            keeps = _KEEPS.get(key.partition(".")[0], "this setting")
            return f"{key}: {there} there, {here} here; a run keeps {keeps}"
        if _changes_evaluator(key):
            return (
                f"{key}: {there} there, {here} here; values of the two would be compared, so add "
                "an evaluator of another name"
            )
    return None


def _changes_evaluator(key: str) -> bool:
    """Whether it is a setting of an evaluator that there is, and not how often it measures."""
    parts = key.split(".")
    return parts[0] == "evaluators" and len(parts) > 2 and parts[2:] != ["every_steps"]
