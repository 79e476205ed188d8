"""What of this machine and its Python diffjax would use, what is wrong, and the line that mends it.

  diffjax doctor
  python -m experiments.doctor

It starts JAX in a process of its own, for a minute at most, and changes nothing. The exit status is
0 if training can run, and 2 if something stops it.
"""

import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from diffjax.host.diagnosis import PACKAGES, SLOW, Device, Facts, described, findings

# It has to run where JAX can't be imported, so it uses none of the other executables' code.
_SECONDS = 60
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_X64", "JAX_PLATFORMS",
    "LD_LIBRARY_PATH", "XLA_CLIENT_MEM_FRACTION", "XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
)  # fmt: skip
_ASK = """
import json, jax
print(json.dumps([
    [d.device_kind, d.platform, ((d.memory_stats() or {}).get("bytes_limit")
     if d.platform != "cpu" else None)]
    for d in jax.local_devices()
]))
"""


def main(argv: Sequence[str]) -> int:
    """Prints what is there and what is wrong; returns the exit status."""
    if argv:
        wanted = {"--help", "-help", "-h", "--helpfull"}.intersection(argv)
        print(USAGE.strip() if wanted else f"error: unexpected {argv[0]!r}; doctor has no flags",
              file=sys.stdout if wanted else sys.stderr)  # fmt: skip
        return 0 if wanted else 2
    facts = collected()
    rows, wrong = described(facts), findings(facts)
    width = max(map(len, rows))
    for name, value in rows.items():
        print(textwrap.fill(f"{name:<{width}}  {value}", 100, subsequent_indent=" " * (width + 2)))
    for found in wrong:
        print(f"\n{'wrong' if found.stops else 'note'}: {found.problem}\n  mend: {found.mend}")
    if not wrong:
        print("\nnothing is wrong")
    return 2 if any(found.stops for found in wrong) else 0


def collected() -> Facts:
    """The facts of this machine and this Python."""
    versions = {
        re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower(): one.version
        for one in metadata.distributions()
        if one.metadata["Name"]
    }
    used = _gpu_memory_in_use()  # before JAX takes some
    devices, error = _devices()
    cache = Path(
        os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path("~/.cache/diffjax").expanduser()
    )
    folder = Path.cwd()
    processor, features = _processor()
    shm = Path("/dev/shm")
    return Facts(
        python=sys.version_info[:3],
        versions=versions,
        requirements={
            name: _requirements(name) for name in ("diffjax", *PACKAGES) if name in versions
        },
        extras=_extras(),
        devices=devices,
        jax_error=error,
        nvidia_driver=_nvidia_driver(),
        nvidia_used_bytes=used,
        tpu_chips=_tpu_chips(),
        libtpu=sorted({str(found) for path in sys.path if (found := _libtpu(path)) is not None}),
        cpu=processor,
        cpu_features=features,
        machine=platform.machine(),
        cores=_cores(),
        load=os.getloadavg()[0],
        memory_bytes=_memory(),
        shared_bytes=shutil.disk_usage(shm).total if shm.is_dir() else None,
        cache=str(cache),
        cache_error=_why_not_writable(cache),
        cache_free_bytes=shutil.disk_usage(_existing(cache)).free,
        folder=str(folder),
        folder_error=_why_not_writable(folder),
        free_bytes=shutil.disk_usage(folder).free,
        environment={name: os.environ[name] for name in _VARIABLES if name in os.environ},
    )


def _requirements(package: str) -> list[str]:
    """A package's requirements without those of its extras."""
    return [text for text in metadata.requires(package) or [] if "extra ==" not in text]


def _extras() -> dict[str, list[str]]:
    """The requirements of each extra of diffjax."""
    try:
        names = metadata.metadata("diffjax").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return {}
    return {name: _of_extra("diffjax", name) for name in names}


def _of_extra(package: str, extra: str) -> list[str]:
    """The requirements of a package's extra; `jax[cuda13]` in it brings those of that extra too."""
    found = []
    try:
        texts = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return found
    for text in texts:
        needed = Requirement(text)
        holds = [needed.marker is None or needed.marker.evaluate({"extra": e}) for e in ("", extra)]
        if holds == [False, True]:
            found.append(str(needed))
            found += [each for one in needed.extras for each in _of_extra(needed.name, one)]
    return found


def _devices() -> tuple[list[Device], str]:
    """JAX's devices, or why there are none."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return [], SLOW
    if done.returncode:
        return [], (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    return [Device(*fields) for fields in json.loads(done.stdout.strip().splitlines()[-1])], ""


def _nvidia_driver() -> str:
    found = re.search(r"Module.*?\s(\d+[.\d]*)\s", _text("/proc/driver/nvidia/version"))
    return found[1] if found else ""


def _gpu_memory_in_use() -> list[int]:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [int(line) * 2**20 for line in done.stdout.split() if line.isdecimal()]


def _tpu_chips() -> int:
    """Number of PCI devices of Google that are TPUs; the others are network cards and disks."""
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return sum(
        _text(vendor).strip() == "0x1ae0"
        and _text(vendor.with_name("device")).strip()
        in ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")
        for vendor in vendors
    )


def _libtpu(path: str) -> Path | None:
    folder = Path(path or ".") / "libtpu"
    return folder.resolve() if (folder / "libtpu.so").is_file() else None


def _processor() -> tuple[str, frozenset[str]]:
    text = _text("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.+)", text)
    flags = re.search(r"(?:flags|Features)\s*:\s*(.+)", text)
    return (
        name[1].strip() if name else platform.processor(),
        frozenset(flags[1].split() if flags else ()),
    )


def _cores() -> int:
    """The cores that this process may use: of its affinity and its container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota, _, period = _text("/sys/fs/cgroup/cpu.max").partition(" ")
    limit = int(quota) // int(period) if quota.isdecimal() and period.strip().isdecimal() else 0
    return min(allowed or 1, limit or allowed or 1)


def _memory() -> int:
    """The bytes that this process may use: of the machine, its container and its own limit."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    container = _text("/sys/fs/cgroup/memory.max").strip()
    own = resource.getrlimit(resource.RLIMIT_AS)[0]
    sizes += [int(container)] if container.isdecimal() else []
    sizes += [own] if own != resource.RLIM_INFINITY else []
    return min(sizes)


def _existing(folder: Path) -> Path:
    """The nearest folder above that exists."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def _why_not_writable(folder: Path) -> str:
    """Why a file can't be made in a folder, or in the nearest one above; empty if it can."""
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


USAGE = __doc__ or ""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
