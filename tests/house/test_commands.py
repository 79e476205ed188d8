"""The command lines in the pages are understood: their programs, flags and settings are there.

What only a reader has, such as `FOLDER` or `my_study.py`, is not looked for.
"""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from experiments import __main__ as command
from experiments import train
from experiments.flags import cli

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
COMMAND = re.compile(r"\s*(?:python -m experiments\.|diffjax )([a-z_-]+)(?= +-|\s*$)(.*)")
# Configs that are made of files, and a number that the page explains.
OF_THE_READER = ("my_", "configs/finetune.py", "latents=", "RATE_OF_WIDTH")
OF_EARLIER_COMMANDS = ("runs/", "pairs.npz", "trackers=", "--extend", "--coordinator")


def commands(text):
    """The program and the flags of each command line; a comment at its end is left out."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    found = (COMMAND.fullmatch(line) for line in lines)
    return [(hit[1].replace("-", "_"), shlex.split(hit[2], comments=True)) for hit in found if hit]


def of_all_pages():
    """Each command once, but for those that name something of the reader's."""
    found = [each for page in PAGES for each in commands(page.read_text(encoding="utf-8"))]
    return [
        (program, flags)
        for number, (program, flags) in enumerate(found)
        if (program, flags) not in found[:number]
        and not any(name in flag for flag in flags for name in OF_THE_READER)
    ]


def test_command_lines_are_found():
    text = "    diffjax find-grid --a='1 2' \\\n        --b  # why\ndiffjax can't\n"
    assert commands(text) == [("find_grid", ["--a=1 2", "--b"])]


def test_programs_of_the_pages_are_there():
    programs = {program for program, _ in of_all_pages()}
    assert len(programs) > 15
    assert programs - set(command.commands()) == set()


@pytest.mark.process
def test_flags_and_settings_of_the_pages_are_there(monkeypatch, capsys):
    """All configs are read; no process is waited for, but importing all programs takes as long."""
    monkeypatch.setattr(cli.shared, "join_processes", lambda args: None)
    for program, flags in of_all_pages():
        # `doctor` has no flags.
        if known := getattr(importlib.import_module(f"experiments.{program}"), "FLAGS", None):
            status = cli.run(lambda args: None, known, usage="", argv=flags)
            assert status == 0, (program, *flags, capsys.readouterr().err)
    wrong = ["--config=configs/digits.py", "--config.num_stepz=3"]
    assert cli.run(lambda args: None, train.FLAGS, usage="", argv=wrong) == 2


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize(
    "flags",
    [
        flags
        for program, flags in of_all_pages()
        if program == "train" and re.match(r"--config=(configs/)?digits", " ".join(flags))
        if not any(name in flag for flag in flags for name in OF_EARLIER_COMMANDS)
    ],
    ids=" ".join,
)
def test_trainings_on_digits_are_built(flags, tmp_path, capsys):
    argv = [*flags, "--dry_run", f"--workdir={tmp_path / 'run'}"]
    assert cli.run(train.main, train.FLAGS, usage="", argv=argv) == 0, capsys.readouterr().err
