"""Files from strangers: nothing in them is run, and none of them takes the machine with it."""

import ast
import gzip
import importlib
import inspect
import io
import json
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Mapping, Set
from pathlib import Path

import numpy as np
import pytest

from diffjax import choices, config_files
from diffjax.data import image_folder
from diffjax.data.archives import read_npz
from diffjax.data.idx import read_idx
from diffjax.data.tfds import _check_features
from diffjax.errors import UserError
from diffjax.evaluation.extractors.named import EXTRACTORS
from diffjax.reports.run_page import write_report
from diffjax.spec import TARGET, build, from_json, to_json
from experiments.flags import cli

ROOT = Path(__file__).parents[2]
LIBRARY = sorted((ROOT / "diffjax").rglob("*.py"))
PROGRAMS = sorted((ROOT / "experiments").rglob("*.py"))


# Saved configs.


@pytest.mark.parametrize(
    "location",
    [
        "os:system",
        "diffjax:os.system",
        "diffjax.runs.workdirs:subprocess",
        "diffjax.runs.workdirs:subprocess.run",
        "diffjax.runs.workdirs:git_revision",
        "diffjax.host.files:write_whole",
        "diffjax.runs.workdirs:write_whole",
        "diffjax.host.files:write_json",
        "diffjax.host.storage:make_writable",
        "diffjax.loop.loop:train",
        "diffjax.host.watchdog:_report",
        "diffjax.runs.load:load",
        "diffjax.pretrained.downloads:find_weights",
        "diffjax.reports.plots:save_png",
        "diffjax.reports.run_page:write_report",
        "diffjax.spec:build",
        "diffjax.data.sources:np.load",
        "diffjax.data.sources:np",
        "diffjax.data.sources:hashlib",
        "diffjax.data.archives:os",
        "diffjax.data.archives:_read_array",
        "diffjax.data.sources:digits.__globals__",
        "diffjax.data.sources:__loader__",
        "diffjax.data/../../x:f",
        "diffjax.data...x:f",
        "diffjax.data",
        "diffjax.dataset:x",
        "diffjax",
        ":",
        "",
        None,
        3,
        ["diffjax.data.sources:digits"],
    ],
)
@pytest.mark.parametrize("place", ["top", "list", "deep"])
def test_a_saved_config_names_parts_of_experiments_alone(location, place):
    tree = {TARGET: location, "path": "/tmp/x"}
    tree = {"top": tree, "list": [[tree]], "deep": {"a": {"b": tree}}}[place]
    with pytest.raises(UserError):
        build(from_json(json.dumps(tree)))


def named_in(tree) -> set[str]:
    """All targets in plain JSON."""
    if isinstance(tree, list):
        return set().union(*map(named_in, tree)) if tree else set()
    if not isinstance(tree, dict):
        return set()
    own = {tree[TARGET]} if TARGET in tree else set()
    return own.union(*map(named_in, tree.values()))


def test_whatever_a_config_may_choose_can_be_saved_and_read():
    """Every table of choices, every extractor, and every config file."""
    tables = [value for value in vars(choices).values() if isinstance(value, Mapping)]
    rows = [row for table in [*tables, EXTRACTORS] for row in table.values()]
    configs = [row for row in rows if hasattr(row, "to_dict")]
    assert len(configs) > 60
    begun = (name for name in cli.config_names() if name != "finetune")  # which is a pipeline's
    configs += [config_files.load(f"configs/{name}.py") for name in begun]
    for config in configs:
        assert to_json(from_json(to_json(config))) == to_json(config)


def test_what_a_saved_config_may_name_writes_and_starts_nothing():
    """Read from the source of every module that a name may be in."""
    checked = 0
    for path in LIBRARY:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        try:
            from_json(json.dumps({TARGET: f"{module}:x"}))
        except UserError:
            continue
        checked += 1
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
                assert not names & {"subprocess", "shutil", "socket", "ctypes", "urllib"}, module
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("write_text", "write_bytes", "unlink", "system"), module
    assert checked > 40


# Code in files.


