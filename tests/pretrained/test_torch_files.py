"""Files of torch.save, written by torch and by hand, and the files of weights around them."""

import argparse
import contextlib
import functools
import hashlib
import http.server
import io
import logging
import os
import pickle
import string
import threading
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.pretrained.downloads import find_weights
from diffjax.pretrained.files import read_state_dict
from diffjax.pretrained.torch_writer import write_torch
from tests.support.weights import read_bytes


def torch_zip(pickled: bytes, storages=(), compression=zipfile.ZIP_STORED) -> bytes:
    """A file as torch writes it, with a pickle and storages of one's own."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", b"little")
        for key, data in storages:
            archive.writestr(f"archive/data/{key}", data)
    return file.getvalue()


def tensor(size=(2, 2), stride=(2, 1), offset=0, *, kind="FloatStorage", numel=4) -> bytes:
    """The pickle of `{"w": tensor}`, opcode by opcode, protocol 2."""

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    def numbers(values) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text("0") + text("cpu")
    storage += number(numel) + b"tQ"
    arguments = b"(" + storage + number(offset) + numbers(size) + numbers(stride) + b"\x89Nt"
    return b"\x80\x02}" + text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


STORAGE = [("0", np.arange(4, dtype="<f4").tobytes())]


@pytest.mark.parametrize("kept", [b"r\xff\xff\xff\x7f", b"p2147483647\n"])
def test_a_number_in_a_pickle_takes_no_memory(kept):
    """Python's own reader would make room for 2^31 objects, twice over: 34 GB."""
    for wrapped in (lambda data: torch_zip(data, STORAGE), lambda data: data):
        bomb = wrapped(tensor().replace(b"\x80\x02}", b"\x80\x02}" + kept))
        with pytest.raises(UserError, match="it has an object number 2147483647 above"):
            read_bytes(bomb)


def state(torch, generator=0):
    torch.manual_seed(generator)
    base = torch.arange(24, dtype=torch.float32)
    return OrderedDict(
        plain=torch.randn(3, 4, 2),
        transposed=torch.randn(5, 3).T,
        slice_of_a_shared_storage=base.reshape(4, 6)[1:3, ::2],
        its_other_end=base[20:],
        scalar=torch.tensor(3.5),
        empty=torch.zeros(0, 3),
        parameter=torch.nn.Parameter(torch.randn(2)),
        double=torch.randn(2, dtype=torch.float64),
        half=torch.randn(3).half(),
        brain=torch.randn(3).bfloat16(),
        long=torch.tensor([2**40, -1]),
        small=torch.tensor([1, -2], dtype=torch.int8),
        yes=torch.tensor([True, False]),
    )


