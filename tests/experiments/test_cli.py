import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from absl import flags

from diffjax import config_files
from diffjax.errors import UserError
from diffjax.spec import build
from experiments import announce_imports, end_at_once
from experiments.flags import cli

ROOT = Path(__file__).parents[2]

CONFIG = """
from ml_collections import ConfigDict
from diffjax.spec import parse_arguments

def get_config(arguments=""):
    chosen = parse_arguments(arguments, "objective", "model")
    return ConfigDict({
        "num_steps": 100,
        "objective": chosen.get("objective", "flow"),
        "clip_norm": 1.0,
        "dry": False,
        "note": None,
        "data": {"path": "", "name": "digits"},
        "model": {"channels": (64, 128), "names": ("a",), "decays": (0.9, 0.99)},
        "optimizer": {"learning_rate": 1e-3, "num_steps": 7},
        "losses": (ConfigDict({"scale": 1.0}), ConfigDict({"scale": 2.0})),
    })
"""

FLAGS = flags.FlagValues()
cli.define_config(FLAGS)
flags.DEFINE_string("workdir", None, "folder of the run", flag_values=FLAGS)
flags.DEFINE_integer("num_samples", 16, "how many to draw", flag_values=FLAGS)
flags.DEFINE_float("scale", 1.0, "of guidance", flag_values=FLAGS)
flags.DEFINE_list("solvers", ["ddim", "heun"], "which solvers", flag_values=FLAGS)
flags.DEFINE_enum("weights", "ema", ["ema", "live"], "which weights", flag_values=FLAGS)
flags.DEFINE_boolean("print_config", False, "print the config", flag_values=FLAGS)

DIGITS = "--config=configs/digits.py"


@pytest.fixture(autouse=True)
def configs(tmp_path, monkeypatch):
    """A folder of configs below the current directory; the process itself is left as it is."""
    monkeypatch.setattr(cli, "_set_up_logging", lambda: None)
    monkeypatch.setattr(cli, "_keep_compiled_programs", lambda: None)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "digits.py").write_text(CONFIG)
    (folder / "fashion_mnist.py").write_text(CONFIG)
    # Files are loaded under the names that those of the project have.
    before = modules_of_configs()
    yield folder
    for name in modules_of_configs():
        del sys.modules[name]
    sys.modules.update(before)


def modules_of_configs():
    return {name: of for name, of in sys.modules.items() if name.partition(".")[0] == "configs"}


def parse(*argv, flag_values=FLAGS):
    """The arguments that `main` gets; any error is a failure of the test."""
    seen = []
    assert cli.run(seen.append, flag_values, usage="", argv=argv) == 0
    return seen[0]


def refuse(capsys, *argv, flag_values=FLAGS):
    """The one line on stderr; `main` must not run."""
    status = cli.run(lambda args: pytest.fail("main ran"), flag_values, usage="", argv=argv)
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    return err.strip()


def test_flags_and_their_defaults():
    args = parse(DIGITS, "--workdir=runs/a", "--num_samples", "4", "--solvers=euler,ddpm")
    assert (args.workdir, args.num_samples, args.solvers) == ("runs/a", 4, ["euler", "ddpm"])
    assert (args.weights, args.print_config, args.config_name) == ("ema", False, "digits")
    assert parse(DIGITS, "--print_config").print_config is True


@pytest.mark.parametrize(
    ("override", "group", "key", "expected"),
    [
        ("num_steps=7", "", "num_steps", 7),
        ("clip_norm=2", "", "clip_norm", 2.0),
        ("clip_norm=-1e-3", "", "clip_norm", -1e-3),
        ("dry=true", "", "dry", True),
        ("dry", "", "dry", True),
        ("note=hello", "", "note", "hello"),
        ("note=(1, 2)", "", "note", (1, 2)),
        ("data.path=/a b/c=d", "data", "path", "/a b/c=d"),
        ("model.channels=(32, 64, 64)", "model", "channels", (32, 64, 64)),
        ("model.channels=32,64", "model", "channels", (32, 64)),
        ("model.channels=32", "model", "channels", (32,)),
        ("model.channels=", "model", "channels", ()),
        ("model.names=x,y", "model", "names", ("x", "y")),
        ("model.decays=0.5,1", "model", "decays", (0.5, 1.0)),
    ],
)
def test_an_override_has_the_type_of_the_default(override, group, key, expected):
    config = parse(DIGITS, f"--config.{override}").config
    value = (config[group] if group else config)[key]
    assert value == expected
    assert type(value) is type(expected)


