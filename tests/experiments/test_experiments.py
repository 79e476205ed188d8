"""The three commands as a person uses them, on a tiny run of the digits config."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from diffjax import choices, config_files
from diffjax.conditions import of_classes
from diffjax.errors import UserError
from diffjax.evaluation.image_statistics import Batches
from diffjax.loop import loop
from diffjax.process.precond import Meaning
from diffjax.runs import workdirs
from diffjax.runs.measuring import evaluated_samples, measure
from diffjax.spec import build
from diffjax.wiring import check_wired, wire
from experiments import evaluate, sample, train
from experiments.flags import cli
from tests.support.messages import error_line
from tests.support.tiny_run import one_device
from tests.support.witnesses import witnesses

CONFIGS = Path(__file__).parents[2] / "configs"


def run(script, *arguments):
    return cli.run(script.main, script.FLAGS, usage=script.USAGE, argv=arguments)


@pytest.mark.thorough(tenth=False)
def test_training_names_the_page_and_then_says_it_is_finished(
    workdir, config_file, capsys, monkeypatch
):
    assert (workdir / "report.html").is_file()
    monkeypatch.setattr(loop, "page", lambda folder: folder / "report.html")  # not once more
    assert run(train, f"--config={config_file}", f"--workdir={workdir}") == 0
    output = capsys.readouterr()
    assert output.out.rstrip().endswith(f"open {workdir / 'report.html'}")
    assert "recognised as their label" in output.out
    assert "is finished: 4 of 4 steps" in output.err


def test_a_dry_run_says_what_would_run_and_writes_nothing(tmp_path, capsys):
    folder = tmp_path / "run"
    status = run(train, f"--config={CONFIGS}/digits.py:objective=ddpm,model=dit", "--dry_run",
                 "--config.model.depth=1", f"--workdir={folder}")  # fmt: skip
    assert status == 0
    assert not folder.exists()
    output = capsys.readouterr().out
    assert "1,438 images of 8x8x1" in output
    assert "Noise" in output
    assert "parameters" in output
    assert "heun, 9 steps of the grid uniform" in output
    assert "note: a transformer learns to predict noise in many more steps" in output


def test_a_run_without_memory_says_what_to_try(tmp_path, capsys, monkeypatch):
    def without_memory(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(train, "train", without_memory)
    arguments = ["--config=configs/digits.py", f"--workdir={tmp_path}"]
    assert cli.run(train.main, train.FLAGS, usage="", argv=arguments) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    for word in ("batch_size=64", "accumulation_steps=2", "remat=full", "mesh.fsdp=-1"):
        assert word in line


def test_the_printed_config_is_json_with_the_overrides(capsys):
    arguments = [f"--config={CONFIGS}/digits.py:model=unet", "--print_config"]
    assert run(train, *arguments, "--config.optimizer.learning_rate=3e-4") == 0
    config = json.loads(capsys.readouterr().out)
    assert config["optimizer"]["learning_rate"] == 3e-4
    assert config["name"] == "digits-unet"


def test_samples_are_a_picture_and_an_array(loaded_once, tmp_path, capsys):
    out = tmp_path / "grid.png"
    common = [f"--workdir={loaded_once}", "--num_samples=6", "--labels=3,7", "--seed=5"]
    how = ["--solver=ddim", "--num_steps=3", "--guidance_scale=1.5", "--weights=live"]
    assert run(sample, *common, *how, f"--out={out}") == 0
    assert "nfe=6" in capsys.readouterr().out
    with np.load(out.with_suffix(".npz")) as saved:
        assert saved["images"].shape == (6, 8, 8, 1)
        assert saved["labels"].tolist() == [3, 7, 3, 7, 3, 7]
        assert saved["solver"] == "ddim"
        first = saved["images"]
    assert Image.open(out).size[0] > 8
    assert run(sample, *common, *how, f"--out={out}") == 0
    with np.load(out.with_suffix(".npz")) as saved:
        np.testing.assert_array_equal(saved["images"], first)


def test_evaluation_is_a_table_and_a_file(workdir, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "write_report", lambda folder: f"{folder}/report.html")
    monkeypatch.setattr(workdirs, "make_mesh", one_device)
    # Which the training measured (test_likelihood_experiment.py).
    monkeypatch.setattr(
        measure,
        "measure_likelihood",
        lambda *_, **__: {"step": 4, "method": "", "dequantisation": ""},
    )
    status = run(evaluate, f"--workdir={workdir}", "--solvers=heun", "--num_steps=2",
                 "--weights=live,ema-0.99", "--extractor=pixels")  # fmt: skip
    assert status == 0
    output = capsys.readouterr().out
    assert output.splitlines()[0].split()[:3] == ["solver", "grid", "steps"]
    assert output.splitlines()[-1] == f"open {workdir}/report.html"
    found = json.loads((workdir / "evaluation.json").read_text())
    assert found["frechet_distance"]["provenance"]["extractor"] == "pixels:8x8"
    rows = found["by_nfe"]
    # Guidance doubles each; Heun's last step costs one evaluation. The run's own recipe is a row.
    costs = [("heun", 2, 6), ("euler", 2, 4)]
    found = {(row["weights"], row["solver"], row["num_steps"], row["nfe"]) for row in rows}
    assert found == {(weights, *cost) for weights in ("live", "ema-0.99") for cost in costs}
    assert len(rows) == len(found)
    assert len({row["frechet_distance"] for row in rows}) == len(rows)


@pytest.mark.thorough
def test_lists_of_settings_are_crossed_and_each_is_what_it_is_alone(workdir):
    common = [f"--workdir={workdir}", "--solvers=ddim", "--num_steps=2", "--extractor=pixels"]
    lists = ["--weights=live,ema-0.99", "--seed=0,1", "--guidance_scale=1,2"]
    assert run(evaluate, *common, *lists) == 0
    found = json.loads((workdir / "evaluation.json").read_text())
    assert (found["weights"], found["sampling"]["seed"]) == ("live", 0)  # the first of each
    asked = [(row["weights"], row["seed"], row["guidance_scale"]) for row in found["by_nfe"]]
    solvers = [row["solver"] for row in found["by_nfe"]]
    # The run's own recipe too, or no arm could be taken at its best where it is judged.
    crossed = itertools.product(("live", "ema-0.99"), (0, 1), (1.0, 2.0), ("ddim", "euler"))
    assert sorted((*each, of) for each, of in zip(asked, solvers, strict=True)) == sorted(crossed)
    rows = {
        each: row["frechet_distance"]
        for each, row in zip(asked, found["by_nfe"], strict=True)
        if row["solver"] == "ddim"
    }
    # After four steps of training guidance moves the averages by less than a grey level.
    assert len({value for (_, _, scale), value in rows.items() if scale == 2.0}) == 4
    assert rows["live", 0, 1.0] != rows["live", 0, 2.0]
    assert run(evaluate, *common, "--weights=ema-0.99", "--seed=1", "--guidance_scale=2") == 0
    alone = json.loads((workdir / "evaluation.json").read_text())["by_nfe"][0]
    assert alone["frechet_distance"] == rows["ema-0.99", 1, 2.0]


@pytest.mark.thorough(tenth=False)
def test_each_training_seed_is_evaluated_from_noise_of_its_own(trained, loaded):
    """So that differences between arms, over training seeds, are over noise as well."""
    run = loaded
    main, _ = measure.wanted_recipes(run, measure.Wanted(seeds=[1]))
    labels = np.arange(4, dtype=np.int32)
    for training_seed, seed in ((0, 1), (2, 2001)):
        config = run.config.copy_and_resolve_references()
        config.seed = training_seed
        own = replace(run, parts=replace(run.parts, config=config))
        drawn, _ = measure.drawer(
            own, [main], evaluated_samples.WantedSamples(labels, labels, None)
        )(main)
        assert isinstance(drawn, Batches)
        (images,) = drawn.batches
        # In batches of another size, whose products are rounded otherwise.
        again = run.sample(labels, seed=seed)
        np.testing.assert_allclose(images, again, rtol=1e-4, atol=1e-5)
    found = json.loads((trained / "evaluation.json").read_text())
    assert found["sampling"]["noise_seed"] == found["sampling"]["seed"]  # of training seed 0


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (evaluate, ["--seed="], "--seed is empty; leave it out"),
        (evaluate, ["--guidance_scale="], "--guidance_scale is empty; leave it out"),
        (evaluate, ["--weights="], "--weights is empty; leave it out"),
        (evaluate, ["--seed=0,x"], "--seed needs numbers, not '0,x'"),
        (sample, ["--solver=hein"], "did you mean 'heun'"),
        (sample, ["--grid=unform"], "did you mean 'uniform'"),
        (sample, ["--labels=12"], "no label is called '12'"),
        (sample, ["--weights=ema-0.9"], "did you mean 'ema-0.99'"),
        (sample, ["--out=x.jpg"], "should end in .png"),
        (sample, ["--num_samples=0"], "num_samples"),
        (evaluate, ["--num_steps=5,x"], "integers from 1"),
        (evaluate, ["--num_steps=" + "9" * 5000], "integers from 1"),
        (evaluate, ["--solvers=dim", "--num_steps=2"], "did you mean 'ddim'"),
        (evaluate, ["--num_samples=1"], "num_samples"),
        (evaluate, ["--extractor=inception"], "needs weights"),
        (
            evaluate,
            ["--extractor=inception", "--extractor_weights=no.pth"],
            "can't read the weights",
        ),
    ],
)
def test_mistakes_end_in_one_line(loaded_once, script, arguments, message, capsys):
    before = (loaded_once / "evaluation.json").read_bytes()
    assert run(script, f"--workdir={loaded_once}", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error_line(error)
    assert (loaded_once / "evaluation.json").read_bytes() == before


@pytest.mark.parametrize("script", [sample, evaluate])
def test_a_folder_without_a_run(script, tmp_path, capsys):
    assert run(script, f"--workdir={tmp_path}") == 2
    assert "there is no run in" in capsys.readouterr().err
    assert run(script) == 2
    assert "--workdir is missing" in capsys.readouterr().err


@pytest.mark.parametrize("script", [train, sample, evaluate])
def test_help_is_short_and_lists_the_choices(script, capsys):
    assert run(script, "--help") == 0
    text = capsys.readouterr().out
    of_published_networks = 0 if script is train else 14
    assert len(text.splitlines()) < 45 + of_published_networks + len(choices.SOLVERS)
    names = choices.OBJECTIVES if script is train else choices.SOLVERS
    assert all(name in text for name in names)


SHAPES = {
    "digits": ((8, 8, 1), of_classes(10)),
    "digits_reflow": ((8, 8, 1), of_classes(10)),
    "digits_translation": ((8, 8, 1), of_classes(10)),
    "fashion_mnist": ((28, 28, 1), of_classes(10)),
    "colours": ((1, 1, 3), of_classes(0)),
    "mnist": ((28, 28, 1), of_classes(10)),
    "cifar10": ((32, 32, 3), of_classes(10)),
    "cifar10_edm": ((32, 32, 3), of_classes(10)),
    "cifar10_few_steps": ((32, 32, 3), of_classes(0)),
    "image_folder": ((64, 64, 3), of_classes(3)),
    "imagenet64": ((64, 64, 3), of_classes(1000)),
    "imagenet64_edm": ((64, 64, 3), of_classes(1000)),
    "imagenet256": ((32, 32, 4), of_classes(1000)),
    "imagenet256_jit": ((256, 256, 3), of_classes(1000)),
    "imagenet256_pixel_mean_flow": ((256, 256, 3), of_classes(1000)),
    "imagenet512": ((64, 64, 4), of_classes(1000)),
}


# Configs of one objective, each with a small network that it offers.
CASCADE = ("digits_small", "digits_upscale")
MEAN_FLOW = {"digits_mean_flow": "unet", "imagenet256_few_steps": "DiT-S/4"}


def fitting(config, *shapes):
    """The parts of a config, which fit together."""
    wired = wire(config, *shapes)
    check_wired(wired, config.batch_size, config.num_steps)
    return wired


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("digits_reflow", marks=pytest.mark.thorough),
        pytest.param("digits_instaflow", marks=pytest.mark.thorough),
        "digits_translation",
    ],
)
def test_every_config_of_pairs_fits_together(name):
    config = config_files.load(f"{CONFIGS}/{name}.py")
    assert "source" in fitting(config, *SHAPES["digits"]).batch_shapes(2)


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("name", CASCADE)
def test_every_config_of_a_cascade_fits_together(name):
    config = config_files.load(f"{CONFIGS}/{name}.py")
    dataset = build(config.data)
    fitting(config, dataset.image_shape, dataset.condition)
    shape = build(config.evaluation.extractor).image_shape
    assert shape in (None, dataset.picture_shape)


@pytest.mark.thorough
def test_every_config_of_mean_flow_fits_together():
    for name, model in MEAN_FLOW.items():
        config = config_files.load(f"{CONFIGS}/{name}.py:model={model}")
        wired = fitting(config, *SHAPES[name.removesuffix("_mean_flow").removesuffix("_few_steps")])
        assert wired.objective.traits.meaning is Meaning.AVERAGE_VELOCITY, name
        assert wired.recipe.nfe == 1, name


def test_every_config_is_tested_and_is_one():
    # tests/autoencoders, tests/performance, tests/text, tests/tuning, tests/runs, tests/data
    others = {"digits_reflow", "digits_translation", "autoencoder", "published", "captions"}
    others |= {"finetune", "digits_small", "digits_upscale", "emoji", "digits_instaflow"}
    assert {path.stem for path in CONFIGS.glob("*.py")} == {*SHAPES, *others, *MEAN_FLOW}
    for path in CONFIGS.glob("*.py"):
        if path.stem != "finetune":  # which begins with a pipeline
            assert config_files.load(str(path)).num_steps > 0, path


def shallow(config):
    """The same config with one block of its network, or one at each of two sizes: quick."""
    if "depth" in config.model:
        config.model.update(depth=1, class_tokens_from=0)
    else:
        levels = config.model.channel_multipliers[:2]
        config.model.update(num_res_blocks=1, channel_multipliers=levels)
    return config


# No labels, a U-Net of colour images, and latents: in every run of the tests.
DEFAULT = ("colours", "imagenet64", "imagenet256")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in DEFAULT else pytest.mark.thorough) for name in SHAPES],
)
def test_every_config_fits_together(name):
    """As it is but for its depth, shape-checked without data."""
    assert fitting(shallow(config_files.load(f"{CONFIGS}/{name}.py")), *SHAPES[name]).num_params > 0


FEW_STEPS = [
    *(("cifar10_few_steps", each) for each in ("consistency", "ict", "scm", "mean_flow", "soflow")),
    *(
        ("imagenet256_few_steps", each)
        for each in ("imf", "alpha_flow", "soflow", "shortcut", "tvm")
    ),
]


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize(("name", "objective"), FEW_STEPS)
def test_every_published_few_step_training_fits_together(name, objective):
    config = shallow(config_files.load(f"{CONFIGS}/{name}.py:objective={objective}"))
    shapes = {**SHAPES, "imagenet256_few_steps": SHAPES["imagenet256"]}
    assert fitting(config, *shapes[name]).recipe.nfe == 1


def test_configs_of_published_few_step_trainings_refuse_other_objectives():
    for name in ("cifar10_few_steps", "imagenet256_few_steps"):
        with pytest.raises(UserError, match="no published settings of 'imm'"):
            config_files.load(f"{CONFIGS}/{name}.py:objective=imm")


# What differs in kind: small images, one pixel, large images, latents with published sizes.
UNLIKE = [
    ("digits", "unet", "edm2"),
    ("colours", "dit", "iddpm"),
    ("imagenet64", "unet", "iddpm"),
    ("imagenet256", "DiT-S/4", "edm2"),
    ("imagenet256", "LightningDiT-B/2", "sd3"),
    ("imagenet256", "DDT-B/2", "flow"),
    ("imagenet256", "U-ViT-S/2", "ddpm_table"),
]


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize(("name", "model", "objective"), UNLIKE)
def test_configs_fit_together_with_unlike_objectives_and_networks(name, model, objective):
    config = config_files.load(f"{CONFIGS}/{name}.py:model={model},objective={objective}")
    assert fitting(config, *SHAPES[name]).num_params > 0


# One that learns a variance, and those of pairs. The others are cells of the sweep of every
# objective, which test_sweeps.py fits together.
@pytest.mark.parametrize(
    "objective", witnesses(["iddpm", "reflow", "translation", "bridge"], ["iddpm"])
)
def test_objectives_fit_into_the_digits_config(objective):
    config = shallow(config_files.load(f"{CONFIGS}/digits.py:objective={objective}"))
    wired = fitting(config, *SHAPES["digits"])
    if wired.objective.traits.meaning is not Meaning.AVERAGE_VELOCITY:
        assert jax.jit(wired.objective.effective_weight)(np.zeros(1, np.float32)) > 0
