"""How programs of tests are compiled: quickly (conftest.py), or fast where they compute long."""

import os
from typing import Any

_OPTIONS: dict[str, Any] = {
    "xla_backend_optimization_level": 3,
    "xla_cpu_use_fusion_emitters": True,
}
FAST: Any = {name: on for name, on in _OPTIONS.items() if name in os.environ.get("XLA_FLAGS", "")}
"""For `jax.jit(..., compiler_options=FAST)`: what conftest.py switched off is on."""