def test_overrides_in_any_order_and_form():
    argv = ["--config.num_steps", "3", "--noconfig.dry", "--config.losses[1].scale=5", DIGITS]
    config = parse(*argv, "--config.num_steps=4").config
    assert (config.num_steps, config.dry) == (4, False)
    assert [loss.scale for loss in config.losses] == [1.0, 5.0]


def test_runs_do_not_share_state():
    parse(DIGITS, "--config.num_steps=3", "--workdir=a", "--solvers=euler")
    args = parse(DIGITS)
    assert (args.config.num_steps, args.workdir, args.solvers) == (100, None, ["ddim", "heun"])


def test_choices_after_the_colon_reach_the_config():
    args = parse(f"{DIGITS}:objective=ddpm")
    assert (args.config.objective, args.config_name) == ("ddpm", "digits")


def test_a_config_is_found_by_its_name_and_along_pythons_path(configs, tmp_path, monkeypatch):
    args = parse("--config=digits:objective=ddpm")
    assert (args.config.objective, args.config_name) == ("ddpm", "digits")
    installed, elsewhere = tmp_path, tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.syspath_prepend(str(installed))
    assert parse("--config=digits").config.num_steps == 100
    (elsewhere / "configs").mkdir()
    own = CONFIG.replace('"num_steps": 100', '"num_steps": 7')
    (elsewhere / "configs" / "digits.py").write_text(own)
    assert parse(DIGITS).config.num_steps == 7


def test_the_config_is_locked():
    config = parse(DIGITS).config
    with pytest.raises(AttributeError, match="learning_rat"):
        config.optimizer.learning_rat = 1.0
    with pytest.raises(AttributeError, match="scal"):
        config.losses[0].scal = 1.0


def test_a_script_without_config():
    flag_values = flags.FlagValues()
    flags.DEFINE_integer("seed", 0, "seed", flag_values=flag_values)
    assert vars(parse("--seed=3", flag_values=flag_values)) == {"seed": 3}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--config=FILE.py is missing; known: configs/digits.py, configs/fashion_mnist.py"),
        (["--config=configs/digitz.py"], "did you mean 'configs/digits.py'?"),
        (["--config=digts"], "did you mean 'configs/digits.py'?"),
        (["--config=confgs/digits.py"], "did you mean 'configs/digits.py'?"),
        (["--config=configs"], "there is no config file configs; "),
        ([f"{DIGITS}:objetive=ddpm"], "no axis 'objetive'; did you mean 'objective'?"),
        ([DIGITS, "--config.optimizer.learning_rat=1"], "'--config.optimizer.learning_rate'?"),
        ([DIGITS, "--config.optimzer.learning_rate=1"], "'--config.optimizer.learning_rate'?"),
        ([DIGITS, "--config.learning_rate=1"], "did you mean '--config.optimizer.learning_rate'?"),
        ([DIGITS, "--num_steps=1"], "did you mean '--config.num_steps'?"),
        ([DIGITS, "--config.optimizer.num_stepz=1"], "mean '--config.optimizer.num_steps'?"),
        (
            [DIGITS, "--config.optimizer.foo=1"],
            "known: --config.optimizer.learning_rate, --config.optimizer.num_steps",
        ),
        ([DIGITS, "--config.model=unet"], "--config.model is a group of settings; set one of"),
        ([DIGITS, "--config.num_steps=abc"], "config.num_steps expects int, got 'abc'"),
        ([DIGITS, "--config.num_steps=1e3"], "config.num_steps expects int, got '1e3'"),
        ([DIGITS, "--config.clip_norm=x"], "config.clip_norm expects float, got 'x'"),
        ([DIGITS, "--config.dry=2"], "config.dry expects bool, got '2'"),
        ([DIGITS, "--config.model.channels=a"], "expects tuple like (64, 128), got 'a'"),
        ([DIGITS, "--config.model.decays=((1,),)"], "expects tuple like (0.9, 0.99)"),
        ([DIGITS, "--wrkdir=a"], "unknown flag --wrkdir; did you mean '--workdir'?"),
        ([DIGITS, "--workdir"], "--workdir"),
        ([DIGITS, "--num_samples=many"], "--num_samples=many"),
        ([DIGITS, "--num_samples=4294967297"], "--num_samples=4294967297 is out of range: at most"),
        ([DIGITS, "--config.num_steps=-4294967297"], "config.num_steps=-4294967297 is out of"),
        ([DIGITS, "--scale=nan"], "--scale needs a finite number, not nan"),
        ([DIGITS, "--scale=big"], "flag --scale=big: 'big' is not a number"),
        ([DIGITS, "--weights=emma"], "<ema|live>"),
        ([DIGITS, "runs/a"], "unexpected argument 'runs/a'"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_right(capsys, argv, message):
    assert message in refuse(capsys, *argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "configs/new.py defines no get_config()"),
        ("def get_config():\n    return {}\n", "get_config() in configs/new.py returns dict"),
        ("def get_config():\n    return 1 / 0\n", "configs/new.py:2: ZeroDivisionError: division"),
        ("import json\n\njson.loads('[')\n", "configs/new.py:3: JSONDecodeError: Expecting value"),
        ("import no_such_module\n", "configs/new.py:1: ModuleNotFoundError: No module named"),
        ("\ndef get_config(:\n", "configs/new.py:2: SyntaxError: invalid syntax"),
        ("def get_config(a):\n    return {}\n", "has get_config(a), but --config passes no arg"),
        (
            "from diffjax.errors import UserError\n\nraise UserError('two\\n  lines')\n",
            "error: two lines",
        ),
    ],
)
def test_a_bug_in_a_config_file_is_one_line_that_says_where(capsys, configs, text, message):
    (configs / "new.py").write_text(text)
    assert message in refuse(capsys, "--config=configs/new.py")


