"""Files of LoRA that are written: diffusers with peft computes the same with them as we do."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from diffjax.conditions import TokenStates
from diffjax.errors import UserError
from diffjax.exchange.convert import convert, layout_of_lora
from diffjax.models.families import LAYOUTS, Found
from diffjax.models.flux.network import Flux
from diffjax.models.loras import published_changes, with_loras
from diffjax.models.low_rank import LoraLayers, lora_layers, without_lora
from diffjax.models.stable_diffusion.published import FAMILY as STABLE_DIFFUSION
from diffjax.pretrained.lora import NETWORK, read_lora
from diffjax.pretrained.lora_writer import DIALECTS, write_lora
from tests.models.published.test_stable_diffusion import SMALL, drawn
from tests.models.test_mmdit import condition, params_of
from tests.models.test_mmdit import network_of as mmdit_of
from tests.references import mmdit
from tests.support.witnesses import witnesses

LORA = LoraLayers(rank=2, alpha=5.0)


def with_drawn(denoiser, base, lora):
    """The parameters of a network with LoRA whose A and B are drawn."""
    with lora.on():
        shapes = jax.eval_shape(denoiser.init, jax.random.key(0), *denoiser.inputs)["params"]
    assert lora_layers(shapes)
    rng = np.random.default_rng(1)
    leaves, structure = jax.tree.flatten(shapes)
    found = [0.3 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return _filled(jax.tree.unflatten(structure, found), base)


def _filled(params, base):
    return {
        name: _filled(x, base[name]) if isinstance(x, dict) else base.get(name, x)
        for name, x in params.items()
    }


def written(file, dialect, params, lora, denoiser):
    layout, folder = layout_of_lora(denoiser.network, dialect)
    changes = published_changes(params, lora.scale, layout, denoiser)
    write_lora(file, changes, DIALECTS[dialect], folder)
    return changes


@pytest.fixture(scope="module")
def tuned():
    """A small U-Net of Stable Diffusion, and its parameters with LoRA of all layers."""
    denoiser = STABLE_DIFFUSION.network(**SMALL)
    return denoiser, with_drawn(denoiser, drawn(denoiser), LORA)


@pytest.mark.parametrize(
    "dialect",
    [pytest.param(x, marks=[] if x == "lora" else pytest.mark.thorough) for x in DIALECTS],
)
def test_a_file_adds_what_the_network_was_trained_to(dialect, tuned, tmp_path):
    """Weights with the file are those that are merged."""
    denoiser, params = tuned
    written(tmp_path / "x.safetensors", dialect, params, LORA, denoiser)
    base = without_lora(params)
    state = STABLE_DIFFUSION.to_theirs(base, denoiser)
    found = Found(denoiser, "diffusers", STABLE_DIFFUSION, state, "net")
    after = with_loras(found, [read_lora(tmp_path / "x.safetensors")], NETWORK).params()
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5),
        after,
        LORA.merged(params),
    )
    moved = [
        np.any(x != y) for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(base), strict=True)
    ]
    assert sum(moved) == len(lora_layers(params)) > 20


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("scan", [True, False])
def test_of_flux_too_whose_blocks_may_be_stacked(dialect, scan, tmp_path):
    denoiser = mmdit_of("Flux.1 dev", scan=scan)
    params = with_drawn(denoiser, params_of("Flux.1 dev", scan=scan), LORA)
    written(tmp_path / "x.safetensors", dialect, params, LORA, denoiser)
    layout = LAYOUTS[Flux]["diffusers"]
    found = Found(
        denoiser, "diffusers", layout, layout.to_theirs(without_lora(params), denoiser), "net"
    )
    after = with_loras(found, [read_lora(tmp_path / "x.safetensors")], NETWORK).params()
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5),
        after,
        LORA.merged(params),
    )


def error(found, expected):
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def evaluations(tuned):
    """The U-Net of diffusers, its evaluation, and what ours with LoRA returns."""
    pytest.importorskip("peft", reason="pip install -e '.[parity]'")
    diffusers = pytest.importorskip("diffusers", reason="pip install -e '.[parity]'")
    import torch

    denoiser, params = tuned
    config: Any = STABLE_DIFFUSION.config
    unet = diffusers.UNet2DConditionModel.from_config(config.entries(denoiser))
    state = STABLE_DIFFUSION.to_theirs(without_lora(params), denoiser)
    unet.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
    height, width, channels = denoiser.image_shape
    rng, tokens = np.random.default_rng(2), denoiser.inputs[2].states.shape[-1]
    x = rng.normal(size=(2, height, width + 8, channels)).astype(np.float32)
    states, times = rng.normal(size=(2, 5, tokens)).astype(np.float32), np.float32([999, 320])
    cond = TokenStates(states, np.ones((2, 5), bool), np.zeros((2, 0), np.float32))

    def theirs():
        arrays = x.transpose(0, 3, 1, 2), times, states
        with torch.no_grad():
            out = unet.double()(*(torch.tensor(array).double() for array in arrays)).sample
        return out.numpy().transpose(0, 2, 3, 1)

    def apply(params):
        with LORA.on():
            return denoiser.network.apply({"params": params}, x, times, cond)

    return unet.eval(), theirs, jax.jit(apply)(params)


@pytest.mark.parity
@pytest.mark.parametrize("dialect", DIALECTS)
def test_diffusers_evaluates_a_u_net_with_the_file_as_we_do(dialect, tuned, evaluations, tmp_path):
    """On a rectangle, with unlike times; every layer has LoRA."""
    diffusers: Any = pytest.importorskip("diffusers")
    unet, theirs, found = evaluations
    file = tmp_path / "x.safetensors"
    written(file, dialect, tuned[1], LORA, tuned[0])
    without = theirs()
    kind = diffusers.StableDiffusionPipeline
    read = kind.lora_state_dict(str(file), return_lora_metadata=True)
    kind.load_lora_into_unet(*read[:2], unet, metadata=read[2])
    try:
        expected = theirs()
    finally:
        unet.unload_lora()
    assert error(without, expected) > 0.05
    assert error(found, expected) < 1e-5


@pytest.mark.parity
@pytest.mark.parametrize("dialect", witnesses(DIALECTS, ["lora"]))
def test_diffusers_evaluates_flux_with_the_file_as_we_do(dialect, tmp_path):
    """Blocks over one sequence only where diffusers takes other widths than Flux.1's."""
    pytest.importorskip("peft", reason="pip install -e '.[parity]'")
    diffusers: Any = pytest.importorskip("diffusers", reason="pip install -e '.[parity]'")
    import torch

    lora = replace(LORA, layers="block_0/*,block_1/*" if dialect == "lora_kohya" else "*block_*")
    denoiser = mmdit_of("Flux.1 dev")
    params = with_drawn(denoiser, params_of("Flux.1 dev"), lora)
    peer, evaluate = mmdit.theirs("Flux.1 dev")
    given = mmdit.inputs(mmdit.CASES["Flux.1 dev"][1])

    def theirs():
        with torch.no_grad():
            return evaluate(mmdit.Inputs(*(torch.tensor(x).double() for x in given))).numpy()

    without = theirs()
    written(tmp_path / "x.safetensors", dialect, params, lora, denoiser)
    kind = diffusers.FluxPipeline
    found = kind.lora_state_dict(
        str(tmp_path / "x.safetensors"), return_alphas=True, return_lora_metadata=True
    )
    kind.load_lora_into_transformer(*found[:2], peer, metadata=found[2])
    peer.double()
    expected = theirs()

    def apply(params):
        with lora.on():
            return denoiser.network.apply(
                {"params": params}, given.images, mmdit.TIMES, condition(given)
            )

    assert error(without, expected) > 0.05
    assert error(jax.jit(apply)(params), expected) < 1e-5


def test_a_run_without_lora_or_of_a_network_without_names_has_no_file(trained_run, tmp_path):
    with pytest.raises(UserError, match="is no run with LoRA") as caught:
        convert(str(trained_run), "lora", tmp_path / "x", allowed_packages=("diffjax", "tests"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()
