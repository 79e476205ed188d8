"""The PyTorch twins that the benchmark compares with are the same functions."""

import multiprocessing
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.models import DiT, UNet
from experiments.benchmark import against_torch
from experiments.benchmark.cases import Case
from tests.support.later import Later, needs

torch: Any = Later("torch")
pytestmark = [pytest.mark.parity, needs("torch")]
UNET = {
    "channels": 16,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "head_channels": 16,
    "scale_shift": True,
}
CASES = [
    (DiT, {"patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 4.0}, 10),
    (UNet, UNET, 10),
    (UNet, {**UNET, "scale_shift": False}, 0),
]


@pytest.mark.parametrize(("network", "settings", "num_classes"), CASES)
def test_a_twin_is_the_same_function(network, settings, num_classes):
    from experiments.benchmark import torch_networks

    ours = network(num_classes=num_classes, **settings)
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 2))
    noise_label, label = jnp.array([1.0, 300.0, 999.0]), jnp.array([0, 3, num_classes])
    params = jax.jit(ours.init)(jax.random.key(1), x, noise_label, label)["params"]
    # What starts at zero would hide the rest.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    params = tree.unflatten(
        [
            leaf + 0.1 * jax.random.normal(k, leaf.shape)
            for k, leaf in zip(keys, leaves, strict=True)
        ]
    )
    expected = jax.jit(ours.apply)({"params": params}, x, noise_label, label)
    theirs = getattr(torch_networks, network.__name__)((8, 8, 2), num_classes, **settings)
    torch_networks.load_flax(theirs, params)
    given = (torch.from_numpy(np.array(each)) for each in (x, noise_label, label))
    with torch.no_grad():
        found = theirs(*given).numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)
    assert np.abs(expected).max() > 0.1


SIZES = {"steps": 1, "num_samples": 4}
SMALL = Case("digits", 8, None, ("config.model.hidden_size=16", "config.model.depth=1"))


# Of float32 nothing is new but that PyTorch leaves its numbers as they are.
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.thorough), "bfloat16"])
def test_both_libraries_are_timed_in_each_round(dtype):
    case = replace(SMALL, overrides=(*SMALL.overrides, f"config.model.dtype={dtype}"))
    found = against_torch.measure_pairs(case, compiled=False, rounds=3, **SIZES)
    assert [(pair.config, pair.program) for pair in found] == [
        ("digits", "training"),
        ("digits", "sampling"),
    ]
    for pair in found:
        assert len(pair.ours) == len(pair.theirs) == len(pair.ratios) == 3
        assert min(pair.ours + pair.theirs) > 0
        assert pair.ratios[1] == pair.ours[1] / pair.theirs[1]


def test_a_network_without_a_twin_is_refused():
    case = replace(SMALL, overrides=(*SMALL.overrides, "config.model.dropout=0.1"))
    here, there = multiprocessing.Pipe()
    against_torch._serve(there, against_torch._theirs, case, {**SIZES, "compiled": False})
    with pytest.raises(UserError, match=r"no twin of diffjax.models.dit.network:DiT as configured"):
        against_torch._answer(here)
