"""NVIDIA's pickles: networks are read from them, and nothing of them is executed."""

import re

import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.pretrained.persistent_pickles import is_persistent_pickle, read_persistent_pickle
from tests.support.persistent_pickles import Call, dumped, module, persistent, storage_bytes, tensor

W = np.arange(6, dtype=np.float16).reshape(2, 3)
GAIN = np.float32([[2.5]]).reshape(())


def network(**settings):
    layer = module("Layer", {"weight": W, "bias": None}, {"freqs": np.arange(3.0)})
    blocks = Call("torch.nn.modules.container.ModuleDict", state={"_modules": {"8x8_conv": layer}})
    return module("Net", {"gain": GAIN}, modules={"enc": blocks}, **settings)


RECONSTRUCT = "torch_utils.persistence._reconstruct_persistent_obj"


def of_tensor(view):
    return {"ema": persistent("Net", {"_buffers": {"w": view}})}


def read(data, tmp_path, part="ema"):
    path = tmp_path / "x.pkl"
    path.write_bytes(data)
    return read_persistent_pickle(path, part)


def test_tensors_have_the_paths_of_their_modules_and_settings_are_read(tmp_path):
    statistics = Call("numpy._core.multiarray._reconstruct", 1)
    encoder = persistent("Encoder", {"scale": statistics})
    tree = {"encoder": encoder, "ema": network(mult=[1, 2], rate=0.5), "other": 3}
    found = read(dumped(tree), tmp_path)
    assert found.settings == {"mult": [1, 2], "rate": 0.5}
    assert found.tensors.keys() == {"gain", "enc.8x8_conv.weight", "enc.8x8_conv.freqs"}
    weight = found.tensors["enc.8x8_conv.weight"]
    assert (weight.shape, weight.dtype) == ((2, 3), np.float16)
    np.testing.assert_array_equal(weight, W)
    assert np.asarray(found.tensors["gain"]) == 2.5
    assert is_persistent_pickle(tmp_path / "x.pkl")
    (tmp_path / "old.pth").write_bytes(storage_bytes(W))
    assert not is_persistent_pickle(tmp_path / "old.pth")


class TestHostileFiles:
    @pytest.mark.parametrize(
        ("tree", "said"),
        [
            ({"ema": Call("os.system", "true")}, "it names os.system, but only tensors are"),
            ({"ema": Call("builtins.exec", "1")}, "it names builtins.exec, but only tensors are"),
            ([1], "it contains a list, not a dict"),
            ({"emma": network()}, "it has no network 'ema'; did you mean 'emma'"),
            ({"ema": 3}, "it has no network 'ema'"),
            ({"ema": persistent("Net", {"_parameters": [W]})}, "_parameters is a list, not a dict"),
            ({"ema": persistent("Net", {"_modules": {"a": 3}})}, "a is a int, no module"),
            ({"ema": persistent("Net", {"_buffers": {"a": 3}})}, "a is a int, not a tensor"),
            ({"ema": Call(RECONSTRUCT, {"type": "function"})}, "not described by its class"),
            ({"ema": Call(RECONSTRUCT, {"type": "class"})}, "without a class or a state"),
            (of_tensor(tensor(W, size=(3, 3))), "a tensor reaches beyond its storage"),
            (of_tensor(tensor(W, offset=-1)), "a tensor has invalid sizes or strides"),
            (of_tensor(tensor(W, storage=b"")), "can't read weights from"),
            (of_tensor(tensor(W, storage=storage_bytes(W)[:-1])), "it ends within storage 7"),
            (of_tensor(tensor(W, storage=storage_bytes(W) + b"0")), "it ends within storage 7"),
            (of_tensor(tensor(W, storage=dumped(3))), "can't read weights from"),
        ],
    )
    def test_is_refused_in_one_line(self, tree, said, tmp_path):
        with pytest.raises(UserError, match=re.escape(said)) as error:
            read(dumped(tree), tmp_path)
        assert "\n" not in str(error.value)

    def test_modules_within_themselves_and_in_many_places(self, tmp_path):
        layer = module("Layer", {"weight": W})
        with pytest.raises(UserError, match=r"the module b occurs twice"):
            read(dumped({"ema": module("Net", modules={"a": layer, "b": layer})}), tmp_path)
        state = {}
        state["_modules"] = {"a": Call("torch.nn.modules.container.ModuleList", state=state)}
        with pytest.raises(UserError, match="the module a occurs twice"):
            read(dumped({"ema": persistent("Net", state)}), tmp_path)

    def test_small_storages_do_not_become_large_arrays(self, tmp_path):
        storage = tensor(np.zeros(10_000, np.float32), size=(100, 100), stride=(0, 0))
        many = {f"w{i}": storage for i in range(5)}
        with pytest.raises(UserError, match="its tensors need more than"):
            read(dumped({"ema": persistent("Net", {"_buffers": many})}), tmp_path)

    def test_every_truncated_file(self, tmp_path):
        data = dumped({"ema": network()})
        for end in range(0, len(data) - 1, 7):
            with pytest.raises(UserError, match="can't read weights from"):
                read(data[:end], tmp_path)
        with pytest.raises(UserError, match="No such file"):
            read_persistent_pickle(tmp_path / "none.pkl")


@pytest.mark.parity
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_modules_that_torch_pickles_are_read(protocol, tmp_path):
    """Modules of torch itself, and tensors as torch pickles them."""
    torch = pytest.importorskip("torch")
    inner = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3)).half()
    shared = torch.nn.ModuleDict({"a": inner, "b": torch.nn.ModuleList([torch.nn.Linear(3, 2)])})
    data = dumped({"ema": persistent("Net", shared.__dict__)}, protocol)
    found = read(data, tmp_path).tensors
    expected = shared.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value.numpy())
