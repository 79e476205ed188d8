"""Junk on command lines, in Python calls and in files: one clear line or a result, no traceback.

Every run of the tests tries a few dozen, always the same; `pytest tests/experiments/test_fuzz.py
--trials=10000` tries that many, other ones each time. `tests.tools.junk` draws what a hand can
type from a seed: `--trials=2000 --base_seed=7` tries as many, and each failure says how to see it.
"""

import contextlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffjax import choices, config_files
from diffjax.data import digits, image_folder
from diffjax.data.archives import read_npz
from diffjax.data.pairs import pairs
from diffjax.errors import UserError
from diffjax.evaluation.extractors import classifier
from diffjax.host.run_files import read_json, read_metrics
from diffjax.loop.rollback import Rollbacks
from diffjax.reports.run_page import write_report
from diffjax.runs import workdirs
from diffjax.spec import build, from_json, to_json
from experiments import (
    average,
    export,
    objectives,
    plan,
    report,
    sample,
    solvers,
    sweep,
    train,
    validate,
)
from experiments.flags import cli
from tests.pretrained.test_torch_files import STORAGE, tensor, torch_zip
from tests.support.old_runs import OLD_RUN
from tests.support.one_process import Here
from tests.support.weights import read_bytes
from tests.tools import junk

DIGITS = "configs/digits.py"
FEW = {
    "num_samples": 4, "num_images": 4, "num_pairs": 4, "num_steps": 2, "batch_size": 4,
    "num_candidates": 3,
}  # fmt: skip


@pytest.fixture
def fuzz(request):
    """`fuzz(strategy, check, short)`: short examples, or as many as `--trials`."""
    trials = request.config.getoption("--trials")

    def run(strategy: st.SearchStrategy, check: Callable[[Any], None], short: int = 30) -> None:
        asked = settings(
            max_examples=max(short, trials),
            derandomize=trials <= short,
            database=None,
            deadline=None,
            suppress_health_check=[
                HealthCheck.data_too_large,
                HealthCheck.filter_too_much,
                HealthCheck.function_scoped_fixture,
                HealthCheck.too_slow,
            ],
        )
        asked(given(strategy)(check))()

    return run


# What people type, and what they do not.

WORDS = st.sampled_from(
    ["", "0", "-1", "1e400", "nan", "None", "True", "()", "(1,", "[]", "{}", "junk", "é", "a b",
     "..", "1" * 30, "--", "=", ",", ":", "'", "(1, 'a')", "__import__('os')",
     "ddpm", "heun", "0.5", "2"]
)  # fmt: skip
TEXTS = WORDS | st.text(max_size=8)


