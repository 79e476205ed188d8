"""MMDiT and Flux against outputs of diffusers, their layouts, and what the options promise."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.conditions import TokenStates
from diffjax.errors import UserError
from diffjax.models.dit.stages import unstack_blocks
from diffjax.models.families import LAYOUTS, find_published, networks_of
from diffjax.models.flux.network import Flux
from diffjax.models.flux.published import FAMILY as FLUX
from diffjax.models.flux2.published import FAMILY as FLUX2
from diffjax.models.layers.common import HIDDEN
from diffjax.models.sd3.network import MMDiT
from diffjax.models.sd3.published import DIFFUSERS as SD3_OF_DIFFUSERS
from diffjax.models.sd3.published import FAMILY
from diffjax.pretrained.files import write_safetensors
from diffjax.pretrained.folders import write_folder
from tests.models.published.test_families import drawn
from tests.references import mmdit
from tests.support.witnesses import witnesses


def condition(given: mmdit.Inputs, mask: Any = None) -> dict[str, Any]:
    """The condition of our network, of the parts that it takes."""
    mask = jnp.ones(given.states.shape[:2], bool) if mask is None else mask
    found: dict[str, Any] = {"text": TokenStates(given.states, mask, given.pooled)}
    if given.guidance.shape[-1]:
        found["guidance"] = given.guidance
    if given.beside.shape[-1]:
        found["image"] = given.beside
    return found


@functools.cache
def network_of(name: str, **how: Any) -> Any:
    family, settings = mmdit.CASES[name]
    return family.network(**settings, **how)


@functools.cache
def state_of(name: str) -> dict[str, np.ndarray]:
    """The parameters that the reference drew, by the names of diffusers."""
    family, _ = mmdit.CASES[name]
    network = network_of(name)
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape, "f"), family.shapes(network))
    return mmdit.drawn({k: x.shape for k, x in family.to_theirs(nothing, network).items()})


def params_of(name: str, **how: Any) -> Any:
    return mmdit.CASES[name][0].to_ours(state_of(name), network_of(name, **how), "theirs")


def evaluated(name: str, **how: Any) -> np.ndarray:
    given = mmdit.inputs(mmdit.CASES[name][1])
    apply = jax.jit(network_of(name, **how).network.apply)
    arguments = jnp.asarray(given.images), jnp.asarray(mmdit.TIMES), condition(given)
    return np.asarray(apply({"params": params_of(name, **how)}, *arguments))


def error(found: Any, expected: Any, least: float = 1e-2) -> float:
    assert np.shape(found) == np.shape(expected)
    assert np.std(expected) > least
    return float(np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected))


@functools.cache
def stored(name: str) -> np.ndarray:
    with np.load(mmdit.FILE, allow_pickle=False) as file:
        return file[name]


# Of SD3.5 and Flux.1 Fill, the others are parts or variants.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[] if name in ("SD3.5", "Flux.1 dev") else pytest.mark.thorough(tenth=False)
        )
        for name in mmdit.CASES
    ],
)
def test_outputs_are_those_of_diffusers(name):
    assert networks_of(state_of(name)) == [type(network_of(name).network).__name__]
    assert error(evaluated(name), stored(name)) < 1e-5


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("name", ["SD3.5", "Flux.1 Fill", "Flux.2 dev"])
def test_stacked_blocks_and_half_precision_are_the_same_function(name):
    assert error(evaluated(name, scan=True), stored(name)) < 1e-5
    assert error(evaluated(name, scan=True, remat="full"), stored(name)) < 1e-5
    assert error(evaluated(name, dtype="bfloat16"), stored(name)) < 2e-2
    network = network_of(name, scan=True).network
    starts = [stage.start for stage in (*network.joint_stages, *network.single_stages)[1:]]
    separate = unstack_blocks(params_of(name, scan=True), *starts)
    jax.tree.map(np.testing.assert_array_equal, separate, params_of(name))


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["SD3.5", "Flux.1 Fill", "Flux.2 dev"])
def test_there_and_back_with_stacked_blocks_no_bit_changes(name):
    own, _ = mmdit.CASES[name]
    network = network_of(name, scan=True)
    params = drawn(own, network)
    for layout in LAYOUTS[type(network.network)].values():
        back = layout.to_ours(layout.to_theirs(params, network), network, "x")
        jax.tree.map(np.testing.assert_array_equal, back, params)


NET = {"hidden_size": 16, "depth": 2, "num_heads": 2}
GIVEN = mmdit.inputs({"channels": 4, "context_width": 6, "pooled_width": 5})


def out_of(network: MMDiT, mask: Any, states: Any, params: Any) -> np.ndarray:
    given = GIVEN._replace(states=states)
    arguments = GIVEN.images, mmdit.TIMES, condition(given, mask)
    return np.asarray(network.apply({"params": params}, *arguments))


@pytest.mark.thorough
def test_excluded_tokens_count_only_where_the_mask_is_not_used():
    """What they are has no influence; longer padding is the same condition."""
    mask = np.arange(mmdit.LENGTH)[None] < np.array([[2], [5], [0]])
    other = np.where(mask[..., None], GIVEN.states, 7.0)
    longer = np.pad(other, [(0, 0), (0, 3), (0, 0)]), np.pad(mask, [(0, 0), (0, 3)])
    for masked in (True, False):
        network = MMDiT(**NET, masked=masked)
        shapes = jax.eval_shape(
            network.init, jax.random.key(0), GIVEN.images, mmdit.TIMES, condition(GIVEN, mask)
        )["params"]
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x, rng=rng: 0.3 * rng.normal(size=x.shape), shapes)
        out = out_of(network, mask, GIVEN.states, params)
        difference = np.abs(out_of(network, mask, other, params) - out).max((1, 2, 3))
        if masked:
            assert difference.max() < 1e-5
            assert np.abs(out_of(network, longer[1], longer[0], params) - out).max() < 1e-5
        else:
            assert (difference > 1e-3).tolist() == [True, False, True]


@pytest.mark.thorough
@pytest.mark.parametrize("scan", [False, True])
def test_the_middle_is_sown_and_an_untrained_network_returns_zero(scan):
    network = MMDiT(**NET | {"depth": 5}, scan=scan)
    arguments = GIVEN.images, mmdit.TIMES, condition(GIVEN)
    variables = jax.jit(network.init)(jax.random.key(0), *arguments)
    run = jax.jit(functools.partial(network.apply, mutable=[HIDDEN[0]]))
    out, sown = run({"params": variables["params"]}, *arguments)
    assert not np.asarray(out).any()
    (hidden,) = sown[HIDDEN[0]][HIDDEN[1]]
    assert hidden.shape == (3, 4, 6, 16)


def test_what_a_network_refuses():
    images, times, given = GIVEN.images, mmdit.TIMES, condition(GIVEN)
    for network, cond, said in (
        (MMDiT(**NET), None, "MMDiT takes token states, and this condition has none"),
        (MMDiT(**NET, patch_size=3), given, "patch_size=3 does not divide an image of 8x12"),
        (MMDiT(**NET | {"num_heads": 3}), given, "has to be a multiple of 4 and of num_heads=3"),
        (MMDiT(**NET, stored_positions=5), given, "larger than .* the longest side is 10"),
        (MMDiT(**NET, dual_blocks=3), given, "dual_blocks=3 is more than depth=2"),
        (MMDiT(**NET, hidden_depths=(3,)), given, r"hidden_depths=\(3,\) is more than depth=2"),
        (Flux(**NET), given, r"rotary_axes=\(16, 56, 56\) have to be .* of a head, 8"),
        (Flux(**NET, rotary_axes=(1, 3, 4)), given, r"widths \(1, 3, 4\) .* have to be even"),
        (MMDiT(**NET), {**given, "x": times[:, None]}, "without embedded_guidance takes no numb"),
        (MMDiT(**NET, mlp="glu"), given, "no MLP 'glu'"),
    ):
        with pytest.raises(UserError, match=said):
            jax.eval_shape(network.init, jax.random.key(0), images, times, cond)
    with pytest.raises(UserError, match=r"mesh\.tensor=4 does not divide the 6 heads"):
        MMDiT().check_mesh((8, 8, 4), {"tensor": 4})


def test_what_config_json_has_and_no_network_here_is():
    network = network_of("SD3.5")
    config = SD3_OF_DIFFUSERS.config
    assert config
    entries = config.entries(network)
    assert SD3_OF_DIFFUSERS.network_of(state_of("SD3.5"), "x", entries) == network
    for change, said in (
        ({"dual_attention_layers": [1, 2]}, r"dual_attention_layers=\[1, 2\] are not the first"),
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm' is neither null nor 'rms_norm'"),
        ({"out_channels": 8}, "out_channels=8 are not those of the input"),
        ({"caption_projection_dim": 8}, "caption_projection_dim=8 is not the width of the tok"),
        ({"num_layers": 3}, "config.json has depth=3, but its tensors are of depth=4"),
    ):
        with pytest.raises(UserError, match=said):
            SD3_OF_DIFFUSERS.network_of(state_of("SD3.5"), "x", entries | change)
    other = SD3_OF_DIFFUSERS.network(**mmdit.CASES["SD3"][1], mlp="swiglu")
    with pytest.raises(UserError, match="SD3Transformer2DModel has mlp='gelu', not 'swiglu'"):
        config.entries(other)


@pytest.mark.thorough
def test_files_with_other_models_beside_the_network(tmp_path):
    network, params = network_of("SD3.5"), params_of("SD3.5")
    prefix = "model.diffusion_model."
    state = {f"{prefix}{key}": x for key, x in FAMILY.to_theirs(params, network).items()}
    others = {"text_encoders.clip_l.logit_scale": np.zeros(1, np.float32)}
    write_safetensors(tmp_path / "w.safetensors", state | others)
    found = find_published(tmp_path / "w.safetensors", num_heads=2, side=16)
    assert found.network == network
    jax.tree.map(np.testing.assert_array_equal, found.params(), params)


def by_renaming(state: dict[str, np.ndarray], rows: Any) -> dict[str, np.ndarray]:
    """Tensors of diffusers made of the authors' ones by NumPy alone."""
    found = {}
    for theirs, names, *parts in rows:
        split = np.split(state.pop(theirs), parts[0]) if parts else [state.pop(theirs)]
        found |= dict(zip(names, split, strict=True))
    assert not state
    return found


