"""What is probed of a trained run: real tiny runs, and the numbers against other code."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import diffjax
from diffjax.data import all_images, digits
from diffjax.evaluation import probes
from diffjax.evaluation.effective_weights import weight_curve
from experiments import cli, config_files, probe

CONFIG = Path(__file__).parents[1] / "configs" / "digits.py"


def tiny(folder, *arguments):
    config = config_files.load(f"{CONFIG}:objective={','.join(arguments)}")
    config.num_steps = 2
    config.batch_size = 16
    config.model.update(hidden_size=16, depth=1, num_heads=2)
    config.sampling.num_steps = 2
    config.evaluation.update(num_samples=20, batch_size=24, solvers=("ddim",), num_steps=(2,))
    diffjax.train(config.lock(), folder)
    return folder


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    folder = tiny(tmp_path_factory.mktemp("probes") / "flow", "flow")
    arguments = [f"--workdir={folder}", "--num_images=64"]
    assert cli.run(probe.main, probe.FLAGS, usage=probe.USAGE, argv=arguments) == 0
    return folder


@pytest.fixture(scope="module")
def found(flow):
    return json.loads((flow / "probes.json").read_text())


def test_the_file_says_what_it_was_measured_on(found):
    assert found["num_images"] == 64
    assert found["seed"] == 0
    assert found["split"] == "test"
    assert found["test_sha256"] == digits().test.fingerprint()
    assert found["step"] == 2
    assert found["weights"] == "ema-0.999"


def test_the_loss_is_measured_in_all_three_currencies(found):
    loss = found["loss_by_log_snr"]
    assert set(loss["spaces"]) == {"noise", "clean", "v"}
    assert loss["num_images"] == 64
    middle = loss["log_snr_edges"].index(0.0)
    noise, clean = (
        loss["spaces"][name]["by_log_snr"][middle]["mean"] for name in ("noise", "clean")
    )
    assert 1.0 < noise / clean < np.e  # SNR times as much, at log-SNRs from 0 to 1


def test_the_effective_weight_is_that_of_the_objective(found, flow):
    curve = weight_curve(diffjax.load(flow).setup.wired.objective)
    saved = found["effective_weight"]
    inside = np.interp(saved["log_snr"], curve.log_snr, curve.weight)
    np.testing.assert_allclose(saved["weight"], inside, rtol=1e-6)
    assert saved["quartiles"][1] == pytest.approx(curve.quantile(0.5))


def test_the_gradient_noise_is_that_of_single_examples(flow, found):
    """Against per-example gradients of the same examples, one at a time."""
    run = diffjax.load(flow)
    images, labels = all_images(digits().test, 64)
    model = probe._probed(run)
    loss_of = probes._loss_of(model, images, labels)
    keys = jax.random.split(jax.random.key(3), 400)
    gradient = jax.jit(jax.vmap(jax.grad(lambda p, k: loss_of(p, k)[0]), in_axes=(None, 0)))
    rows = jax.tree.leaves(gradient(run.state.params, keys))
    rows = np.concatenate([np.reshape(leaf, (len(keys), -1)) for leaf in rows], axis=1)
    levels = np.asarray(jax.vmap(lambda k: loss_of(run.state.params, k)[1])(keys))
    saved = found["gradient_noise"]
    assert saved["weights"] == "live"
    for low, one in zip(saved["log_snr_edges"], saved["bins"], strict=False):
        inside = rows[(levels >= low) & (levels < low + 2)]
        if one is not None and len(inside) > 80:
            trace = float(np.sum(np.var(inside, axis=0, ddof=1)))
            assert one["trace"] == pytest.approx(trace, rel=0.35)
            break
    else:
        pytest.fail("no bin could be compared")


def test_the_same_seed_gives_the_same_file(flow, found):
    again = probe.probe_run(flow, num_images=64)
    assert json.loads(again.read_text()) == found


@pytest.mark.parametrize(
    ("name", "without", "reason"),
    [
        ("otcfm", ("loss_by_log_snr", "gradient_noise"), "paired with their noise"),
        ("contrastive", ("gradient_noise",), "joins the examples"),
    ],
)
def test_what_an_objective_can_not_have_is_left_out_with_a_reason(tmp_path, name, without, reason):
    path = probe.probe_run(tiny(tmp_path / name, name), num_images=32)
    content = json.loads(path.read_text())
    for section in ("loss_by_log_snr", "effective_weight", "gradient_noise"):
        if section in without:
            assert reason in content[section]["left_out"]
        else:
            assert "left_out" not in content[section]


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    argv = [f"--workdir={tmp_path}"]
    assert cli.run(probe.main, probe.FLAGS, usage=probe.USAGE, argv=argv) == 2
    assert "there is no run in" in capsys.readouterr().err