def told(program: Any, argv: list[str], *statuses: int) -> None:
    """Runs a program: it ends well, or with status 2 and one line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.run(program.main, program.FLAGS, usage="", argv=argv)
    assert status in (0, 2, *statuses)
    if status == 2:
        assert err.getvalue().count("\n") >= 1
        errors = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, err.getvalue()
        assert "Traceback" not in err.getvalue()


def settings_of(path: str) -> list[str]:
    return [name for name in config_files.settings(config_files.load(path)) if "[" not in name]


def axes() -> st.SearchStrategy[str]:
    own = {"objective": choices.OBJECTIVES, "model": ("dit", "unet", "net")}
    tables = {**choices.AXES, **choices.TRAINING_AXES, **own}
    pairs_of = st.sampled_from(sorted(tables)).flatmap(
        lambda axis: st.tuples(st.just(axis) | TEXTS, st.sampled_from(sorted(tables[axis])) | TEXTS)
    )
    joined = st.lists(pairs_of.map("=".join) | TEXTS, max_size=3).map(",".join)
    return joined.map(lambda text: f":{text}" if text else "")


def known_flags(names: list[str]) -> st.SearchStrategy[str]:
    return st.tuples(st.sampled_from(names), TEXTS).map(lambda pair: f"--{pair[0]}={pair[1]}")


def flags_for(names: list[str]) -> st.SearchStrategy[list[str]]:
    """Some flags with values, most of which mean nothing."""
    known = known_flags(names)
    typo = st.tuples(st.sampled_from(names), TEXTS).map(lambda pair: f"--{pair[0]}x={pair[1]}")
    # absl reads further flags from a file that --flagfile names, which no script offers.
    return st.lists(known | typo | TEXTS.filter(lambda text: "flagfile" not in text), max_size=3)


def test_command_lines_of_train(fuzz):
    names = [*settings_of(DIGITS), *(name for name in train.FLAGS if name != "config")]
    names = [name for name in names if name not in ("dry_run", "distributed", "coordinator")]
    files = st.sampled_from([DIGITS] * 8 + ["configs/none.py", "README.md", "configs", ""])
    lines = st.tuples(files, axes(), flags_for(names))

    def check(line):
        file, axis, flags = line
        told(train, [f"--config={file}{axis}", "--print_config", *flags])

    fuzz(lines, check, short=3)


@pytest.mark.thorough
def test_configs_are_refused_or_built(fuzz):
    """One setting that has the right type and any value: refused, or a whole dry run."""
    config = config_files.load(DIGITS)
    numbers = [
        name
        for name, setting in config_files.settings(config).items()
        if setting.kind in (int, float) and "[" not in name
    ]
    values = st.sampled_from(["0", "-1", "1", "3", "7"]) | st.floats().map(repr)
    small = ["--config.model.hidden_size=8", "--config.model.depth=1", "--config.model.num_heads=1"]

    def check(setting):
        name, value = setting
        told(train, [f"--config={DIGITS}", "--dry_run", *small, f"--{name}={value}"])

    fuzz(st.tuples(st.sampled_from(numbers), values), check, short=20)


ON_A_RUN = [average, *(program.module for program in junk.ON_A_RUN)]


def name_of(program: Any) -> str:
    return program.__name__.rpartition(".")[2]


def of_the_folder(program: Any, folder: Path) -> tuple[str, list[str]]:
    """The flag that names the run, and the names of all others."""
    flag = "workdirs" if program is validate else "workdir"
    return f"--{flag}={folder}", [n for n in program.FLAGS if n not in (flag, *junk.WAITED_FOR)]


@pytest.mark.parametrize("program", ON_A_RUN, ids=name_of)
def test_command_lines_of_programs_without_a_run(fuzz, program, tmp_path, monkeypatch):
    """In a folder without a run: the mistake is still reported in one line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    workdir, names = of_the_folder(program, tmp_path / "run")
    fuzz(flags_for(names), lambda flags: told(program, [workdir, *flags]), short=10)


