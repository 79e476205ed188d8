"""The subprocess in which `experiments.plan` compiles, and which may import libtpu.

It reads a request as JSON from standard input and writes the answer as JSON to the request's file.
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
    """Compiles the config's program; returns its needs, or the message of a user error."""
    try:
        config = from_json(request["config"], tuple(request["packages"]))
        needs = compile_for(config, topology_called(request["topology"]), request["program"])
    except UserError as error:
        return {"error": str(error)}
    return {"needs": dataclasses.asdict(needs)}


def main() -> None:
    """Reads one request and writes its answer."""
    request = json.load(sys.stdin)
    jax.config.update("jax_enable_compilation_cache", False)
    Path(request["answer"]).write_text(json.dumps(answer(request)), encoding="utf-8")


if __name__ == "__main__":
    main()
