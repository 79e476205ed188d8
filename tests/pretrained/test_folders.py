"""Folders of diffusers: one file, shards, pipelines; and damaged ones, which end in one line."""

import json
import os

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from diffjax.errors import UserError
from diffjax.pretrained import tensors
from diffjax.pretrained.folders import read_weights, write_folder
from diffjax.pretrained.placing import placed_like
from diffjax.pretrained.tables import Row, to_ours

STATE = {f"layer.{i}": np.full((4, 3), i, np.float32) for i in range(5)}
CONFIG = {"_class_name": "Network", "num_layers": 5}
INDEX = "diffusion_pytorch_model.safetensors.index.json"
FIRST, SECOND, THIRD = (f"diffusion_pytorch_model-{i:05}-of-00003.safetensors" for i in range(1, 4))


@pytest.fixture
def folder(tmp_path):
    """Three shards, of two, two and one tensors of 48 bytes."""
    write_folder(tmp_path / "transformer", STATE, CONFIG, most_shard_bytes=100)
    return tmp_path / "transformer"


def same(found):
    assert found.keys() == STATE.keys()
    for name, array in STATE.items():
        np.testing.assert_array_equal(np.asarray(found[name]), array)


def test_shards_are_read_as_one(folder):
    names = sorted(file.name for file in folder.iterdir())
    assert names == ["config.json", FIRST, SECOND, THIRD, INDEX]
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == 5 * 48
    assert index["weight_map"]["layer.3"] == SECOND
    state, config, place = read_weights(folder)
    same(state)
    assert (config, place) == (CONFIG, folder)


def test_of_a_pipeline_the_denoiser_is_read(folder):
    parts = {"vae": ["diffusers", "X"], "transformer": ["diffusers", "Y"], "id2label": {"0": "cat"}}
    (folder.parent / "model_index.json").write_text(json.dumps(parts))
    found = read_weights(folder.parent)
    same(found.state)
    assert found.place == folder
    del parts["transformer"]
    (folder.parent / "model_index.json").write_text(json.dumps(parts))
    with pytest.raises(UserError, match="without a folder transformer or unet or prior: name"):
        read_weights(folder.parent)


def test_one_file_and_one_of_another_precision_beside_it(tmp_path):
    write_folder(tmp_path, STATE, CONFIG)
    halves = tmp_path / "diffusion_pytorch_model.fp16.safetensors"
    halves.write_bytes((tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()[:50])
    same(read_weights(tmp_path).state)


def test_pages_that_were_given_back_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "_MOST_RESIDENT_BYTES", 0)
    write_folder(tmp_path, STATE, CONFIG)
    arrays = {name: np.asarray(x) for name, x in read_weights(tmp_path).state.items()}
    same(arrays)


def test_each_parameter_is_placed_before_the_next_one_is_read():
    events = []

    class Told:
        shape, dtype = (2,), np.dtype(np.float32)

        def __init__(self, name):
            self.name = name

        def __array__(self, dtype=None, copy=None):
            events.append(f"read {self.name}")
            return np.zeros(2, np.float32)

    expected = {name: np.zeros(2, np.float32) for name in "ab"}
    table = (Row("{x:s}", "{x:s}"),)

    def place(path, array):
        events.append(f"place {path}")
        return path

    assert to_ours({x: Told(x) for x in "ab"}, table, expected, "x", place=place) == {
        "a": "a",
        "b": "b",
    }
    assert events == ["read a", "place a", "read b", "place b"]


def changed_index(**places):
    def change(folder):
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] |= places
        (folder / INDEX).write_text(json.dumps(index))

    return change


def write(name, text):
    return lambda folder: (folder / name).write_bytes(text)


def cut(name, length):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def no_weights(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / SECOND).unlink(), f"lacks the shard {SECOND}, which"),
        (changed_index(**{"layer.0": "../outside.safetensors"}), "names a shard outside of its fo"),
        (changed_index(**{"layer.0": "/etc/passwd"}), "names a shard outside of its folder: /etc"),
        (changed_index(**{"layer.0": ".."}), r"names a shard outside of its folder: \.\."),
        (changed_index(**{"layer.9": FIRST}), "lacks the tensor layer.9 of the index"),
        (
            changed_index(**{"layer.0": SECOND}),
            "the tensor layer.0, which is in .*2-of.* by",
        ),
        (changed_index(**{"layer.0": 3}), "has no weight_map of names to files"),
        (write(INDEX, b"{}"), "has no weight_map of names to files"),
        (write(INDEX, b'{"weight_map": {"a": "x", "a": "y"}}'), "it has 'a' twice"),
        (write(INDEX, b'{"weight_map": {"a":'), r"can't read .*index\.json: Expecting value"),
        (write(INDEX, b"[" * 10**6), r"can't read .*index\.json: maximum recursion depth"),
        (cut(THIRD, 60), rf"can't read weights from .*{THIRD}"),
        (
            write(THIRD, (10**10).to_bytes(8, "little") + b"{" + bytes(90)),
            f"weights from .*{THIRD}",
        ),
        (write(THIRD, b"version https://git-lfs"), "neither a file of safetensors nor of torch"),
        (write("config.json", b"[]"), r"can't read .*config\.json: it is no JSON object"),
        (
            write("config.json", b"\xff\xfe"),
            r"config\.json: 'utf-8' codec can't decode",
        ),
        (
            lambda folder: (folder / "config.json").unlink(),
            r"has neither config\.json nor model_index\.json; name a file",
        ),
        (no_weights, r"has no weights: a file diffusion_pytorch_model\.safetensors is missing"),
        (write("two.safetensors.index.json", b"{}"), None),
        (lambda folder: (no_weights(folder), os.mkfifo(folder / "x.safetensors")), "is no file"),
    ],
)
def test_a_damaged_folder_ends_in_one_line(folder, damage, said):
    damage(folder)
    if said is None:  # The one of the usual name is read.
        same(read_weights(folder).state)
        return
    with pytest.raises(UserError, match=said) as caught:
        read_weights(folder)
    assert "\n" not in str(caught.value)


def test_two_files_of_which_none_has_the_usual_name(tmp_path):
    write_folder(tmp_path, STATE, CONFIG)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    (tmp_path / "a.safetensors").write_bytes(file.read_bytes())
    file.rename(tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"several files of weights: name one of a\.saf.*, b\.s"):
        read_weights(tmp_path)


def test_a_folder_that_can_not_be_written(tmp_path):
    with pytest.raises(UserError, match=r"can't write weights to .*nowhere/x: No such file"):
        write_folder(tmp_path / "nowhere" / "x", STATE, CONFIG)


def test_each_device_has_its_part_and_none_is_the_memory_of_the_file(tmp_path):
    """Of eight devices; a parameter that needs no change would otherwise be a view of the file."""
    write_folder(tmp_path, {"w": np.arange(48, dtype=np.float32).reshape(16, 3)}, CONFIG)
    tensor = np.asarray(read_weights(tmp_path).state["w"])
    mesh = jax.make_mesh((8,), ("fsdp",))
    split, whole = NamedSharding(mesh, P("fsdp")), SingleDeviceSharding(jax.devices()[0])
    for sharding, rows in ((split, 2), (whole, 16)):
        like = {"w": jax.ShapeDtypeStruct((16, 3), np.float32, sharding=sharding)}
        placed = placed_like(like)("w", tensor)
        assert placed.sharding == sharding
        assert {shard.data.shape for shard in placed.addressable_shards} == {(rows, 3)}
        np.testing.assert_array_equal(placed, tensor)
        for shard in placed.addressable_shards:
            assert not np.shares_memory(np.asarray(shard.data), tensor)