class TestReading:
    @pytest.mark.parity
    @pytest.mark.parametrize("new", [True, False])
    def test_every_tensor_is_as_torch_reads_it(self, new):
        torch = pytest.importorskip("torch")
        file = io.BytesIO()
        torch.save(state(torch), file, _use_new_zipfile_serialization=new)
        found = read_bytes(file.getvalue())
        for key, value in state(torch).items():
            array = found[key]
            expected = value.detach()
            assert str(array.dtype) == str(value.dtype).removeprefix("torch.")
            assert array.shape == tuple(value.shape)
            np.testing.assert_array_equal(array.astype(np.float64), expected.double().numpy())
        assert found.keys() == state(torch).keys()

    @pytest.mark.parity
    @pytest.mark.parametrize("new", [True, False])
    def test_the_state_of_a_module_with_its_versions(self, new):
        torch = pytest.importorskip("torch")
        module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4))
        file = io.BytesIO()
        torch.save(module.state_dict(), file, _use_new_zipfile_serialization=new)
        found = read_bytes(file.getvalue())
        np.testing.assert_array_equal(found["0.weight"], module[0].weight.detach().numpy())

    @pytest.mark.parity
    @pytest.mark.parametrize("new", [True, False])
    def test_of_what_a_training_stored_the_averages_are_read(self, new, caplog):
        caplog.set_level(logging.INFO, "diffjax")
        torch = pytest.importorskip("torch")
        module = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(module.parameters())
        module(torch.ones(2)).sum().backward()
        optimizer.step()
        ema = {name: value + 1 for name, value in module.state_dict().items()}
        stored = {"model": module.state_dict(), "ema": ema, "opt": optimizer.state_dict()}
        stored["args"] = argparse.Namespace(epochs=3, name="x")
        file = io.BytesIO()
        torch.save(stored, file, _use_new_zipfile_serialization=new)
        for part, expected in (("", ema), ("ema", ema), ("model", module.state_dict())):
            found = read_bytes(file.getvalue(), part=part)
            assert found.keys() == expected.keys()
            np.testing.assert_array_equal(found["weight"], expected["weight"].numpy())
        assert caplog.messages == ["of the parts model, ema of the file, ema is read"]
        with pytest.raises(UserError, match="it has no part 'emma'; did you mean 'ema'"):
            read_bytes(file.getvalue(), part="emma")

    def test_a_file_made_by_hand(self):
        found = read_bytes(torch_zip(tensor(stride=(1, 2)), STORAGE))
        assert found["w"].tolist() == [[0, 2], [1, 3]]

    def test_no_damaged_file_is_read_or_ends_in_a_traceback(self):
        check_damage(torch_zip(tensor(), STORAGE))

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (b"version https://git-lfs.github.com/spec/v1", "neither a file of safetensors nor"),
            (b"\x89PNG\r\n\x1a\n", "neither a file of safetensors nor of torch.save"),
            (torch_zip(tensor(), STORAGE)[:-30], "its end is missing: copy or download it again"),
        ],
    )
    def test_another_file_and_one_cut_short_are_named_so(self, data, said):
        with pytest.raises(UserError, match=said):
            read_bytes(data)

    @pytest.mark.parity
    @pytest.mark.parametrize("new", [True, False])
    def test_nor_is_one_that_torch_wrote(self, new):
        torch = pytest.importorskip("torch")
        file = io.BytesIO()
        torch.save({"w": torch.arange(6.0)}, file, _use_new_zipfile_serialization=new)
        check_damage(file.getvalue())


def check_damage(data):
    """Cut short it is refused; with a bit changed it is read or refused."""
    for end in range(0, len(data) - 1, 7):
        with pytest.raises(UserError, match=r"can't read weights from .*x.pth"):
            read_bytes(data[:end])
    rng = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
        with contextlib.suppress(UserError):
            read_bytes(bytes(changed))


def old_format(tree=None, keys=("0",), numel=4, head=(0x1950A86A20F9469CFC6C, 1001), system=True):
    """The format before torch 1.6, with a pickle of one's own."""
    system = {"little_endian": system, "protocol_version": 1001, "type_sizes": {}}
    parts = [pickle.dumps(part, 2) for part in (*head, system)]
    parts += [tensor() if tree is None else tree, pickle.dumps(list(keys), 2)]
    return b"".join(parts) + numel.to_bytes(8, "little") + STORAGE[0][1]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (old_format()[:-1], "it ends within storage 0"),
        (old_format()[:200], "not enough data in stream"),
        (old_format(numel=2**62), "storage 0 has another size than its tensors"),
        (old_format(tensor(numel=2**30)), "storage 0 has another size than its tensors"),
        (old_format(tensor(size=(5,), stride=(1,))), "a tensor reaches beyond its storage"),
        (old_format(tensor(kind="ComplexFloatStorage")), "it names torch.ComplexFloatStorage"),
        (old_format(pickle.dumps(Path, 2)), "it names pathlib.Path, but only tensors are allowed"),
        (old_format(pickle.dumps([1], 2), ()), "it contains a list, not a dict of tensors"),
        (old_format(pickle.dumps({"w": 1}, 2), ()), "'w' is a int, not a tensor"),
        (old_format(keys=("7",)), "its list of storages is not that of its tensors"),
        (old_format(keys=()), "its list of storages is not that of its tensors"),
        (old_format(head=(3, 1001)), "it contains a int, not a dict"),
        (old_format(head=(0x1950A86A20F9469CFC6C, 1002)), "torch.save did not write it"),
        (old_format(system=False), "its numbers are big-endian"),
    ],
)
def test_a_damaged_file_of_the_old_format_ends_in_one_line(data, said):
    assert read_bytes(old_format())["w"].tolist() == [[0, 1], [2, 3]]
    with pytest.raises(UserError, match=f"can't read weights from .*x.pth: .*({said})") as caught:
        read_bytes(data)
    assert "\n" not in str(caught.value)