# What differs in kind: one that draws, one that writes a program, one that only reads files, one
# that takes several folders.
@pytest.mark.thorough
@pytest.mark.parametrize("program", [sample, export, report, validate], ids=name_of)
def test_junk_flags_on_a_run(fuzz, program, tmp_path, monkeypatch):
    """In the folder of a trained run: an error in one line, or the result."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD_RUN, tmp_path / "run")
    workdir, names = of_the_folder(program, tmp_path / "run")
    few = [f"--{name}={number}" for name, number in FEW.items() if name in program.FLAGS]

    def check(flags):
        told(program, [workdir, *few, *flags])

    fuzz(st.lists(known_flags(names), max_size=2), check, short=4)


@pytest.mark.parametrize("program", [plan, objectives, solvers], ids=name_of)
def test_command_lines_of_programs_without_a_folder(fuzz, program, tmp_path, monkeypatch):
    given = [f"--config={Path(DIGITS).resolve()}", "--topology=v5e:2x2", "--analytic"]
    given += ["--config.model.depth=1"]
    config = given if program is plan else []
    names = [name for name in program.FLAGS if name not in ("config", "search", "largest_batch")]
    monkeypatch.chdir(tmp_path)
    fuzz(flags_for(names), lambda flags: told(program, [*config, *flags]), short=2)


def test_sweep_files(fuzz, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Here)
    values = st.lists(TEXTS | st.integers(-1, 2) | st.none(), max_size=2)
    names = st.sampled_from(["objective", "path", "config.seed", "config.num_steps"]) | TEXTS
    sweeps = st.tuples(
        st.sampled_from([DIGITS, "configs/none.py"]), st.dictionaries(names, values, max_size=2)
    )

    def check(content):
        config, named = content
        file = tmp_path / "sweep.py"
        file.write_text(
            "from diffjax.sweeps.sweep import Sweep\n"
            "def get_sweep():\n"
            f"    return Sweep({config!r}, {named!r}, {{'config.model.depth': 1}})\n"
        )
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            argv = [f"--sweep={file}", f"--workdir={tmp_path / 'w'}", "--dry_run"]
            assert cli.run(sweep.main, sweep.FLAGS, usage="", argv=argv) in (0, 2)
        assert "Traceback" not in err.getvalue()

    fuzz(sweeps, check, short=5)


# Values of another kind or out of range: in configs, Python calls and command lines.


def told_of(failures: list[junk.Failure]) -> str:
    again = 'junk.attempt("{}") within junk.without_work()'
    return "\n".join(f"{again.format(each.name)}: {each.kind}" for each in failures)


def test_what_a_hand_can_type_ends_in_one_line(request):
    trials, seed = (request.config.getoption(name) for name in ("--trials", "--base_seed"))
    failures = junk.attempts(seed, max(trials, 20))
    assert not failures, told_of(failures)


@pytest.mark.thorough
def test_much_that_a_hand_can_type_ends_in_one_line():
    failures = junk.attempts("thorough", 600)
    assert not failures, told_of(failures)


def test_a_try_that_does_not_end_well_is_found_and_found_again(monkeypatch):
    def refused(rng, where):
        raise UserError("in one line")

    def broken(rng, where):
        return [][rng.randrange(9)]

    monkeypatch.setattr(junk, "KINDS", (refused, broken, junk.work_begins))
    found = junk.attempts("a", 30)
    assert 0 < len(found) < 30
    assert all(failure.kind.startswith("broken: IndexError at ") for failure in found)
    assert junk.attempt(found[0].name) == found[0]
    monkeypatch.setattr(junk, "KINDS", (refused, junk.work_begins))
    assert not junk.attempts("a", 30)


def test_tries_are_of_every_kind():
    """And hardly any is right by chance: what a setting was is not what it is."""
    kinds = {junk.Random(f"0/{i}").choice(junk.KINDS) for i in range(200)}
    assert kinds == set(junk.KINDS)
    changed = 0
    for i in range(40):
        rng = junk.Random(str(i))
        config = config_files.load(DIGITS)
        try:
            changed += to_json(junk.changed(rng, config)) != to_json(config_files.load(DIGITS))
        except TypeError:  # An object, which is no JSON.
            changed += 1
    assert changed > 30


# Files.


@st.composite
def mutated(draw, whole: bytes) -> bytes:
    """Bytes that were some file before a few of them were changed, lost, doubled or added."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(1, 16))
        match draw(st.sampled_from(["flip", "cut", "drop", "double", "add"])):
            case "flip" if data:
                data[at] ^= draw(st.integers(1, 255))
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + length]
            case "double":
                data[at:at] = data[at : at + length]
            case "add":
                data[at:at] = draw(st.binary(max_size=8))
    return bytes(data)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=3,
)


@st.composite
def with_another_value(draw, tree: Any) -> Any:
    """JSON in which one value, somewhere, is another one or gone."""
    if isinstance(tree, dict | list) and tree and draw(st.integers(0, 4)):
        keys = sorted(tree) if isinstance(tree, dict) else range(len(tree))
        key = draw(st.sampled_from(keys))
        changed = dict(tree) if isinstance(tree, dict) else list(tree)
        if not draw(st.integers(0, 5)):
            del changed[key]
        else:
            changed[key] = draw(with_another_value(tree[key]))
        return changed
    return draw(JSON_VALUES)


def read_or_refused(read: Callable[[], Any]) -> None:
    with contextlib.suppress(UserError):
        read()


def test_saved_configs(fuzz):
    text = to_json(config_files.load(DIGITS))
    parts = ("augment", "optimizer", "path", "nonfinite", "sampling", "objective")

    def check(mutant):
        read_or_refused(lambda: from_json(mutant.decode(errors="replace")))

    fuzz(mutated(text.encode()), check, short=60)

    def check_tree(tree):
        def read():
            config = from_json(json.dumps(tree))
            for part in parts:
                if part in config and part in ("augment", "nonfinite"):
                    build(config[part])

        read_or_refused(read)

    fuzz(with_another_value(json.loads(text)), check_tree, short=60)