def flux_of_authors(state: dict[str, np.ndarray], depth: int, width: int) -> dict[str, np.ndarray]:
    """Flux.1 of diffusers from the authors' tensors, written out once more."""
    rows: list[Any] = []
    for kind in ("weight", "bias"):
        for i in range(depth):
            there, here = f"double_blocks.{i}", f"transformer_blocks.{i}"
            for mine, own, ff, norm in (
                ("img", "to_{}", "ff", "norm1"),
                ("txt", "add_{}_proj", "ff_context", "norm1_context"),
            ):
                qkv = [f"{here}.attn.{own.format(part)}.{kind}" for part in "qkv"]
                out = "to_out.0" if mine == "img" else "to_add_out"
                rows += [
                    (f"{there}.{mine}_attn.qkv.{kind}", qkv, 3),
                    (f"{there}.{mine}_attn.proj.{kind}", [f"{here}.attn.{out}.{kind}"]),
                    (f"{there}.{mine}_mod.lin.{kind}", [f"{here}.{norm}.linear.{kind}"]),
                    (f"{there}.{mine}_mlp.0.{kind}", [f"{here}.{ff}.net.0.proj.{kind}"]),
                    (f"{there}.{mine}_mlp.2.{kind}", [f"{here}.{ff}.net.2.{kind}"]),
                ]
                if kind == "weight":
                    added = "" if mine == "img" else "added_"
                    for query, q in (("query", "q"), ("key", "k")):
                        scale = f"{there}.{mine}_attn.norm.{query}_norm.scale"
                        rows.append((scale, [f"{here}.attn.norm_{added}{q}.weight"]))
            there, here = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
            four = [f"{here}.attn.to_{part}.{kind}" for part in "qkv"] + [f"{here}.proj_mlp.{kind}"]
            rows += [
                (f"{there}.linear1.{kind}", four, [width, 2 * width, 3 * width]),
                (f"{there}.linear2.{kind}", [f"{here}.proj_out.{kind}"]),
                (f"{there}.modulation.lin.{kind}", [f"{here}.norm.linear.{kind}"]),
            ]
            if kind == "weight":
                for query, q in (("query", "q"), ("key", "k")):
                    scale = f"{there}.norm.{query}_norm.scale"
                    rows.append((scale, [f"{here}.attn.norm_{q}.weight"]))
        for theirs, name in (
            ("time_in", "timestep"),
            ("guidance_in", "guidance"),
            ("vector_in", "text"),
        ):
            for place, number in (("in", 1), ("out", 2)):
                full = f"time_text_embed.{name}_embedder.linear_{number}.{kind}"
                rows.append((f"{theirs}.{place}_layer.{kind}", [full]))
        for theirs, name in (
            ("img_in", "x_embedder"),
            ("txt_in", "context_embedder"),
            ("final_layer.linear", "proj_out"),
            ("final_layer.adaLN_modulation.1", "norm_out.linear"),
        ):
            rows.append((f"{theirs}.{kind}", [f"{name}.{kind}"]))
    found = by_renaming(dict(state), rows)
    for kind in ("weight", "bias"):
        name = f"norm_out.linear.{kind}"
        found[name] = np.concatenate(np.split(found[name], 2)[::-1])
    return found


