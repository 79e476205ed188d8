"""Plans of published networks of texts: their config, and the rows of LoRA in the docs."""

import dataclasses

from diffjax import config_files
from diffjax.conditions import Tokens
from diffjax.models.stable_diffusion.published import FAMILY as STABLE_DIFFUSION
from diffjax.performance.planning.compiled import expected_data
from tests.performance.test_planning import fake
from tests.support.plans_page import smallest, with_lora


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


def test_lora_has_neither_moments_nor_gradients_of_the_weights():
    """Forward, recomputed forward and backward through activations: 3 of 4 thirds are left."""
    full = dataclasses.replace(
        fake(8, peak=2**31),
        topology="h100:8",
        num_params=10**9,
        memory={"parameters": 5 * 10**8, "optimizer": 10**9, "activations": 2**30},
        flops=4e12,
        model_flops=3e12,
    )
    lora = with_lora(full, "h100")
    assert (lora.topology, lora.batch_size, lora.flops) == ("h100:1", full.batch_size // 8, 3e12)
    assert lora.memory == {"parameters": 4 * 10**9, "activations": 2**30}
    assert lora.wire_bytes == 0
    large = with_lora(dataclasses.replace(full, num_params=3 * 10**10), "h100")
    assert large.topology == "h100:4"
    assert large.wire_bytes == 2 * 2 * 3e10 * 3 / 4


def test_a_plan_is_made_on_the_fewest_chips_that_fit(monkeypatch):
    tried = []

    def model(config, topology, program):
        tried.append((topology.name, config.batch_size, program))
        return dataclasses.replace(fake(1, peak=2**31), fits=topology.num_chips > 8)

    monkeypatch.setattr("tests.support.plans_page.model_of", model)
    smallest("FLUX.2-dev", "h100", "training")
    # 32.2 B parameters of 16 bytes need nine GPUs.
    assert tried == [("h100:2x8", 64, "training")]
