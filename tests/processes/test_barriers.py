"""The processes of a run wait for each other by name."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import orbax.checkpoint as ocp

from diffjax.runs.checkpoints import Checkpoints


class State(NamedTuple):
    params: Any
    frozen: Any


def test_checkpoints_written_at_the_same_time_share_no_barrier(tmp_path, monkeypatch):
    """The newest ones, the best one and the frozen parameters; JAX refuses an equal name."""
    seen = []
    unique = ocp.multihost.unique_barrier_key
    monkeypatch.setattr(
        ocp.multihost,
        "unique_barrier_key",
        lambda key, *, prefix=None, **parts: (
            seen.append(prefix) or unique(key, prefix=prefix, **parts)
        ),
    )
    for folder, frozen in (("checkpoints", {}), ("best", {"teacher": jnp.ones(2)})):
        seen.clear()
        store = Checkpoints(tmp_path / folder)
        store.save(1, State({"w": jnp.ones(3)}, frozen), {})
        store.close()
        assert set(seen) == ({folder, "frozen"} if frozen else {folder})