@pytest.mark.thorough
def test_the_authors_flux_has_the_tensors_of_diffusers():
    params, network = params_of("Flux.1 dev"), network_of("Flux.1 dev")
    found = flux_of_authors(FLUX.to_theirs(params, network), depth=2, width=16)
    assert_same(found, state_of("Flux.1 dev"))


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name)


# Stability AI 2024 (8.1 and 2.5 billion, of which positions are 0.09 and 0.23); for Flux the sizes
# in bytes of the published bfloat16 files, halved.
@pytest.mark.thorough
def test_sizes_have_the_published_numbers_of_parameters():
    for family, name, number in (
        (FAMILY, "SD3-Medium", 2_028_328_000 + 192**2 * 1536),
        (FAMILY, "SD3.5-Large", 8_056_627_520 + 192**2 * 2432),
        (FLUX, "FLUX.1-dev", 11_901_408_320),
        (FLUX, "FLUX.1-schnell", 11_891_178_560),
    ):
        assert family.sizes[name].num_parameters == number
    assert round(FLUX2.sizes["FLUX.2-dev"].num_parameters / 1e9) == 32


@pytest.fixture(
    scope="module", params=witnesses(mmdit.CASES, ["SD3.5", "Flux.1 dev", "Flux.2 dev"])
)
def case(request):
    pytest.importorskip("diffusers", reason="pip install -e '.[parity]'")
    return request.param, *mmdit.theirs(request.param)