def runs_what_it_reads(
    source: str, knows_tensors_alone: bool = False, may_import: Set[str] = frozenset()
) -> None:
    """Fails on a pickle, on eval and its like, and on archives unpacked into folders."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile", "__import__")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr not in ("extractall", "unpack_archive")
            if isinstance(node.func.value, ast.Name):
                call = f"{node.func.value.id}.{node.func.attr}"
                assert call not in ("pickle.load", "pickle.loads", "yaml.load", "np.load")
                assert call not in ("numpy.load", "torch.load", "jnp.load", "pandas.read_pickle")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        found = {module.split(".")[0] for module in modules} & (PICKLES - may_import)
        assert not found or (knows_tensors_alone and isinstance(node, ast.Import))


PICKLES = {
    "tarfile", "pickle", "_pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve",
}  # fmt: skip


# They use opcodes, and unpicklers that build tensors alone.
OWN_UNPICKLERS = {"torch_files.py", "persistent_pickles.py", "torch_writer.py"}


# Members of archives that are read in memory, and written nowhere by their own names.
ARCHIVES = {"prepare_emoji.py": frozenset({"tarfile"})}


def test_there_is_no_way_to_run_what_is_read():
    for path in LIBRARY + PROGRAMS:
        own = path.name in OWN_UNPICKLERS
        try:
            runs_what_it_reads(path.read_text(), own, ARCHIVES.get(path.name, frozenset()))
        except AssertionError as found:
            raise AssertionError(f"in {path.relative_to(ROOT)}") from found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "from pickle import *",
        "from joblib.numpy_pickle import load",
        "import numpy\nnumpy.load('x')",
        "np.load('x')",
        "eval('x')",
        "f.extractall('x')",
        "read('x', allow_pickle=True)",
        "read('x', allow_pickle=asked)",
    ],
)
def test_that_guard_notices(source):
    with pytest.raises(AssertionError):
        runs_what_it_reads(source)


def test_nothing_else_than_the_config_loader_imports_by_name():
    found = {
        path.name
        for path in LIBRARY
        if "import_module(" in path.read_text() and "importlib" in path.read_text()
    }
    # An engine and a tracker import a package that is named in the library.
    assert found == {"base.py", "engines.py", "spec.py"}
    assert "_check_packages" in inspect.getsource(importlib.import_module("diffjax.spec").from_json)


class Boom:
    def __reduce__(self):
        return (print, ("boom",))


def test_an_npz_with_a_pickle_is_refused(capsys):
    file = io.BytesIO()
    np.savez(file, image=np.array([Boom()], object))
    with pytest.raises(UserError, match="holds objects, not numbers"):
        read_npz(file.getvalue(), "x.npz")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
def test_a_tfds_set_imports_no_module_of_its_own(tmp_path, key):
    (tmp_path / "features.json").write_text(
        json.dumps({"featuresDict": {"features": {"image": {key: "evil.module.Class"}}}})
    )
    with pytest.raises(UserError, match=r"'evil\.module\.Class', and only classes of TFDS"):
        _check_features(tmp_path)
    # Twice the same key: readers differ in which they take.
    twice = f'{{"{key}": "evil.module.Class", "{key}": "tensorflow_datasets.core.X"}}'
    (tmp_path / "features.json").write_text(twice)
    with pytest.raises(UserError, match="only classes of TFDS"):
        _check_features(tmp_path)
    (tmp_path / "features.json").write_text(f'{{"{key}": "tensorflow_datasets.core.X"}}')
    _check_features(tmp_path)


# Sizes that are lies.


def npy(shape, dtype="|u1", content=b"") -> bytes:
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def archive_of(entry: bytes, compression=zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("image.npy", entry)
    return file.getvalue()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (npy((10**12,)), "announces 1000000000000 bytes, more than it holds"),
        (npy((10**9, 10**9, 10**9)), "more than it holds"),
        (npy((-1,), content=b"0"), "more than it holds"),
        (npy((-3, -3), content=b"0"), "more than it holds"),
        (npy((3,), content=b"01"), "announces 3 bytes and holds 2"),
        (npy((3,), content=b"0123"), "announces 3 bytes and holds 4"),
        (npy((1,), "|O", b"x" * 8), "holds objects"),
        (npy((1,), "junk"), "can't read arrays"),
        (npy(("a",)), "can't read arrays"),
        (b"", "can't read arrays"),
    ],
)
def test_a_header_that_lies(entry, said):
    with pytest.raises(UserError, match=said):
        read_npz(archive_of(entry), "x.npz")


def test_an_archive_that_unpacks_to_gigabytes_is_refused():
    """Its directory shows it: 3 GB in 3 MB are refused before they are unpacked."""
    data = bytearray(archive_of(npy((10,), content=b"0" * 10)))
    directory = data.rindex(b"PK\x01\x02")
    data[directory + 24 : directory + 28] = struct.pack("<I", 3 * 2**30)
    with pytest.raises(UserError, match=r"would unpack from \d+ to 3221225472 bytes"):
        read_npz(bytes(data), "x.npz")


def test_an_archive_that_unpacks_to_more_than_it_says():
    data = bytearray(archive_of(npy((10,), content=bytes(10**6))))
    directory = data.rindex(b"PK\x01\x02")
    data[directory + 24 : directory + 28] = struct.pack("<I", 200)
    with pytest.raises(UserError):
        read_npz(bytes(data), "x.npz")


def test_an_idx_file_that_unpacks_to_hundreds_of_megabytes_is_refused(tmp_path):
    """All of its zeros are there: 300 MB in 290 kB."""
    file, image = tmp_path / "bomb-images-idx3-ubyte.gz", gzip.compress(bytes(10**6))
    header = bytes((0, 0, 8, 3)) + struct.pack(">3I", 300, 1000, 1000)
    file.write_bytes(gzip.compress(header) + 300 * image)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"would unpack from \d{6} to 300000000 bytes"):
        read_idx(file, 3)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()
    # What is not packed can't hold more than its size.
    plain = tmp_path / "plain-images-idx3-ubyte"
    plain.write_bytes(bytes((0, 0, 8, 3)) + struct.pack(">3I", 4, 4, 4) + bytes(40))
    with pytest.raises(UserError, match="announces 64 bytes, more than it can hold"):
        read_idx(plain, 3)


def test_arrays_come_back_as_they_were():
    arrays = {
        "plain": np.arange(6.0).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "text": np.array("some text"),
        "empty": np.zeros((0, 3), np.float16),
    }
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
    found = read_npz(file.getvalue(), "x.npz")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def png(width: int, height: int) -> bytes:
    """A picture of a few hundred bytes, whatever size it claims."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "size", [(100_000, 100_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1), (8001, 8000), (0, 5)]
)
def test_pictures_that_claim_an_absurd_size(tmp_path, size):
    (tmp_path / "run" / "samples").mkdir(parents=True)
    for name in ("step_00000001", "neighbours"):
        (tmp_path / "run" / "samples" / f"{name}.png").write_bytes(png(*size))
        with pytest.raises(UserError, match=rf"{name}\.png is not a readable PNG"):
            write_report(tmp_path / "run")
        (tmp_path / "run" / "samples" / f"{name}.png").unlink()
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(png(*size))
    with pytest.raises(UserError, match=r"a\.png|b\.png"):
        image_folder(str(tmp_path), image_size=4, test_fraction=0.5).train[0]
