"""`python -m experiments.likelihood` as a person uses it, on a tiny run of the digits config."""

import json
from pathlib import Path

import pytest

from diffjax import config_files
from diffjax.data import digits
from diffjax.errors import UserError
from diffjax.runs.measuring.measure import check_evaluation
from diffjax.runs.setup import set_up
from diffjax.spec import spec
from experiments import evaluate, likelihood
from experiments.flags import cli
from tests.support.messages import error_line
from tests.support.tiny_network import Plain


def run(*arguments):
    return cli.run(likelihood.main, likelihood.FLAGS, usage=likelihood.USAGE, argv=arguments)


def results(workdir):
    return json.loads((Path(workdir) / "likelihood.json").read_text())


def test_an_evaluation_measures_what_its_config_asks_for(trained):
    assert results(trained)["vlb-none"]["num_images"] == 20
    content = json.loads((Path(trained) / "evaluation.json").read_text())
    (name,) = content["extractors"]
    assert name == "pixels:2x2"
    distance = content["extractors"][name]["frechet_distance"]
    assert distance["provenance"]["extractor"] == name
    assert distance["value"] != content["frechet_distance"]["value"]
    assert content["frechet_distance"]["provenance"]["extractor"] == "classifier:digits"
    assert content["extractors"][name]["precision"]["value"] is not None


@pytest.mark.thorough
def test_several_extractors_by_a_flag_keep_their_numbers_apart(workdir, capsys):
    def evaluated(*more):
        return cli.run(
            evaluate.main,
            evaluate.FLAGS,
            usage=evaluate.USAGE,
            argv=(f"--workdir={workdir}", *more),
        )

    assert evaluated("--extractor=pixels,digits", "--num_samples=12", "--num_steps=2") == 0
    content = json.loads((workdir / "evaluation.json").read_text())
    assert content["frechet_distance"]["provenance"]["extractor"] == "pixels:8x8"
    assert list(content["extractors"]) == ["classifier:digits"]
    assert content["accuracy"] is None
    assert content["extractors"]["classifier:digits"]["accuracy"] is not None
    assert evaluated("--extractor=pixels,digits", "--extractor_weights=a,b,c") == 2
    assert "--extractor_weights needs one value, or 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "method", "message"),
    [
        ("objective=flow", "vbl", "did you mean 'vlb'"),
        ("objective=translation", "ode", "no density at its start"),
        ("objective=reflow", "vlb", "no bound is known"),
    ],
)
def test_bits_that_can_not_be_had_are_refused_before_training(arguments, method, message):
    config = config_files.load(f"configs/digits.py:{arguments}")
    config.model = spec(Plain)
    config.evaluation.likelihood = (method,)
    data = digits()
    setup = set_up(config, data.image_shape, data.condition)
    with pytest.raises(UserError, match=message):
        check_evaluation(setup.parts, data)


@pytest.mark.thorough
def test_each_method_prints_a_line_and_adds_to_the_file(workdir, capsys):
    """Of the third, "vlb", the file has what the run's own evaluation measured."""
    few = [f"--workdir={workdir}", "--num_images=10", "--batch_size=8"]
    assert run(*few, "--num_steps=4") == 0
    assert run(*few, "--method=discrete_vlb", "--num_steps=10", "--num_times=4") == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split(":")[0] for line in lines] == ["ode, uniform", "discrete_vlb, none"]
    assert all("10 test images" in line for line in lines)
    written = results(workdir)
    assert set(written) == {"vlb-none", "ode-uniform", "discrete_vlb-none"}
    assert written.pop("vlb-none")["num_images"] == 20
    # An untrained network denoises by its output layer's zeros: a code worse than the raw 8 bits.
    for result in written.values():
        assert result["bits_per_dim"] > 4.0
        assert result["standard_error"] > 0.0
        assert result["estimator_error"] > 0.0
        assert result["num_images"] == 10
    assert written["ode-uniform"]["nfe"] == 16
    assert written["ode-uniform"]["num_steps"] == 4
    assert "coarser_steps_change" in written["ode-uniform"]


@pytest.mark.thorough
def test_the_batch_does_not_matter_and_the_seed_does(workdir, capsys):
    few = [f"--workdir={workdir}", "--method=vlb", "--num_times=4", "--num_images=10"]
    values = []
    for more in (["--batch_size=8"], ["--batch_size=24"], ["--batch_size=8", "--seed=1"]):
        assert run(*few, *more) == 0
        (line,) = capsys.readouterr().out.strip().splitlines()
        assert line.startswith("vlb, none:")
        assert "10 test images" in line
        (found,) = results(workdir).values()
        assert found["num_images"] == 10
        assert min(found["standard_error"], found["estimator_error"]) > 0.0
        values.append(found["bits_per_dim"])
    assert values[0] > 4.0  # worse than the raw 8 bits, since it is hardly trained
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert values[2] != pytest.approx(values[0], rel=1e-5)


@pytest.mark.thorough
def test_a_learned_dequantiser_is_fitted_on_the_way(workdir, capsys):
    assert run(f"--workdir={workdir}", "--method=vlb", "--num_times=4", "--num_images=8",
               "--dequantisation=variational", "--dequantiser_steps=3") == 0  # fmt: skip
    assert "vlb, variational:" in capsys.readouterr().out
    assert results(workdir)["vlb-variational"]["dequantiser_steps"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method=od"], "did you mean 'ode'"),
        (["--trace=exakt"], "did you mean 'exact'"),
        (["--dequantisation=uniforn"], "did you mean 'uniform'"),
        (["--dequantisation=none"], "needs dequantisation uniform or variational"),
        (["--method=vlb", "--trace=exact"], "--trace is not used by --method=vlb"),
        (["--method=vlb", "--num_times=5"], "num_times=5 must be even"),
        (["--num_steps=4", "--tolerance=1e-3"], "give one of them"),
        (["--weights=ema-0.9"], "did you mean 'ema-0.99'"),
    ],
)
def test_mistakes_end_in_one_line(loaded_once, arguments, message, capsys):
    assert run(f"--workdir={loaded_once}", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error_line(error)


def test_help_is_short_and_lists_the_methods(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 50
    assert all(name in text for name in likelihood.METHODS)