@pytest.mark.parity
class TestAgainstDiffusers:
    @pytest.mark.parametrize("train", witnesses([False, True], [True]))
    def test_outputs_and_gradients_are_equal(self, case, train):
        """By inputs and all parameters, of unlike times; in float64 there."""
        torch = pytest.importorskip("torch")
        name, peer, evaluate = case
        family, settings = mmdit.CASES[name]
        given = mmdit.inputs(settings)
        leaves: Any = mmdit.Inputs(*(torch.tensor(x).double().requires_grad_() for x in given))
        peer.train(train).zero_grad()
        expected = evaluate(leaves)
        weights = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
        (expected * torch.tensor(weights)).sum().backward()
        module = network_of(name).network

        @jax.jit
        def run(params, images, states, pooled):
            def total(params, images, states, pooled):
                cond = condition(given._replace(states=states, pooled=pooled))
                out = module.apply({"params": params}, images, mmdit.TIMES, cond, train=train)
                return (out * weights).sum(), out

            return jax.grad(total, (0, 1, 2, 3), has_aux=True)(params, images, states, pooled)

        (of_params, *of_inputs), out = run(params_of(name), *given[:3])
        assert error(out, expected.detach().numpy()) < 1e-5
        for found, leaf in zip(of_inputs, leaves, strict=False):
            if leaf.numel():
                assert error(found, leaf.grad.numpy()) < 1e-5
        named = family.to_theirs(of_params, network_of(name))
        for key, parameter in peer.named_parameters():
            gradient = parameter.grad.numpy()
            if "to_k.bias" in key or "add_k_proj.bias" in key:
                # Without a norm or a rotation it is 0: a softmax ignores constants.
                assert np.abs(named[key] - gradient).max() < 1e-4, key
            elif not gradient.any():  # Of queries of a text that is used no more.
                assert not named[key].any()
                assert "add_q_proj" in key or "norm_added_q" in key
            else:
                assert error(named[key], gradient, least=0.0) < 2e-5, key

    def test_folders_are_read_on_both_sides(self, case, tmp_path):
        name, peer, _ = case
        family, _ = mmdit.CASES[name]
        network, params = network_of(name), params_of(name)
        peer.float().save_pretrained(tmp_path / "theirs")
        found = find_published(tmp_path / "theirs", side=network_of(name).image_shape[0])
        assert (found.network, found.layout) == (network, "diffusers")
        jax.tree.map(np.testing.assert_array_equal, found.params(), params)
        assert family.config
        write_folder(
            tmp_path / "ours", family.to_theirs(params, network), family.config.entries(network)
        )
        entries = json.loads((tmp_path / "ours" / "config.json").read_text())
        read = type(peer).from_pretrained(tmp_path / "ours")
        back = {key: x.numpy() for key, x in read.state_dict().items()}
        assert_same(back, state_of(name))
        assert {key: read.config[key] for key in entries if key[0] != "_"} == {
            key: value for key, value in entries.items() if key[0] != "_"
        }
        peer.double()

    def test_stabilitys_files_are_converted_as_diffusers_does(self):
        torch, utils = map(pytest.importorskip, ("torch", "diffusers.loaders.single_file_utils"))
        for name in ("SD3", "SD3.5"):
            own = FAMILY.to_theirs(params_of(name), network_of(name))
            state = {f"model.diffusion_model.{key}": x for key, x in own.items()}
            tensors = {key: torch.tensor(np.array(x)) for key, x in state.items()}
            converted = utils.convert_sd3_transformer_checkpoint_to_diffusers(tensors)
            assert_same({key: x.numpy() for key, x in converted.items()}, state_of(name))

    def test_flux2_files_are_converted_as_diffusers_does(self):
        torch, utils = map(pytest.importorskip, ("torch", "diffusers.loaders.single_file_utils"))
        for name in ("Flux.2 dev", "Flux.2 klein"):
            state = FLUX2.to_theirs(params_of(name), network_of(name))
            tensors = {key: torch.tensor(np.array(x)) for key, x in state.items()}
            converted = utils.convert_flux2_transformer_checkpoint_to_diffusers(tensors)
            assert_same({key: x.numpy() for key, x in converted.items()}, state_of(name))
