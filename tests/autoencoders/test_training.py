"""Training an autoencoder from a config: stops and goes on, on any mesh, and is used by others."""

import json
from contextlib import closing

import jax
import numpy as np
import pytest

from configs.autoencoder import get_config
from diffjax import lookup
from diffjax.autoencoders.encoding import Stored, encode
from diffjax.autoencoders.loop import set_up, train_autoencoder, train_to_end
from diffjax.codecs.autoencoders import AutoencoderFolder, Deterministic, write_autoencoder
from diffjax.data import digits
from diffjax.data.latents import latents_in
from diffjax.errors import UserError
from diffjax.exchange.convert import convert
from diffjax.host.interrupts import Interrupted
from diffjax.host.run_files import read_metrics
from diffjax.loop.pending_metrics import NonFiniteLoss
from diffjax.models.taesd.network import TAESD
from diffjax.runs.checkpoints import Checkpoints
from diffjax.spec import build, spec
from diffjax.training.sharding import make_mesh
from experiments import train_autoencoder as program
from experiments.flags import cli
from tests.support.later import Later, needs
from tests.support.toy_autoencoder import Factors, Logits, Toy

diffusers, torch = Later("diffusers"), Later("torch")


def toy_config(**changes):
    """Eight steps of the toy on digits, with an adversary from step 3 on."""
    config = get_config("data=digits")
    config.unlock()
    config.autoencoder = spec(Toy, network=spec(Factors), stochastic=True)
    config.adversary.network = spec(Logits)
    config.update(num_steps=8, batch_size=16, log_every_steps=2, checkpoint_every_steps=4)
    config.sample_every_steps = 8
    config.adversary.weight, config.adversary.start_step = 0.5, 3
    config.update(changes)
    return config


def small_config(**changes):
    """Eight steps of a small AutoencoderKL on digits."""
    config = toy_config(**changes)
    config.autoencoder = get_config("data=digits").autoencoder
    config.autoencoder.network.channels, config.autoencoder.network.num_groups = (4, 8), 2
    config.adversary.network = get_config().adversary.network
    config.adversary.network.num_layers, config.adversary.network.width = 1, 4
    return config


def trained(config, folder, stop_at=None, mesh=None):
    """The state at the end, or after a stop and the same command again."""
    setup = set_up(config, digits(), mesh or make_mesh(devices=jax.devices()[:1]))

    def run(should_stop):
        with closing(Checkpoints(folder / "checkpoints")) as checkpoints:
            return train_to_end(setup, folder, checkpoints, should_stop)

    if stop_at is not None:
        calls = iter(range(100))  # once before step 1, and after each
        with pytest.raises(Interrupted, match=f"stopped at step {stop_at} of 8 and saved"):
            run(lambda: next(calls) == stop_at)
    return run(lambda: False)


def lines(folder):
    """The metrics, without the time that they took."""
    found = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in found]


def assert_stops_leave_no_trace(config, folder):
    whole, stopped = folder / "whole", folder / "stopped"
    states = trained(config, whole), trained(config, stopped, stop_at=5)
    assert int(states[0].step) == 8
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert lines(whole) == lines(stopped)
    pictures = [(each / "samples" / "step_00000008.png").read_bytes() for each in (whole, stopped)]
    assert pictures[0] == pictures[1]
    return states[0]


def test_a_stop_leaves_no_trace(tmp_path):
    """Neither in the autoencoder and its averages, nor in the adversary, nor in metrics."""
    state = assert_stops_leave_no_trace(toy_config(), tmp_path)
    assert state.memory.params["factor"]["kernel"] != np.float32(Logits().v)
    assert [line["step"] for line in lines(tmp_path / "whole")] == [2, 4, 6, 8, 8]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    config = toy_config()
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e30, 0
    with pytest.raises(NonFiniteLoss, match=r"not finite .*step .; the last good checkpoint is"):
        trained(config, tmp_path)