def test_a_config_that_takes_no_choices(capsys, configs):
    (configs / "plain.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n"
    )
    assert "passes the arguments 'a=b'" in refuse(capsys, "--config=configs/plain.py:a=b")


def test_a_required_placeholder_is_asked_for_by_name(capsys, configs):
    (configs / "open.py").write_text(
        "from ml_collections import config_dict as c\n"
        "def get_config():\n"
        "    return c.ConfigDict({'seed': c.required_placeholder(int)})\n"
    )
    assert "config.seed has no default" in refuse(capsys, "--config=configs/open.py")
    assert parse("--config=configs/open.py", "--config.seed=3").config.seed == 3


def test_a_class_of_the_config_file_can_be_named_in_a_spec(configs):
    (configs / "own.py").write_text(
        "from diffjax.spec import spec\n"
        "class Path:\n"
        "    def __init__(self, power=2.0):\n"
        "        self.power = power\n"
        "def get_config():\n"
        "    return spec(Path)\n"
    )
    config = parse("--config=configs/own.py", "--config.power=3").config
    assert config.to_dict() == {"_target_": "configs.own:Path", "power": 3.0}


def test_help_is_the_usage_and_the_flags_of_the_script(capsys):
    status = cli.run(lambda args: pytest.fail("main ran"), FLAGS, usage="Draws.", argv=["--help"])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    assert out.startswith("Draws.\n")
    assert "how many to draw (default: 16)" in out
    assert "<ema|live>: which weights (default: ema)" in out
    assert "logtostderr" not in out
    assert max(map(len, out.splitlines())) <= 92


def test_exit_status(capsys):
    def interrupted(args):
        raise KeyboardInterrupt("saved step 5; the same command goes on from there")

    def mistaken(args):
        raise UserError("the patch size 3\n does not divide 32")

    def buggy(args):
        raise ValueError("a bug")

    no_flags = flags.FlagValues()
    assert cli.run(lambda args: 3, no_flags, usage="", argv=[]) == 3
    assert cli.run(interrupted, no_flags, usage="", argv=[]) == 130
    assert cli.run(mistaken, no_flags, usage="", argv=[]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "saved step 5; the same command goes on from there",
        "error: the patch size 3 does not divide 32",
    ]
    with pytest.raises(ValueError, match="a bug"):
        cli.run(buggy, no_flags, usage="", argv=[])