def test_files_of_a_run_folder(fuzz, tmp_path):
    lines = b'{"step": 1, "loss": 0.5, "loss_by_log_snr/-2": "nan"}\n{"step": 2, "loss": 0.4}\n'

    def check(data):
        file = tmp_path / "metrics.jsonl"
        file.write_bytes(data)
        read_or_refused(lambda: read_metrics(file))
        file.rename(tmp_path / "run.json")
        read_or_refused(lambda: read_json(tmp_path / "run.json"))

    fuzz(mutated(lines), check, short=60)
    fuzz(mutated(lines.splitlines()[0]), check, short=60)

    def check_rollbacks(tree):
        (tmp_path / "rollbacks.json").write_text(json.dumps(tree))
        read_or_refused(lambda: [Rollbacks.read(tmp_path).order(3)])

    fuzz(with_another_value({"rollbacks": [{"step": 5, "to": 4}]}), check_rollbacks)

    (tmp_path / "config.json").write_text("{}")
    run = {"data": {"image_shape": [8, 8, 1], "num_classes": 10, "label_names": ["a"]}}

    def check_run(tree):
        (tmp_path / "run.json").write_text(json.dumps(tree))
        read_or_refused(lambda: workdirs.read_parts(tmp_path))

    fuzz(with_another_value(run), check_run)


def test_torch_files(fuzz):
    for whole in (torch_zip(tensor(), STORAGE), tensor()):
        fuzz(mutated(whole), lambda data: read_or_refused(lambda: read_bytes(data)), 100)


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def repacked(data: bytes, name: str, change: Callable[[bytes], bytes]) -> bytes:
    """An archive with one entry changed and its sums right again."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.namelist():
            content = old.read(entry)
            new.writestr(entry, change(content) if entry == name else content)
    return file.getvalue()


def test_files_of_arrays(fuzz, tmp_path):
    images = np.zeros((3, 8, 8, 1), np.uint8)
    whole = npz(image=images, source=images, label=np.arange(3))
    path, known = tmp_path / "pairs.npz", digits()

    def check(data):
        path.write_bytes(data)
        read_or_refused(lambda: read_npz(data, "x"))
        read_or_refused(lambda: pairs(known, str(path)))
        read_or_refused(lambda: classifier.decode("x", data))

    fuzz(mutated(whole), check)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        inner = archive.read("image.npy")
    changed = mutated(inner).map(lambda data: repacked(whole, "image.npy", lambda _: data))
    fuzz(changed, check)


def test_folders_of_images(fuzz, tmp_path):
    pictures = []
    for format_ in ("PNG", "GIF", "JPEG", "BMP"):
        file = io.BytesIO()
        Image.new("RGB", (9, 7), (1, 2, 3)).save(file, format_)
        pictures.append(file.getvalue())

    def check(data):
        shutil.rmtree(tmp_path / "images", ignore_errors=True)
        (tmp_path / "images").mkdir()
        for i in range(2):
            (tmp_path / "images" / f"{i}.png").write_bytes(data)
        read_or_refused(lambda: image_folder(str(tmp_path / "images"), 4, 3, 0.5).train[0])

    fuzz(st.sampled_from(pictures).flatmap(mutated), check, short=60)


EVALUATION = {
    "step": 8, "weights": "live", "num_samples": 3, "seconds": 1.0, "accuracy": 0.5,
    "frechet_distance": {"value": 1.0, "floor": 0.5, "provenance": {"extractor": "pixels"}},
    "kernel_distance": {"value": 1.0, "floor": 0.5}, "neighbours": {"median": 1.0},
    "sampling": {"solver": "heun", "grid": "Power()", "num_steps": 2, "nfe": 3,
                 "guidance_scale": 1.0, "seed": 0},
    "by_nfe": [{"solver": "heun", "grid": "power", "num_steps": 2, "guidance_scale": 1.0, "nfe": 3,
                "accuracy": 0.5, "frechet_distance": 1.0, "kernel_distance": 1.0, "seconds": 0.1}],
}  # fmt: skip


@pytest.mark.thorough
def test_pages_of_damaged_evaluations(fuzz, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 8, "loss": 0.5}\n')

    def check(tree):
        (tmp_path / "evaluation.json").write_text(json.dumps(tree))
        read_or_refused(lambda: write_report(tmp_path))

    check(EVALUATION)
    assert (tmp_path / "report.html").is_file()
    fuzz(with_another_value(EVALUATION), check, short=15)


def test_the_mutations_are_some():
    """What is tried would not be found wanting if nothing were changed."""
    assert Path(DIGITS).is_file()
    found = set()
    settings(max_examples=20, derandomize=True, database=None)(
        given(mutated(b"0123456789"))(lambda data: found.add(data))
    )()
    assert len(found - {b"0123456789"}) > 10
