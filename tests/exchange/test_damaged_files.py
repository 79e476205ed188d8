"""Damaged and hostile files of each reader end in one line and status 2, and nothing is written."""

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.pretrained.files import read_state_dict
from diffjax.pretrained.folders import write_folder
from experiments import convert
from experiments.flags import cli
from tests.pretrained.test_files import WHOLE
from tests.pretrained.test_torch_files import STORAGE, Call, old_format, tensor, torch_zip
from tests.support import persistent_pickles as nvidia

ONE = np.ones((2, 2), np.float32)


def within_itself() -> dict:
    tree: dict = {}
    tree["model"] = tree["w"] = tree
    return tree


def old(tree: object) -> bytes:
    return old_format(pickle.dumps(tree, 2), keys=())


def of_nvidia(tree: object) -> bytes:
    return nvidia.dumped({"ema": tree})


READERS = {
    "safetensors": (WHOLE, []),
    "torch zip": (torch_zip(tensor(), STORAGE), [torch_zip(pickle.dumps(within_itself(), 2))]),
    "torch legacy": (old_format(), [old(within_itself())]),
    "nvidia": (of_nvidia(nvidia.module("Net", {"w": ONE})), [nvidia.dumped(within_itself())]),
}
CODE = {
    "torch zip": lambda call: torch_zip(pickle.dumps(call, 2)),
    "torch legacy": old,
    "nvidia": nvidia.dumped,
}


def ends_in_one_line(path: Path, capsys) -> str:
    argv = [f"--from={path}", "--to=diffjax", f"--out={path.parent / 'out'}"]
    assert cli.run(convert.main, convert.FLAGS, usage="", argv=argv) == 2
    said = capsys.readouterr().err.strip()
    assert said
    assert "\n" not in said
    assert not (path.parent / "out").exists()
    return said


@pytest.mark.parametrize("reader", READERS)
def test_a_file_cut_short_or_within_itself(reader, tmp_path, capsys):
    whole, others = READERS[reader]
    path = tmp_path / "x.pt"
    for part in (0, 1, 8, 9, len(whole) // 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:part])
        assert "can't read weights from" in ends_in_one_line(path, capsys)
    for data in others:
        path.write_bytes(data)
        assert str(path) in ends_in_one_line(path, capsys)
    path.write_bytes(whole)  # whole, and of no known network
    assert "the tensors of no network that is known" in ends_in_one_line(path, capsys)


@pytest.mark.parametrize("reader", CODE)
def test_code_in_a_pickle_is_not_run(reader, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    for call in (Call(os.mkdir, "harm"), Call(eval, "1"), Call(getattr, "", "join"), os.system):
        path.write_bytes(CODE[reader]({"ema": call}))
        assert "only tensors are allowed" in ends_in_one_line(path, capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("reader", CODE)
@pytest.mark.parametrize(
    "opcode",
    [
        b"\x8e" + (10**10).to_bytes(8, "little"),  # bytes of 10 GB
        b"\x8d" + (10**10).to_bytes(8, "little"),  # a text of 10 GB
        b"\x8b" + (2**31 - 1).to_bytes(4, "little"),  # a number of 2 GB
        b"h\x07",  # an object that there is not
        b"(" * 10**5,
    ],
    ids=["bytes", "text", "number", "object", "marks"],
)
def test_a_pickle_that_states_more_than_it_has(reader, opcode, tmp_path):
    pickled = b"\x80\x04" + opcode + b"."
    data = {
        "torch zip": lambda: torch_zip(pickled),
        "torch legacy": lambda: old_format(pickled, keys=()),
        "nvidia": lambda: pickled,
    }[reader]()
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(UserError, match=r"can't read weights from .*x\.pt: .") as error:
        read_state_dict(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


def indexed(**places):
    return {"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors", **places}}


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (indexed(b="../x.safetensors"), "outside of its folder"),
        (indexed(b="/etc/passwd"), "outside of its folder"),
        (indexed(b="sub/../../x"), "outside of its folder"),
        (indexed(b="x\x00y"), "lacks the shard"),
        (indexed(b="none.safetensors"), "lacks the shard none.safetensors"),
        (indexed(b="diffusion_pytorch_model.safetensors.index.json"), "can't read weights from"),
        (indexed(b=["x"]), "has no weight_map"),
        ({"weight_map": []}, "has no weight_map"),
        ([], "it is no JSON object"),
    ],
)
def test_an_index_of_a_folder(index, said, tmp_path, capsys):
    folder = tmp_path / "transformer"
    write_folder(folder, OrderedDict(a=ONE, b=ONE), {"_class_name": "X"}, most_shard_bytes=16)
    text = json.dumps(index)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    assert said in ends_in_one_line(folder, capsys)