def test_long_imports_are_announced_until_the_command_line_is_there(monkeypatch):
    """After 5 s and every 10 s; a module that is being imported has no `run` yet."""
    waits, lines = [], []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            monkeypatch.setitem(sys.modules, "experiments.flags.cli", cli)

    monkeypatch.setitem(sys.modules, "experiments.flags.cli", ModuleType("half"))
    announce_imports(sleep, lines.append)
    assert waits == [5, 10, 10]
    assert lines == [f"importing JAX and other libraries, {n} s so far" for n in (5, 15)]


@pytest.mark.process
def test_ctrl_c_while_libraries_are_imported_ends_in_one_line():
    """An exception there would come out of C++ code of a library, as another one or an abort."""
    script = (
        "import os, signal, sys; sys.argv[0] = '-m'\n"
        # A shell's background command ignores it, and so would a process that it starts.
        "signal.signal(signal.SIGINT, signal.default_int_handler); import experiments\n"
        "try: os.kill(os.getpid(), signal.SIGINT); sum(range(10**7))\n"
        "except BaseException: pass"
    )
    environment = {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    assert (ended.returncode, ended.stderr) == (130, b"interrupted\n")


def test_ctrl_c_is_an_exception_again_once_a_command_runs(monkeypatch):
    before = signal.signal(signal.SIGINT, end_at_once)
    try:
        cli.run(
            lambda args: signal.raise_signal(signal.SIGINT), flags.FlagValues(), usage="", argv=[]
        )
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


PART = """
from dataclasses import dataclass

from diffjax.kinds import Positive

@dataclass(frozen=True)
class Bump:
    width: Positive[float] = 2

    def __call__(self, coeffs, mix):
        return self.width
"""


def test_a_part_of_ones_own_is_named_on_the_command_line(configs, tmp_path, monkeypatch):
    """Its fields are flags with the types and ranges of their annotations."""
    (tmp_path / "bumps_of_ones_own.py").write_text(PART)
    monkeypatch.syspath_prepend(tmp_path)
    digits = str(ROOT / "configs" / "digits.py")
    config = config_files.load(f"{digits}:weight=bumps_of_ones_own:Bump")
    assert config.name == "digits-bumps_of_ones_own-Bump"
    width = "config.objective.weight.width"
    setting = config_files.override(config, {width: "2.5"})[width]
    assert build(config.objective.weight).width == 2.5
    with pytest.raises(UserError, match=f"{width} expects float, got 'wide'"):
        setting.parse("wide")
    setting.set(setting.parse("-1"))
    with pytest.raises(UserError, match=r"width=-1.0 must be above 0, like 2"):
        build(config.objective.weight)
    for wrong, said in {
        "bumps_of_ones_own:Bmp": "bumps_of_ones_own has no 'Bmp'; did you mean 'Bump'",
        "nothing_there:Bump": "config names 'nothing_there:Bump', but No module named",
    }.items():
        with pytest.raises(UserError, match=said):
            config_files.load(f"{digits}:weight={wrong}")


@pytest.mark.process
def test_as_a_process():
    script = (
        "import sys; from absl import flags; from experiments.flags import cli\n"
        "FLAGS = flags.FlagValues(); cli.define_config(FLAGS)\n"
        "sys.exit(cli.run(lambda args: print(args.config.num_steps), FLAGS, usage=''))"
    )
    command = [sys.executable, "-c", script, DIGITS, "--config.num_steps=5"]
    good = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (good.returncode, good.stdout, good.stderr) == (0, "5\n", "")
    command[-1] = "--config.num_stepz=5"
    bad = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.endswith("did you mean '--config.num_steps'?\n")
    assert "Traceback" not in bad.stderr


def test_settings_cover_every_leaf(configs):
    config = config_files.load("configs/digits.py")
    names = list(config_files.settings(config))
    assert len(names) == len(set(names)) == 14
    assert {"config.losses[0].scale", "config.losses[1].scale", "config.data.path"} < set(names)


@pytest.mark.process
def test_help_into_a_pipe_that_somebody_closed_is_no_mistake():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "experiments.report", "--help"]
    with os.fdopen(writer, "wb") as pipe:
        ended = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, check=False)
    lines = [x for x in ended.stderr.splitlines() if not x.startswith(b"importing JAX")]
    assert (ended.returncode, lines) == (0, [])