@pytest.mark.thorough
def test_a_stop_of_a_real_one_leaves_no_trace(tmp_path):
    assert_stops_leave_no_trace(small_config(), tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_one_and_eight_devices_agree(tmp_path, axes):
    config = small_config()
    # Adam divides gradients by their size: of biases of keys, on which attention does not depend,
    # it would make steps of rounding errors.
    config.optimizer.rule.eps = config.adversary_optimizer.rule.eps = 1.0
    one = trained(config, tmp_path / "one")
    eight = trained(config, tmp_path / "eight", mesh=make_mesh(**axes))

    def close(found, expected):
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-4, atol=1e-6)

    jax.tree.map(close, eight.params, one.params)
    jax.tree.map(close, eight.memory.params, one.memory.params)


@pytest.fixture(scope="module")
def run_of_one(tmp_path_factory):
    """The folder of a whole run of a small AutoencoderKL."""
    folder = tmp_path_factory.mktemp("runs") / "ae"
    train_autoencoder(small_config(), folder, "the command")
    return folder


@pytest.mark.thorough
def test_a_run_measures_itself_and_is_finished_once(run_of_one):
    result = json.loads((run_of_one / "autoencoder.json").read_text())
    assert result["num_images"] == 359
    assert result["latent_shape"] == [4, 4, 2]
    codec = AutoencoderFolder(str(run_of_one))
    images = digits().train.gather(np.arange(1438))["image"] / np.float32(127.5) - 1
    posterior = jax.jit(codec.posterior)(codec.params, images)
    # Samples of the scaled posteriors have mean 0 and variance 1.
    second = np.square(posterior.mean) + np.exp(posterior.log_variance)
    np.testing.assert_allclose(np.mean(posterior.mean), 0, atol=1e-4)
    np.testing.assert_allclose(np.mean(second), 1, rtol=1e-4)
    page = (run_of_one / "report.html").read_text()
    assert "the command" in page
    assert f"{result['psnr']:.2f} dB" in page
    before = (run_of_one / "autoencoder.json").stat().st_mtime_ns
    train_autoencoder(small_config(), run_of_one, "the command")
    assert (run_of_one / "autoencoder.json").stat().st_mtime_ns == before
    with pytest.raises(
        UserError, match=r"another config .*loss\.kl_weight: 0\.001 there, 0.1 here"
    ):
        train_autoencoder(small_config(loss={"kl_weight": 0.1}), run_of_one)


@pytest.mark.thorough
def test_latents_of_a_run_are_trained_on_and_others_are_refused(run_of_one, tmp_path):
    codec = lookup.codec_called(f"autoencoder:path={run_of_one}")
    encode(digits(), codec, tmp_path / "latents", Stored("moments"))
    data = build(latents_in(str(tmp_path / "latents")))
    assert data.image_shape == (4, 4, 2)
    assert data.picture_shape == (8, 8, 1)
    config = json.loads((run_of_one / "vae" / "config.json").read_text())
    (tmp_path / "other" / "vae").mkdir(parents=True)
    for file in (run_of_one / "vae").iterdir():
        (tmp_path / "other" / "vae" / file.name).write_bytes(file.read_bytes())
    changed = json.dumps(config | {"scaling_factor": 2.0})
    (tmp_path / "other" / "vae" / "config.json").write_text(changed)
    other = AutoencoderFolder(str(tmp_path / "other"))
    assert other.sha256 != codec.sha256
    with pytest.raises(UserError, match="has another autoencoder than this config was written for"):
        _ = AutoencoderFolder(str(tmp_path / "other"), codec.sha256).params


@pytest.mark.parity
@needs("diffusers")
def test_a_converted_run_is_read_by_diffusers(run_of_one, tmp_path):
    """Its folder, and what `experiments.convert` writes, of a rectangular image."""
    convert(str(run_of_one), "diffusers", tmp_path / "out")
    codec = AutoencoderFolder(str(run_of_one))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 12, 8, 1)).astype(np.float32)
    found = jax.jit(codec.posterior)(codec.params, images)
    decoded = jax.jit(codec.decode)(codec.params, found.mean)
    for folder in (tmp_path / "out", run_of_one / "vae"):
        theirs = diffusers.AutoencoderKL.from_pretrained(folder).eval()
        scale, shift = theirs.config.scaling_factor, theirs.config.shift_factor
        with torch.no_grad():
            posterior = theirs.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent_dist
            latents = scale * (posterior.mean - shift)
            seen = theirs.decode(latents / scale + shift).sample.clip(-1, 1)
        for ours, one in ((found.mean, latents), (decoded, seen)):
            one = one.numpy().transpose(0, 2, 3, 1)
            assert one.std() > 1e-3
            assert np.linalg.norm(ours - one) < 1e-5 * np.linalg.norm(one)


