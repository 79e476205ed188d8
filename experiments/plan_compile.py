"""The process of its own in which `experiments.plan` compiles, where libtpu may be imported.

It reads a request as JSON from its input and writes the answer as JSON into the request's file.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax

from diffjax.errors import UserError
from diffjax.performance.planning.compiled import compile_for
from diffjax.performance.planning.topologies import topology_called
from diffjax.spec import from_json


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What the config's program needs, or the user's mistake."""
    try:
        config = from_json(request["config"], tuple(request["packages"]))
        needs = compile_for(config, topology_called(request["topology"]), request["program"])
    except UserError as error:
        return {"error": str(error)}
    return {"needs": dataclasses.asdict(needs)}


def main() -> None:
    """Answers one request."""
    request = json.load(sys.stdin)
    jax.config.update("jax_enable_compilation_cache", False)
    Path(request["answer"]).write_text(json.dumps(answer(request)), encoding="utf-8")


if __name__ == "__main__":
    main()
