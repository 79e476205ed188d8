"""Trainings of one config share what is built of it, where building it is no subject of a test."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from diffjax.loop import loop
from diffjax.runs import setup as setups
from diffjax.runs import workdirs
from diffjax.runs.parts import build_parts
from diffjax.spec import to_json

_PARTS: dict[Any, Any] = {}
_prepared, _scheduled = loop.prepared, loop.scheduled
_compiled, _flops = loop.compile_train_step, loop.train_flops
_NOT_IN_THE_STEP = {
    "best_by",
    "checkpoint_every_steps",
    "checkpoints_kept_every_steps",
    "checkpoints_to_keep",
    "evaluation",
    "evaluators",
    "init_from",
    "log_every_steps",
    "name",
    "patience_evaluations",
    "sample_every_steps",
    "snapshot_every_steps",
    "trackers",
    "weights",
}
"""Settings of the loop alone: runs that differ in these have one program."""


def shared_parts(patch: pytest.MonkeyPatch) -> None:
    """A second training of an equal config, on as many devices, traces and compiles nothing.

    It takes half the time. The step is the same program, so that results are the same bit for bit.
    Nor is anything traced where a second run of that config is loaded.
    """

    def prepared(config, dataset=None):
        if dataset is not None:
            return _prepared(config, dataset)
        name = "parts", to_json(config), setups.make_mesh().size
        return _once(name, lambda: _prepared(config))

    def scheduled(optimizer, num_steps, start=0):
        name = "optimizer", to_json(optimizer), num_steps, start
        return _once(name, lambda: _scheduled(optimizer, num_steps, start))

    def step(setup, key, optimizer=None, teacher=None, buckets=()):
        if teacher is not None or buckets:
            return _compiled(setup, key, optimizer, teacher, buckets)
        name = "step", _of_the_step(setup), id(optimizer)
        # It is kept with the step, so that no other object gets its number.
        return _once(name, lambda: (_compiled(setup, key, optimizer), optimizer))[0]

    def flops(setup):
        return _once(("flops", _of_the_step(setup)), lambda: _flops(setup))

    def parts_of_saved(config, image_shape, condition, mesh, codec):
        name = "saved", to_json(config), repr((image_shape, condition, codec)), mesh
        made = _once(name, lambda: build_parts(config, image_shape, condition, mesh, codec))
        return replace(made, config=config)  # which `load` changes

    patch.setattr(workdirs, "build_parts", parts_of_saved)
    patch.setattr(loop, "prepared", prepared)
    patch.setattr(loop, "scheduled", scheduled)
    patch.setattr(loop, "compile_train_step", step)
    patch.setattr(loop, "train_flops", flops)


def _of_the_step(setup: setups.Setup) -> Any:
    settings = json.loads(to_json(setup.config))
    own = {name: value for name, value in settings.items() if name not in _NOT_IN_THE_STEP}
    return json.dumps(own), repr(setup.wired.condition), setup.mesh


def _once(name: Any, make: Callable[[], Any]) -> Any:
    if name not in _PARTS:
        _PARTS[name] = make()
    return _PARTS[name]
