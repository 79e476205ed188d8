"""How programs of tests are compiled: quickly (conftest.py), or fast where they compute long."""

from typing import Any

FAST: Any = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
"""For `jax.jit(..., compiler_options=FAST)`."""
