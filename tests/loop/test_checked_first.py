"""What the end of a run needs is checked before its first step, and before anything is written."""

import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from configs import digits
from diffjax.choices import copy
from diffjax.data import digits as all_digits
from diffjax.data.image_folders.buckets import BucketedSource
from diffjax.data.sources import ArraySource, DataSet
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.host.run_files import read_json
from diffjax.loop import loop
from diffjax.process import paths
from diffjax.runs.checks import check_buckets
from diffjax.runs.setup import set_up
from diffjax.spec import spec
from experiments import train
from experiments.flags import cli
from tests.support.tiny_network import Tiny
from tests.support.tiny_run import MODELS, tiny_config


def few_digits(num_train: int = 64, num_test: int = 1) -> DataSet:
    data = all_digits()
    parts = {
        name: ArraySource(images=batch["image"], labels=batch["label"])
        for name, source, n in (("train", data.train, num_train), ("test", data.test, num_test))
        for batch in [source.gather(range(n))]
    }
    return replace(data, **parts)


def small(arguments: str = "", **changes):
    config = digits.get_config(arguments)
    config.model = spec(Tiny)
    config.num_steps, config.batch_size, config.optimizer.warmup_steps = 2, 16, 0
    config.sampling.update(num_steps=2, guidance_scale=1.0)
    config.evaluation.update(num_samples=8, batch_size=8, solvers=("ddim",), num_steps=(2,))
    for name, value in changes.items():
        *groups, key = name.split("/")
        inner = config
        for group in groups:
            inner = inner[group]
        with inner.ignore_type():
            inner[key] = value
    return config


REFUSED = [
    (
        {"evaluation/solvers": ("flow_map",)},
        "flow_map on uniform: this solver needs a model of the average",
    ),
    (
        {"evaluation/solvers": ("ddpm_learned",)},
        "ddpm_learned on uniform: this solver takes the va",
    ),
    ({"evaluation/guidance_scales": (2.0,), "condition_dropout": 0.0}, "=2 needs a null condition"),
    ({"evaluation/guidance_scales": (math.nan,)}, r"guidance_scales\[0\]=nan must be finite"),
    ({"evaluation/guidance_scales": (1, "abc")}, r"guidance_scales\[1\]='abc' must be a number"),
    ({"evaluation/batch_size": 0}, "config.evaluation.batch_size=0 must be at least 1"),
    ({"evaluation/batch_size": -5}, "config.evaluation.batch_size=-5 must be at least 1"),
    ({"evaluation/weights": (3,)}, r"config.evaluation.weights\[0\]=3 must be text"),
    (
        {"evaluation/extractors": ("../..",)},
        r"extractors\[0\]='../..' must be an Extractor, or the spec of one",
    ),
    ({"evaluation/extractor": spec(pixel_features, size=64)}, "size=64.* can't take 8x8 images"),
    (
        {"wrappers": (1e9,)},
        r"config.wrappers\[0\]=1000000000.0 must be an Objective, or the spec of one",
    ),
    ({"sampling/guidance_scale": math.nan}, "config.sampling.guidance_scale=nan must be finite"),
    (
        {"optimizer/rule/b2": 2},
        "config.optimizer.rule.b2=2.0 must be at least 0 and below 1, like 0.999",
    ),
    ({"objective/weight": spec(paths.Linear)}, r"objective.weight=Linear\(.* must map \(Coeffs"),
    ({"path/t_min": 2.0}, "t_min must be below t_noise"),
    ({"data": spec(few_digits, num_train=2)}, "2 images that samples could be compared with"),
    ({"data": spec(paths.Linear)}, r"config.data=Linear\(.* must be a DataSet"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_what_could_not_end_does_not_begin(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        loop.train(small(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("evaluation.weights=3", "config.evaluation.weights[0]=3 must be text"),
        ("evaluation.extractors=../..", "config.evaluation.extractors[0]='../..' must be an Extr"),
        ("wrappers=1e9", "config.wrappers[0]=1000000000.0 must be an Objective"),
        ("optimizer.rule.eps=-1", "config.optimizer.rule.eps=-1.0 must be above 0, like 1e-08"),
        ("condition_dropout=nan", "config.condition_dropout=nan must be at least 0 and at most 1"),
        ("path.t_noise=1.5", "config.path.t_noise=1.5 must be above 0 and at most 1, like 1.0"),
        ("evaluation.guidance_scales=(1,'abc')", "guidance_scales[1]='abc' must be a number"),
    ],
)
def test_flags_are_refused_in_one_line(flag, said, capsys):
    argv = ["--config=configs/digits.py", "--dry_run", f"--config.{flag}"]
    assert cli.run(train.main, train.FLAGS, usage="", argv=argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


@pytest.mark.thorough
@pytest.mark.parametrize("num_test", [0, 1])
def test_a_run_with_hardly_a_test_image_has_its_page(tmp_path, num_test):
    config = small(data=spec(few_digits, num_test=num_test))
    page = loop.train(config, tmp_path / "run")
    assert page.is_file()
    found = read_json(tmp_path / "run" / "evaluation.json") or {}
    assert found["frechet_distance"]["value"] > 0
    assert found["frechet_distance"]["floor"] is None
    assert "floor –" in train.headline(tmp_path / "run")


def in_buckets() -> DataSet:
    """Black pictures of 8×8 and of 4×16."""
    shapes = ((8, 8, 1), (4, 16, 1))
    sources = tuple(
        ArraySource(np.zeros((2, *shape), np.uint8), np.zeros(2, np.int32)) for shape in shapes
    )
    data = BucketedSource(sources, shapes)
    return DataSet("black", data, sources[0], shapes[0], 10, tuple("0123456789"), real=sources[0])


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (
            "unet",
            {"attention_resolutions": (8,), "channel_multipliers": (1,)},
            "UNet has other parameters for images of 4x16, ",
        ),
        ("dit", {"patch_size": 8}, "images of 4x16, a bucket of black: .*; or set data.buckets=0"),
        pytest.param("dit", {"patch_size": 4}, "", marks=pytest.mark.thorough),
        ("tiny", {}, ""),
    ],
)  # fmt: skip
def test_a_network_of_one_shape_is_refused_for_buckets(model, changes, message):
    config = tiny_config()
    config.model = copy(MODELS[model])
    config.model.update(changes)
    data = in_buckets()
    parts = set_up(config, data.image_shape, data.condition).parts
    with pytest.raises(UserError, match=message) if message else nullcontext():
        check_buckets(parts, data)
