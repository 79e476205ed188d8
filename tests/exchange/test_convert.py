"""Weights in other layouts: exact round trips, what is unlike, what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from diffjax.errors import UserError
from diffjax.exchange.convert import TARGETS, convert
from diffjax.exchange.own_folders import read_own, write_own
from diffjax.models.autoencoder_kl.network import AutoencoderKL
from diffjax.models.autoencoder_kl.published import FAMILY as AUTOENCODER_KL
from diffjax.models.autoencoder_kl.published import FLUX2, LDM
from diffjax.models.dit.network import DiT
from diffjax.models.dit.published import DIFFUSERS, FAMILY
from diffjax.models.families import LAYOUTS, find_published
from diffjax.models.sit.network import SiT
from diffjax.models.taesd.network import TAESD
from diffjax.models.taesd.published import DIFFUSERS as TAESD_OF_DIFFUSERS
from diffjax.models.taesd.published import FAMILY as TAESD_FAMILY
from diffjax.pretrained.family import Denoiser, Family
from diffjax.pretrained.files import read_state_dict, write_safetensors
from diffjax.pretrained.folders import read_weights, write_folder
from diffjax.pretrained.torch_writer import write_torch
from diffjax.runs.initial import by_path, find_initial_weights
from experiments import convert as experiment
from experiments.flags import cli
from tests.models.published.test_families import SMALL, drawn
from tests.references import autoencoder_kl as reference

SETTINGS: Any = {"side": 8, "channels": 3, "num_classes": 5, "out_channels": 6, "num_heads": 2}
SETTINGS |= {"hidden_size": 16, "depth": 2}
DIT = DIFFUSERS.network(**SETTINGS)


@pytest.fixture(scope="module")
def params():
    return drawn(DIFFUSERS, DIT)


@pytest.fixture(scope="module")
def own(params, tmp_path_factory):
    """A folder of diffjax with a DiT that computes what diffusers' does."""
    folder = tmp_path_factory.mktemp("own") / "dit"
    write_own(folder, DIT, params)
    return folder


def entries_of(family: Family, network: Any) -> dict[str, Any]:
    assert family.config
    return family.config.entries(network)


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_there_and_back_through_each_layout_no_bit_changes(own, params, tmp_path):
    lines = convert(str(own), "diffusers", tmp_path / "theirs")
    count = sum(x.size for x in by_path(params).values())
    assert lines == [
        f"DiT, {count:,} parameters, of {own} (layout: diffjax)",
        "diffusers: config.json, diffusion_pytorch_model.safetensors in "
        + str(tmp_path / "theirs"),
    ]
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["_class_name"] == "DiTTransformer2DModel"
    assert (config["norm_eps"], config["sample_size"], config["num_layers"]) == (1e-5, 8, 2)
    found = find_published(tmp_path / "theirs")
    assert (found.network, found.layout) == (DIT, "diffusers")
    same(found.params(), params)
    convert(str(tmp_path / "theirs"), "diffjax", tmp_path / "back")
    network, back = read_own(tmp_path / "back")
    assert network == DIT
    same(back, params)


def test_what_the_authors_code_computes_otherwise_is_said(own, params, tmp_path):
    lines = convert(str(own), "authors", tmp_path / "theirs")
    assert lines[1] == (
        "unlike: whoever reads this layout evaluates the network with frequency_endpoint=False "
        "instead of True, mlp_norm_eps=1e-06 instead of 1e-05"
    )
    state = read_state_dict(tmp_path / "theirs" / "weights.pt")
    same(FAMILY.to_ours(state, DIT, "x"), params)


def test_stacked_blocks_are_written_one_by_one(tmp_path):
    stacked = DIFFUSERS.network(**SETTINGS, scan=True)
    weights = drawn(DIFFUSERS, stacked)
    write_own(tmp_path / "own", stacked, weights)
    assert len(convert(str(tmp_path / "own"), "diffusers", tmp_path / "theirs")) == 2
    found = DIFFUSERS.read(tmp_path / "theirs", stacked)[1]
    same(found, weights)


EACH_LAYOUT = [
    (name, family)
    for layouts in LAYOUTS.values()
    for name, family in layouts.items()
    if name in TARGETS
]


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize(
    ("to", "family"), EACH_LAYOUT, ids=[f"{family.name}-{to}" for to, family in EACH_LAYOUT]
)
def test_each_network_is_written_in_each_of_its_layouts(to, family, tmp_path):
    wide = {"channels": 128} if family.name == "DDPM" else {}  # diffusers has 32 groups
    network = family.network(**SMALL.get(family.name, {}) | wide)
    weights = drawn(family, network)
    write_own(tmp_path / "own", network, weights)
    assert read_own(tmp_path / "own")[0] == network
    lines = convert(str(tmp_path / "own"), to, tmp_path / "theirs")
    assert not [line for line in lines if line.startswith("unlike")]
    one_file = to == "authors" and not family.files
    state = read_weights(tmp_path / "theirs" / ("weights.pt" if one_file else "")).state
    same(family.to_ours(state, network, "x"), weights)


