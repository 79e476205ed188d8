"""Plans of published networks of texts: their config, and the rows of LoRA in the docs."""

import dataclasses

import pytest

from diffjax import config_files
from diffjax.conditions import Tokens
from diffjax.models.stable_diffusion.published import FAMILY as STABLE_DIFFUSION
from diffjax.performance.planning.compiled import expected_data
from diffjax.performance.planning.topologies import topology_called
from tests.pages.plans import PROGRAMS, fewest
from tests.performance.test_planning import fake


def test_a_published_network_is_planned_at_its_own_size_and_with_its_own_condition():
    for name, shape, condition, steps in (
        ("FLUX.1-dev", (128, 128, 16), Tokens(512, 4096, 768), 50),
        ("FLUX.2-dev", (64, 64, 128), Tokens(512, 15_360), 50),
        ("SDXL", (128, 128, 4), STABLE_DIFFUSION.size("SDXL").condition, 50),
    ):
        config = config_files.load(f"configs/published.py:model={name}")
        assert expected_data(config) == (shape, condition)
        assert config.model.dtype == "bfloat16"
        assert config.sampling.num_steps == steps


def test_the_table_has_the_fewest_chips_that_fit_and_what_each_program_needs():
    """By hand for 10 B parameters: forward, recomputed forward, and two gradients of 1 TFLOP."""
    sampling, lora, full = PROGRAMS
    needs = dataclasses.replace(
        fake(8, peak=2**31),
        num_params=10**10,
        memory={"activations": 2**30},
        flops=4e12,
        model_flops=3e12,
    )
    for program, topology, gigabytes, tflop, passes in (
        (sampling, "h100:1", 40, 4, 50),
        (lora, "h100:1", 40, 3, 2),
        (full, "h100:4", 160 / 4, 4, 3),
    ):
        plan = fewest("h100", needs, program, 50)
        chips = topology_called(topology).num_chips
        activations = 2**30 if program.traced == "training" else 0
        assert plan.topology == topology
        assert plan.peak_bytes == gigabytes * 10**9 + activations
        assert plan.flops == tflop * 1e12
        assert plan.wire_bytes == pytest.approx(passes * 2e10 * (chips - 1) / chips)
        assert plan.batch_size == program.images * chips
    large = dataclasses.replace(needs, num_params=3 * 10**10)
    assert fewest("h100", large, full, 50).topology == "h100:2x8"
