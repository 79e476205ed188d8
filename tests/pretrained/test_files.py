"""Files of safetensors: tensor by tensor, as they were written, and damaged ones."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.pretrained.files import read_state_dict, write_safetensors
from tests.support.weights import read_bytes

HALVES = np.arange(4.0, dtype=jnp.bfloat16)
ARRAYS = {
    "plain": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32),
    "transposed": np.arange(6.0, dtype=np.float32).reshape(2, 3).T,
    "brain": HALVES,
    "half": np.ones((2, 1), np.float16),
    "long": np.array([2**40, -1]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "yes": np.array([True, False]),
}


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, ARRAYS)
    write_safetensors(path, read_state_dict(path))  # from a file that is open to itself
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]
    found = read_state_dict(path)
    assert found.keys() == ARRAYS.keys()
    for name, expected in ARRAYS.items():
        assert (found[name].shape, found[name].dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(np.asarray(found[name]), expected)


def test_a_tensor_is_read_when_it_is_used(tmp_path):
    """Shapes come from the header alone: the numbers of this file are 64 GB of nothing."""
    size = 1 << 34
    entry = {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(header({"w": entry}))
        file.truncate(file.tell() + 4 * size)
    assert read_state_dict(path)["w"].shape == (size,)


def test_what_can_not_be_written(tmp_path):
    with pytest.raises(UserError, match=r"can't write weights to .*nowhere"):
        write_safetensors(tmp_path / "nowhere" / "w.safetensors", ARRAYS)


@pytest.mark.parity
def test_every_tensor_is_as_torch_wrote_it():
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {name: torch.tensor(np.array(x, np.float64, order="C")) for name, x in ARRAYS.items()}
    tensors["brain"] = tensors["brain"].bfloat16()
    for name, found in read_bytes(safetensors.save(tensors, {"made": "here"})).items():
        np.testing.assert_array_equal(found.astype(np.float64), tensors[name].double().numpy())


def header(entries, length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def one(**changes):
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes


WHOLE = header({"w": one()}) + bytes(16)


@pytest.mark.parametrize(
    "data",
    [
        WHOLE[:-1],
        WHOLE[:20],
        WHOLE[:8],
        WHOLE + bytes(4),
        header({"w": one()}, 10**10) + bytes(16),
        header({"w": one()}, 2**63) + bytes(16),
        header({"w": one(dtype="F7")}) + bytes(16),
        header({"w": one(dtype="C64", shape=[2])}) + bytes(16),
        header({"w": one(shape=[3])}) + bytes(16),
        header({"w": one(shape=[1 << 40, 1 << 40])}) + bytes(16),
        header({"w": one(data_offsets=[-4, 12])}) + bytes(16),
        header({"w": one(), "v": one()}) + bytes(16),
        header({"w": 3}) + bytes(16),
        header(b'{"w": ') + bytes(16),
        header(b'{"w\xff": {}}') + bytes(16),
        header(b"{" * 100_000) + bytes(16),
    ],
    ids=lambda data: f"{data[:60]}",
)
def test_a_damaged_file_ends_in_one_line(data):
    assert read_bytes(WHOLE)["w"].tolist() == [0.0] * 4
    with pytest.raises(UserError, match=r"can't read weights from .*x\.pth: .") as caught:
        read_bytes(data)
    assert "\n" not in str(caught.value)


def test_what_is_no_file(tmp_path):
    with pytest.raises(UserError, match=r"can't read weights from .*nowhere: No such file"):
        read_state_dict(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"can't read weights from .*: Is a directory"):
        read_state_dict(tmp_path)