@pytest.mark.parity
@needs("diffusers")
def test_a_deterministic_one_is_read_by_diffusers(tmp_path):
    autoencoder = Deterministic(TAESD())
    images = np.random.default_rng(0).uniform(-1, 1, (1, 16, 24, 3)).astype(np.float32)
    params = jax.jit(TAESD().init)(jax.random.key(0), images)["params"]
    write_autoencoder(tmp_path, autoencoder, params, 2.0, 0.25)
    codec = AutoencoderFolder(str(tmp_path))
    assert not codec.stochastic
    latents = jax.jit(codec.encode)(codec.params, images)
    theirs = diffusers.AutoencoderTiny.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = theirs.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latents
        decoded = theirs.decode(expected).sample.clip(-1, 1).numpy()
    assert (theirs.config.scaling_factor, theirs.config.shift_factor) == (2.0, 0.25)
    expected = 2 * (expected.numpy() - 0.25)
    pairs = ((latents, expected), (jax.jit(codec.decode)(codec.params, latents), decoded))
    for ours, one in pairs:
        one = one.transpose(0, 2, 3, 1)
        assert np.linalg.norm(ours - one) < 1e-5 * np.linalg.norm(one)


def last_line(*flags):
    """The status and the error of a command line."""
    return cli.run(program.main, program.FLAGS, usage="", argv=["--dry_run", *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=configs/autoencoder.py"], "no folder data/images: set data.path to a folder"),
        (
            ["--config=configs/autoencoder.py:data=digits,model=kl-f8"],
            "this autoencoder takes images of 3 channel(s) whose sides are multiples of 8, not 8x8",
        ),
        (["--config=configs/autoencoder.py:data=digit"], "no data is called 'digit'; did you mean"),
        (
            ["--config=configs/autoencoder.py:model=kl-f9"],
            "no model is called 'kl-f9'; did you mean",
        ),
        (
            ["--config.autoencoder.network.num_groups=3"],
            "num_groups=3 does not divide the 32 channels of a level of the autoencoder",
        ),
        (["--config.loss.perceptual.path=vgg.pth"], "needs images of 16x16 pixels, not 8x8"),
        (["--config.loss.perceptual.heads=vgg.pth"], "are the weights of channels alone: set path"),
        (["--config.loss.error=l3"], "config.loss.error='l3': known: l1, l2"),
        (["--config.loss.kl_weigth=1"], "unknown flag --config.loss.kl_weigth; did you mean"),
        (["--config.loss.kl_weight=-1"], "config.loss.kl_weight=-1.0 must be at least 0"),
        (["--config.adversary.weight=1"], "needs images of 24x24 pixels, not 8x8: num_layers=1"),
        (["--config.weights=ema-0.99"], "config.weights='ema-0.99' are not kept; did you mean"),
        (["--config=configs/digits.py"], "there is no config.autoencoder, so this is no config"),
    ],
)
def test_mistakes_are_one_line(capsys, flags, message):
    if not flags[0].startswith("--config="):
        flags = ["--config=configs/autoencoder.py:data=digits", *flags]
    assert last_line(*flags) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_a_dry_run_says_what_is_off(capsys):
    assert last_line("--config=configs/autoencoder.py:data=digits") == 0
    printed = capsys.readouterr().out
    assert "images of 8x8x1, latents of 4x4x2" in printed
    assert "no perceptual distance: set --config.loss.perceptual.path" in printed
    assert "no adversary: set --config.adversary.weight=0.5" in printed


def test_a_folder_without_images_is_one_line(tmp_path, capsys):
    config = "--config=configs/autoencoder.py"
    assert last_line(config, f"--config.data.path={tmp_path}") == 2
    assert "no images" in capsys.readouterr().err
