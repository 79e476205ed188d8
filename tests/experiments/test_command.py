"""The command `diffjax`, and what `diffjax doctor` collects."""

import sys

import pytest

from experiments import __main__ as command
from experiments import doctor


def called(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["diffjax", *argv])
    try:
        status = command.main()
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    return status, out, err


def test_every_executable_is_a_command_and_what_they_share_is_none():
    found = command.commands()
    assert {"train", "sample", "evaluate", "sweep", "doctor", "benchmark"} <= set(found)
    assert not {"flags", "launch"} & set(found)
    assert all(found.values())


def test_the_help_lists_them_and_a_mistake_is_one_line(monkeypatch, capsys):
    status, out, err = called(monkeypatch, capsys)
    assert (status, err) == (0, "")
    assert "\n  train  " in out
    status, out, err = called(monkeypatch, capsys, "trian", "--config=digits")
    assert (status, out) == (2, "")
    assert err == "error: no command is called 'trian'; did you mean 'train'?\n"
    assert called(monkeypatch, capsys, "--version")[1].startswith("diffjax 0.")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_command_runs_its_executable(monkeypatch, capsys):
    status, out, _ = called(monkeypatch, capsys, "find-grid", "--help")
    assert status == 0
    assert out.startswith("Optimise a solver's time grid")


def test_the_doctor_prints_what_is_there_and_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_devices", lambda: ([], "no backend"))
    status = doctor.main([])
    out, _ = capsys.readouterr()
    assert status == 2
    assert "packages " in out
    assert "jax " in out
    assert "wrong: JAX finds no device: no backend\n  mend: " in out
    assert doctor.main(["--help"]) == 0
    assert doctor.main(["--config=digits"]) == 2


def test_the_requirements_of_extras_inside_extras_are_those_of_their_packages(monkeypatch):
    needs = {
        "diffjax": ["numpy>=2", 'jax[cuda13]; extra == "cuda"', 'diffjax[cuda]; extra == "dev"'],
        "jax": ['jax-cuda13-plugin==1; extra == "cuda13"', "numpy"],
    }
    monkeypatch.setattr(doctor.metadata, "requires", lambda package: needs[package])
    found = doctor._of_extra("diffjax", "dev")
    assert [text.partition(";")[0] for text in found] == [
        "diffjax[cuda]",
        "jax[cuda13]",
        "jax-cuda13-plugin==1",
    ]