def test_the_page_has_a_row_of_each_layout():
    table = (Path(__file__).parents[2] / "docs" / "pretrained.md").read_text()
    rows = {
        name: line.split("|")[2:4]
        for line in table.splitlines()
        for name in re.findall(r"`(\w+)`", line.split("|")[1] if line.startswith("|") else "")
    }
    for network, layouts in LAYOUTS.items():
        cells = dict(zip(("authors", "diffusers"), rows[network.__name__], strict=True))
        for to, cell in cells.items():
            assert (to in layouts) == (cell.strip() != "–" and "not written" not in cell), network


def test_a_run_begins_with_a_folder_of_this_library(own, params):
    device = SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), params)
    same(find_initial_weights(str(own), like, denoiser=DIT)()[0], params)


def test_a_run_is_written_with_the_weights_that_are_named(trained_run, tmp_path):
    allowed = ("diffjax", "tests")
    lines = convert(f"{trained_run}:live", "diffjax", tmp_path / "a", allowed_packages=allowed)
    assert "weights live of step 6" in lines[0]
    network, live = read_own(tmp_path / "a", allowed)
    assert (type(network.network).__name__, network.image_shape) == ("Tiny", (8, 8, 1))
    convert(str(trained_run), "diffjax", tmp_path / "b", allowed_packages=allowed)
    averaged = read_own(tmp_path / "b", allowed)[1]
    assert by_path(live).keys() == by_path(averaged).keys()
    assert any(np.any(x != by_path(averaged)[name]) for name, x in by_path(live).items())
    with pytest.raises(UserError, match="Tiny has no layout 'diffusers' here; it has diffjax"):
        convert(str(trained_run), "diffusers", tmp_path / "c", allowed_packages=allowed)
    with pytest.raises(UserError, match="not a part of an experiment in diffjax"):
        read_own(tmp_path / "a")


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_an_autoencoder_of_ldm_becomes_a_folder_of_diffusers(tmp_path, prefix):
    network = AutoencoderKL(channels=(32, 64), num_res_blocks=1)
    weights = drawn(AUTOENCODER_KL, network)
    state = {prefix + name: x for name, x in LDM.to_theirs(weights, network).items()}
    write_safetensors(tmp_path / "ldm.safetensors", state)
    lines = convert(str(tmp_path / "ldm.safetensors"), "diffusers", tmp_path / "vae")
    assert lines[1].startswith("unknown: scaling_factor (0.18215), shift_factor (None), which")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.13}))
    how = {"file_format": "safetensors"}
    assert len(convert(str(tmp_path / "vae"), "authors", tmp_path / "ldm", **how)) == 2
    found, back = AUTOENCODER_KL.read(tmp_path / "vae")
    assert found == network
    same(back, weights)
    written = read_state_dict(tmp_path / "ldm" / "weights.safetensors")
    same(dict(written), {name.removeprefix(prefix): x for name, x in state.items()})
    lines = convert(str(tmp_path / "vae"), "diffusers", tmp_path / "again")
    assert lines[1].startswith("unknown: shift_factor (None), which")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["scaling_factor"] == 0.13


def test_an_encoder_and_a_decoder_become_one_folder_of_diffusers(tmp_path):
    network = TAESD()
    weights = drawn(TAESD_FAMILY, network)
    state = TAESD_FAMILY.to_theirs(weights, network)
    for part in ("encoder", "decoder"):
        names = [name for name in state if name.startswith(part)]
        own_file = {name.removeprefix(f"{part}."): state[name] for name in names}
        (tmp_path / "pair").mkdir(exist_ok=True)
        write_torch(tmp_path / "pair" / f"taesd_{part}.pth", own_file)
    convert(str(tmp_path / "pair"), "diffusers", tmp_path / "theirs")
    found = find_published(tmp_path / "theirs")
    assert (found.network, found.layout) == (network, "diffusers")
    same(found.params(), weights)
    pooled = TAESD(latent_channels=32, pooled=True)
    with pytest.raises(UserError, match="AutoencoderTiny has no blocks that normalise"):
        entries_of(TAESD_OF_DIFFUSERS, pooled)
    (tmp_path / "pair" / "b_encoder.pth").touch()
    (tmp_path / "pair" / "b_decoder.pth").touch()
    with pytest.raises(UserError, match="several pairs of an encoder and a decoder: b_enc"):
        find_published(tmp_path / "pair")