def test_what_is_written_is_read_and_lies_where_torch_lays_it(tmp_path):
    """At multiples of 64 bytes, as it does for files that are mapped."""
    arrays = {
        "plain": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "brain": np.arange(4, dtype=jnp.bfloat16),
        "scalar": np.array(2.5, np.float16),
        "empty": np.zeros((0, 3), np.float32),
        "yes": np.array([True, False]),
        "long": np.array([2**40, -1]),
    }
    write_torch(tmp_path / "w.pt", arrays)
    found = read_state_dict(tmp_path / "w.pt")
    assert found.keys() == arrays.keys()
    for name, expected in arrays.items():
        assert (found[name].shape, found[name].dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(np.asarray(found[name]), expected)
    plain = (tmp_path / "w.pt").read_bytes().index(arrays["plain"].tobytes())
    assert plain % 64 == 0
    with pytest.raises(UserError, match="w has the type complex64; known: "):
        write_torch(tmp_path / "w.pt", {"w": np.zeros(2, np.complex64)})
    with pytest.raises(UserError, match=r"can't write weights to .*nowhere.*: No such file"):
        write_torch(tmp_path / "nowhere" / "w.pt", arrays)
    assert [file.name for file in tmp_path.iterdir()] == ["w.pt"]


@pytest.mark.parity
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_what_is_written(tmp_path, mmap):
    torch = pytest.importorskip("torch")
    expected = {name: value.detach().clone() for name, value in state(torch).items()}
    torch.save(expected, tmp_path / "theirs.pt")
    write_torch(tmp_path / "ours.pt", read_state_dict(tmp_path / "theirs.pt"))
    found = torch.load(tmp_path / "ours.pt", weights_only=True, mmap=mmap)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


class Call:
    """Pickles as a call, which unpickling would make."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class TestRefusing:
    @pytest.mark.parametrize(
        "value",
        [
            Call(os.system, "touch harm"),
            Call(eval, "1"),
            {"w": Call(getattr, "", "join")},
            {"w": np.zeros(3)},
            {"w": OrderedDict},
        ],
    )
    @pytest.mark.parametrize("old", [False, True])
    def test_anything_but_tensors(self, value, old, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        data = pickle.dumps(value, 2)
        if old:
            parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
            data = b"".join(pickle.dumps(part, 2) for part in parts) + data
        with pytest.raises(UserError, match=r"it names \w+|not a tensor|pickle exhausted"):
            read_bytes(data if old else torch_zip(data))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("attribute", ["__code__", "__defaults__", "anything"])
    def test_one_file_can_not_change_how_the_next_is_read(self, attribute):
        # BUILD with a pair sets attributes of whatever is on the stack: here, of a stand-in.
        name = b"X" + len(attribute).to_bytes(4, "little") + attribute.encode()
        attack = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}" + name + b"Nstb."
        with pytest.raises(UserError):
            read_bytes(torch_zip(attack))
        assert read_bytes(torch_zip(tensor(), STORAGE))["w"].shape == (2, 2)

    @pytest.mark.parametrize(
        ("pickled", "message"),
        [
            (tensor(size=(2, 3)), "beyond its storage"),
            (tensor(size=(2, 2), stride=(3, 1)), "beyond its storage"),
            (tensor(offset=1), "beyond its storage"),
            (tensor(size=(1 << 30, 1 << 30), stride=(0, 0)), "beyond its storage"),
            (tensor(size=(2, 2), stride=(-2, 1)), "invalid sizes or strides"),
            (tensor(offset=-1), "invalid sizes or strides"),
            (tensor(size=(4,)), "no storage or no strides"),
            (tensor(numel=5), "ends within storage"),
            (tensor(kind="ComplexFloatStorage"), "names torch.ComplexFloatStorage"),
            (pickle.dumps([1], 2), "contains a list"),
            (pickle.dumps({"w": 1}, 2), "'w' is a int, not a tensor"),
            (pickle.dumps({"model": {}}, 2), "'model' is a dict"),
        ],
    )
    def test_tensors_that_are_none(self, pickled, message):
        with pytest.raises(UserError, match=message):
            read_bytes(torch_zip(pickled, STORAGE))

    def test_names_that_share_a_storage_too_often(self):
        """As tied weights do; but 1 MB by 26 names would take 26 MB, and more names more."""

        def shared(names: str) -> bytes:
            one = tensor((512, 512), (512, 1), numel=2**18)[3:-1]
            key = b"X\x01\x00\x00\x00"
            entries = [one.replace(key + b"w", key + name.encode()) for name in names]
            return torch_zip(b"\x80\x02}" + b"".join(entries) + b".", [("0", bytes(2**20))])

        tied = read_bytes(shared("abcd"))
        assert [tied[name].shape for name in "abcd"] == [(512, 512)] * 4
        with pytest.raises(UserError, match=r"its tensors need more than 4\d{6} bytes"):
            read_bytes(shared(string.ascii_lowercase))

    def test_a_zip_whose_entries_overlap(self):
        """Its directory has a small entry whose stated size is that of the file."""
        data = bytearray(torch_zip(tensor(), [*STORAGE, ("1", bytes(1000))]))
        entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"PK\x01\x02"))
        data[entry + 20 : entry + 28] = (len(data) - 100).to_bytes(4, "little") * 2
        with pytest.raises(UserError, match="its entries overlap"):
            read_bytes(bytes(data))

    def test_a_zip_with_two_entries_of_one_name(self):
        with pytest.warns(UserWarning, match="Duplicate name"):
            data = torch_zip(tensor(), [*STORAGE, ("0", bytes(16))])
        with pytest.raises(UserError, match="two of its entries have one name"):
            read_bytes(data)

    def test_a_zip_whose_numbers_are_damaged(self):
        data = torch_zip(tensor(), STORAGE).replace(STORAGE[0][1], bytes(16))
        with pytest.raises(UserError, match="the numbers of storage 0 are damaged"):
            read_bytes(data)

    def test_a_packed_zip(self):
        bomb = torch_zip(tensor(), [("0", bytes(10**6))], zipfile.ZIP_DEFLATED)
        with pytest.raises(UserError, match="compressed zip"):
            read_bytes(bomb)

    @pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x93NUMPY", pickle.dumps(3)])
    def test_other_files(self, data):
        with pytest.raises(UserError, match=r"can't read weights from .*x.pth"):
            read_bytes(data)


CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class TestFiles:
    def test_a_path_is_read_and_nothing_is_cached(self, tmp_path):
        (tmp_path / "a.pth").write_bytes(CONTENT)
        found = find_weights(str(tmp_path / "a.pth"), SHA256.upper(), str(tmp_path / "cache"))
        assert found.read_bytes() == CONTENT
        assert not (tmp_path / "cache").exists()

    def test_another_hash_is_refused_and_named(self, tmp_path):
        (tmp_path / "a.pth").write_bytes(b"other")
        found = hashlib.sha256(b"other").hexdigest()
        with pytest.raises(UserError, match=f"has sha256 {found}, not {SHA256}"):
            find_weights(str(tmp_path / "a.pth"), SHA256)

    def test_no_file(self, tmp_path):
        with pytest.raises(UserError, match=r"can't read the weights .*no\.pth: No such file"):
            find_weights(str(tmp_path / "no.pth"), SHA256)

    def test_an_address_is_fetched_once(self, tmp_path):
        served, cache = tmp_path / "served", tmp_path / "cache"
        served.mkdir()
        (served / "a.pth").write_bytes(CONTENT)
        asked = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args):
                asked.append(self.path)

        handler = functools.partial(Handler, directory=str(served))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            address = f"http://127.0.0.1:{server.server_port}/a.pth"
            for _ in range(2):
                assert find_weights(address, SHA256, str(cache)).read_bytes() == CONTENT
            assert asked == ["/a.pth"]
            with pytest.raises(UserError, match="404"):
                find_weights(address.replace("a.pth", "b.pth"), SHA256, str(cache))
            server.shutdown()
        assert [file.name for file in cache.iterdir()] == [f"{SHA256[:8]}-a.pth"]

    def test_what_has_another_hash_is_not_kept(self, tmp_path):
        (tmp_path / "a.pth").write_bytes(b"other")
        with pytest.raises(UserError, match=r"file:.*a\.pth has sha256"):
            find_weights((tmp_path / "a.pth").as_uri(), SHA256, str(tmp_path / "cache"))
        assert not list((tmp_path / "cache").iterdir())

    def test_a_damaged_file_in_the_cache_is_noticed(self, tmp_path):
        (tmp_path / "a.pth").write_bytes(CONTENT)
        address = (tmp_path / "a.pth").as_uri()
        find_weights(address, SHA256, str(tmp_path / "cache"))
        (kept,) = (tmp_path / "cache").iterdir()
        kept.write_bytes(b"damaged")
        with pytest.raises(UserError, match=kept.name):
            find_weights(address, SHA256, str(tmp_path / "cache"))
