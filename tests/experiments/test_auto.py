"""`experiments.train --auto`: what it prints and keeps."""

import json

from configs import digits
from experiments import train


def test_auto_prints_what_it_chose_and_why(tmp_path, capsys):
    config = train.for_this_machine(digits.get_config(), tmp_path / "run", [])
    assert config.model.dtype == "float32"
    assert config.is_locked
    assert capsys.readouterr().err == "auto: model.dtype=float32: bfloat16 is not faster here\n"


def test_a_run_goes_on_as_it_began_and_what_is_given_stays(tmp_path, capsys):
    begun = {"accumulation_steps": 4, "model": {"dtype": "bfloat16", "remat": "full"}}
    (tmp_path / "config.json").write_text(json.dumps(begun))
    own = digits.get_config()
    own.model.remat = "products"
    config = train.for_this_machine(own, tmp_path, ["config.model.remat"])
    assert (config.model.dtype, config.accumulation_steps) == ("bfloat16", 4)
    assert config.model.remat == "products"
    expected = f"auto: model.dtype, accumulation_steps: as {tmp_path} began\n"
    assert capsys.readouterr().err == expected