def authors_file(tmp_path):
    network = FAMILY.network((8, 8, 3), 5, hidden_size=16, depth=1, num_heads=2)
    state = FAMILY.to_theirs(drawn(FAMILY, network), network)
    write_safetensors(tmp_path / "w.safetensors", state)
    return tmp_path / "w.safetensors"


def test_a_file_of_dit_or_sit_of_no_published_size(tmp_path):
    """Neither the family nor the number of heads is in the file."""
    source, settings = str(authors_file(tmp_path)), {"num_heads": 2}
    lines = convert(source, "diffusers", tmp_path / "a", family="DiT", settings=settings)
    assert lines[1].endswith("with frequency_endpoint=True instead of False")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["norm_eps"] == 1e-6
    convert(source, "diffjax", tmp_path / "b", family="SiT", settings=settings)
    assert type(read_own(tmp_path / "b")[0].network) is SiT
    with pytest.raises(UserError, match="SiT has no layout 'diffusers' here; it has authors, diff"):
        convert(str(tmp_path / "b"), "diffusers", tmp_path / "c")
    convert(str(tmp_path / "b"), "authors", tmp_path / "d")
    same(dict(read_state_dict(tmp_path / "d" / "weights.pt")), dict(read_state_dict(source)))


def two_times(tmp_path):
    """A DiT with a second noise label, which no layout but ours has."""
    module = DiT(5, hidden_size=16, depth=1, num_heads=2)
    inputs = np.zeros((1, 8, 8, 3)), np.zeros((1, 2)), np.zeros(1, int)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    weights = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    write_own(tmp_path / "own", Denoiser(module, (8, 8, 3)), weights)
    return tmp_path / "own"


def wide_mlp(tmp_path):
    network = FAMILY.network((8, 8, 3), 5, hidden_size=16, depth=1, num_heads=2, mlp_ratio=2.0)
    write_own(tmp_path / "own", network, drawn(FAMILY, network))
    return tmp_path / "own"


def contradicting(tmp_path):
    network = FAMILY.network((8, 8, 3), 5, hidden_size=16, depth=1, num_heads=2)
    write_own(tmp_path / "own", network, drawn(FAMILY, network))
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    config["network"]["depth"] = 2
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    return tmp_path / "own"


def config_of(text):
    def make(tmp_path):
        write_own(tmp_path / "own", DIT, {"w": np.zeros(2, np.float32)})
        (tmp_path / "own" / "config.json").write_text(text)
        return tmp_path / "own"

    return make


