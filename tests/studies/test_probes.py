"""What is probed of a model: against other code, and what is left out with a reason."""

import json
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import config_files
from diffjax.conditions import of_classes
from diffjax.data import all_images, digits
from diffjax.errors import UserError
from diffjax.objectives.base import Progress
from diffjax.runs.measuring.probe import probe_run
from diffjax.spec import spec
from diffjax.studies import probes
from diffjax.studies.effective_weights import weight_curve
from diffjax.wiring import wire
from experiments import probe
from experiments.flags import cli
from tests.support.tiny_network import Plain

CONFIG = Path(__file__).parents[2] / "configs" / "digits.py"
IMAGES, LABELS = all_images(digits().test, 48)


def model_of(objective):
    """A network that was never trained, with an objective."""
    config = config_files.load(f"{CONFIG}:objective={objective}")
    if objective == "dispersive":  # which asks a network for its hidden tokens
        config.model.update(hidden_size=16, depth=1, num_heads=2)
    else:
        config.model = spec(Plain)
    wired = wire(config.lock(), (8, 8, 1), of_classes(10))
    params = jax.jit(wired.init)(jax.random.key(0))
    return probes.Probed(
        wired.objective, wired.apply, wired.predict(params), params, params,
        Progress(jnp.int32(0), wired.objective.init_memory()), wired.condition, 0.1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def flow():
    return model_of("flow")


@pytest.fixture(scope="module")
def found(flow):
    return probes.probe(flow, IMAGES, LABELS, num_batches=8, batch_size=8)


def test_it_is_plain_data(found):
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_loss_is_measured_in_all_three_currencies(found):
    loss = found["loss_by_log_snr"]
    assert set(loss["spaces"]) == {"noise", "clean", "v"}
    assert loss["num_images"] == 48
    for low, noise, clean in zip(
        loss["log_snr_edges"],
        *(loss["spaces"][name]["by_log_snr"] for name in ("noise", "clean")),
        strict=False,
    ):
        if noise is not None:  # SNR times as much
            assert np.exp(low) < noise["mean"] / clean["mean"] < np.exp(low + 1)


def test_the_effective_weight_is_that_of_the_objective(found, flow):
    curve = weight_curve(flow.objective)
    saved = found["effective_weight"]
    inside = np.interp(saved["log_snr"], curve.log_snr, curve.weight)
    np.testing.assert_allclose(saved["weight"], inside, rtol=1e-6)
    assert saved["quartiles"][1] == pytest.approx(curve.quantile(0.5))


def test_the_gradient_noise_is_that_of_single_examples(found, flow):
    """Against per-example gradients, one by one, of other examples of the same log-SNRs."""
    loss_of = probes._loss_of(flow, IMAGES, LABELS)
    keys = jax.random.split(jax.random.key(3), 400)
    gradient = jax.jit(jax.vmap(jax.grad(loss_of, has_aux=True), in_axes=(None, 0)))
    gradients, levels = jax.tree.map(np.asarray, gradient(flow.params, keys))
    inside = np.flatnonzero((levels >= 0) & (levels < 2))
    rows = [leaf[inside].reshape(len(inside), -1) for leaf in jax.tree.leaves(gradients)]
    trace = float(np.sum(np.var(np.concatenate(rows, axis=1), axis=0, ddof=1)))
    saved = found["gradient_noise"]
    index = saved["log_snr_edges"].index(0.0)
    assert saved["bins"][index]["trace"] == pytest.approx(trace, rel=0.4)
    assert saved["share"][index] == pytest.approx(len(inside) / 400, abs=0.08)
    assert saved["bins"][index]["examples"] == 64


@pytest.mark.parametrize(
    ("objective", "sections", "reason"),
    [
        ("otcfm", ("loss_by_log_snr", "gradient_noise"), "paired with their noise"),
        ("contrastive", ("gradient_noise",), "couples the examples"),
        pytest.param(
            "dispersive", ("gradient_noise",), "couples the examples", marks=pytest.mark.thorough
        ),
    ],
)
def test_what_an_objective_can_not_have_is_left_out_with_a_reason(
    objective, sections, reason, monkeypatch
):
    # What is measured besides is another test's.
    monkeypatch.setattr(probes, "_loss", lambda *arguments: {})
    content = probes.probe(model_of(objective), IMAGES, LABELS)
    for section in sections:
        assert reason in content[section]["left_out"]
    assert "left_out" not in content["effective_weight"]


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    argv = [f"--workdir={tmp_path}"]
    assert cli.run(probe.main, probe.FLAGS, usage=probe.USAGE, argv=argv) == 2
    assert "there is no run in" in capsys.readouterr().err


def test_probing_is_announced_to_all_who_call_it(tmp_path, monkeypatch):
    """A sweep probes after each training, and Python probes without the command."""
    announced: list[str] = []
    show = lambda what: nullcontext(announced.append(what))  # noqa: E731
    monkeypatch.setattr("diffjax.runs.measuring.probe.progress", show)
    with pytest.raises(UserError, match="there is no run in"):
        probe_run(tmp_path)
    assert announced == [f"probing {tmp_path}"]


@pytest.mark.thorough
def test_the_command_on_a_trained_run(copy_of_run, tmp_path, capsys):
    folder = copy_of_run
    arguments = [f"--workdir={folder}", "--num_images=32", "--allowed_packages=tests"]
    assert cli.run(probe.main, probe.FLAGS, usage=probe.USAGE, argv=arguments) == 0
    assert capsys.readouterr().out.endswith(f"{folder / 'probes.json'}\n")
    content = json.loads((folder / "probes.json").read_text())
    facts = {key: content[key] for key in ("num_images", "seed", "split", "step", "weights")}
    assert facts == {
        "num_images": 32, "seed": 0, "split": "test", "step": 6, "weights": "ema-0.99",
    }  # fmt: skip
    assert content["test_sha256"] == digits().test.fingerprint()
    assert "left_out" not in content["gradient_noise"]
    # The same again, byte for byte, in another folder.
    before = (folder / "probes.json").read_bytes()
    allowed = ("diffjax", "tests")
    again = probe.probe_run(folder, num_images=32, out=tmp_path / "o", allowed_packages=allowed)
    assert again == tmp_path / "o" / "probes.json"
    assert again.read_bytes() == before