def other_tensors(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", dict.fromkeys("abcd", np.zeros(2, np.float32)))
    return tmp_path / "x.safetensors"


def full(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    return other_tensors(tmp_path)


SPEC = '{"network": {"_target_": "%s"}}'


@pytest.mark.parametrize(
    ("make", "arguments", "said"),
    [
        (
            lambda _: "x",
            ["--to=diffuser"],
            "no layout is called 'diffuser'; did you mean",
        ),
        (lambda _: "x", [], "--to is missing"),
        (lambda _: "x", ["--to=authors", "--format=pt"], "no format is called 'pt'; known: safe"),
        (
            lambda path: path / "nowhere",
            ["--to=authors"],
            "can't read weights from .*nowhere: No such",
        ),
        (lambda x: f"{x}:live", ["--to=authors"], "can't read weights from .*:live: No such"),
        (full, ["--to=authors"], "has files already: name a new folder"),
        (other_tensors, ["--to=authors"], r"no network that is known .*; its names: a, b, c, …"),
        (
            other_tensors,
            ["--to=authors", "--family=SIT"],
            "no published network is called 'SIT'",
        ),
        (other_tensors, ["--to=authors", "--part=ema"], "has no part 'ema'"),
        (
            authors_file,
            ["--to=diffusers", "--num_heads=2"],
            "which are the same: pass family='DiT' or",
        ),
        (authors_file, ["--to=diffusers", "--family=DiT"], "no published size .*, add num_heads"),
        (two_times, ["--to=diffusers"], "layout 'diffusers' has no place for .*hidden_1/bias"),
        (
            wide_mlp,
            ["--to=diffusers"],
            r"is of another network: .*proj.weight is \[32, 16\]",
        ),
        (contradicting, ["--to=authors"], "has no parameter block_1/"),
        (config_of("{}"), ["--to=authors"], "config.json lacks network"),
        (config_of("[" * 10**5), ["--to=authors"], "not a saved config"),
        (config_of(SPEC % "os:system"), ["--to=authors"], "names 'os:system', which is not"),
        (
            config_of(SPEC % "diffjax.process.paths:Cosine"),
            ["--to=authors"],
            "is a Cosine, not",
        ),
    ],
)
def test_what_can_not_be_converted_ends_in_one_line(make, arguments, said, tmp_path, capsys):
    source = make(tmp_path)
    arguments = [f"--from={source}", f"--out={tmp_path / 'out'}", *arguments]
    assert cli.run(experiment.main, experiment.FLAGS, usage="", argv=arguments) == 2
    error = capsys.readouterr().err
    assert re.search(said, error), error
    assert error.count("\n") == 1


def test_the_command_prints_what_was_written(own, tmp_path, capsys):
    arguments = [f"--from={own}", "--to=diffusers", f"--out={tmp_path / 'out'}"]
    assert cli.run(experiment.main, experiment.FLAGS, usage="", argv=arguments) == 0
    assert capsys.readouterr().out.endswith(f".safetensors in {tmp_path / 'out'}\n")
    assert "runs/x:ema-0.999" in str(experiment.__doc__)


@pytest.mark.parity
class TestInDiffusers:
    """Folders written here load there by `from_pretrained`, and compute the same."""

    @pytest.fixture
    def diffusers(self):
        return pytest.importorskip("diffusers", reason="pip install -e '.[parity]'")

    @pytest.mark.parametrize("most_shard_bytes", [10**10, 30_000])
    def test_a_dit(self, diffusers, params, tmp_path, most_shard_bytes):
        torch = pytest.importorskip("torch")
        entries = entries_of(DIFFUSERS, DIT)
        state = DIFFUSERS.to_theirs(params, DIT)
        write_folder(tmp_path / "dit", state, entries, most_shard_bytes)
        assert (len(list((tmp_path / "dit").iterdir())) > 4) == (most_shard_bytes < 10**10)
        peer = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "dit")
        assert all(x.dtype == torch.float32 for x in peer.parameters())
        precise = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "dit").double()
        rng = np.random.default_rng(0)
        x, t = rng.normal(size=(2, 8, 8, 3)).astype(np.float32), np.array([3.0, 17.0], np.float32)
        with torch.inference_mode():
            images = torch.tensor(x.transpose(0, 3, 1, 2)).double()
            theirs = precise(images, torch.tensor(t), torch.tensor([2, 5])).sample.numpy()
        ours = DIT.network.apply({"params": params}, x, t, np.array([2, 5]))
        error = np.linalg.norm(np.asarray(ours).transpose(0, 3, 1, 2) - theirs)
        assert error < 1e-5 * np.linalg.norm(theirs)
        # And what diffusers writes is read here.
        peer.save_pretrained(tmp_path / "theirs", max_shard_size=most_shard_bytes)
        network, back = DIFFUSERS.read(tmp_path / "theirs")
        assert network == DIT
        same(back, params)

    def test_an_autoencoder(self, diffusers, tmp_path):
        torch = pytest.importorskip("torch")
        network = AutoencoderKL(**reference.SETTINGS)
        weights = drawn(AUTOENCODER_KL, network)
        entries = entries_of(AUTOENCODER_KL, network)
        write_folder(tmp_path / "vae", AUTOENCODER_KL.to_theirs(weights, network), entries)
        peer = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
        with torch.inference_mode():
            images = torch.tensor(reference.IMAGES.transpose(0, 3, 1, 2))
            theirs = peer.encode(images).latent_dist.mean.numpy()
        ours: Any = network.apply({"params": weights}, reference.IMAGES, method="encode")
        error = np.linalg.norm(np.asarray(ours.mean).transpose(0, 3, 1, 2) - theirs)
        assert error < 1e-5 * np.linalg.norm(theirs)
        peer.save_pretrained(tmp_path / "theirs")
        found, back = AUTOENCODER_KL.read(tmp_path / "theirs")
        assert found == network
        same(back, weights)


@pytest.mark.thorough(tenth=False)
def test_an_autoencoder_of_flux2_is_not_taken_for_one_with_its_names(tmp_path):
    """Whose table has rows for all of its tensors but the statistics of its latents."""
    network = FLUX2.network(channels=(8, 16), num_res_blocks=2, num_groups=4)
    state = FLUX2.to_theirs(drawn(FLUX2, network), network)
    write_safetensors(tmp_path / "ae.safetensors", state)
    lines = convert(str(tmp_path / "ae.safetensors"), "authors", tmp_path / "a")
    assert lines[0].startswith("AutoencoderKLFlux2, ")
