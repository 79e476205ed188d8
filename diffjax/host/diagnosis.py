"""From facts about a machine and its Python packages to what is wrong, and the line that mends it.

`experiments.doctor` collects the facts; the functions here depend on nothing else.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

GIB = 2**30
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
"""The packages whose versions are listed first, and have to fit each other."""
SLOW = "JAX did not start within a minute"
"""The error of a start that was given up; a busy machine is no reason to install anything."""
_CUDA13_DRIVER, _CUDA12_DRIVER = 580, 525
_LEAST_SHARED_BYTES, _LEAST_FREE_BYTES, _LEAST_CACHE_BYTES = GIB, 5 * GIB, GIB
_CUDA_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")


@dataclass(frozen=True)
class Device:
    """A device that JAX uses.

    Attributes:
        kind: as `NVIDIA H100 80GB HBM3`.
        platform: `cpu`, `gpu` or `tpu`.
        memory_bytes: what JAX may allocate; None if it does not say.
    """

    kind: str
    platform: str
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Facts:
    """What a machine and its Python have.

    Attributes:
        python: version, as `(3, 12, 4)`.
        versions: the versions of installed packages, by normalised name.
        requirements: the requirements of installed packages, by the package that has them.
        extras: the extras of diffjax, with the requirements of each, those of extras inside it
            included.
        devices: those of JAX.
        jax_error: why JAX found no devices; empty if it did.
        nvidia_driver: version of the kernel's NVIDIA driver; empty without one.
        nvidia_used_bytes: memory of each NVIDIA GPU that other programs hold.
        tpu_chips: number of TPU chips of the machine.
        libtpu: folders from which libtpu can be imported.
        cpu: name of the processor.
        cpu_features: flags of the processor, as `avx2`.
        machine: architecture, as `x86_64`.
        cores: that this process may use.
        load: mean number of programs that wanted to run in the last minute.
        memory_bytes: that this process may use.
        shared_bytes: size of /dev/shm; None if there is none.
        cache: folder of compiled programs.
        cache_error: why it can't be written; empty if it can.
        cache_free_bytes: free space of its disk.
        folder: where runs are written.
        folder_error: why it can't be written; empty if it can.
        free_bytes: free space of its disk.
        environment: variables that change what JAX does.
    """

    python: tuple[int, int, int] = (3, 11, 0)
    versions: Mapping[str, str] = field(default_factory=dict)
    requirements: Mapping[str, Sequence[str]] = field(default_factory=dict)
    extras: Mapping[str, Sequence[str]] = field(default_factory=dict)
    devices: Sequence[Device] = ()
    jax_error: str = ""
    nvidia_driver: str = ""
    nvidia_used_bytes: Sequence[int] = ()
    tpu_chips: int = 0
    libtpu: Sequence[str] = ()
    cpu: str = ""
    cpu_features: frozenset[str] = frozenset()
    machine: str = "x86_64"
    cores: int = 1
    load: float = 0.0
    memory_bytes: int = 0
    shared_bytes: int | None = None
    cache: str = ""
    cache_error: str = ""
    cache_free_bytes: int = 0
    folder: str = "."
    folder_error: str = ""
    free_bytes: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        problem: what it is, in one line.
        mend: the line that mends it: a command, or what to do.
        stops: whether training can't run with it; otherwise it is slow or may fail later.
    """

    problem: str
    mend: str
    stops: bool = True


def findings(facts: Facts) -> list[Finding]:
    """Everything that is wrong; what stops training comes first.

    Example:
        >>> facts = Facts(versions={"jax": "0.10.2", "jaxlib": "0.10.2"}, cache_error="read-only",
        ...               cache="/cache", devices=[Device("cpu", "cpu")], free_bytes=100 * GIB)
        >>> [found.mend for found in findings(facts)]
        ['export JAX_COMPILATION_CACHE_DIR=FOLDER, with a folder that you may write']
    """
    found = [one for check in CHECKS for one in check(facts)]
    return sorted(found, key=lambda one: not one.stops)


def _python(facts: Facts) -> Iterator[Finding]:
    if facts.python < (3, 11):
        yield Finding(
            f"Python {_dotted(facts.python)} is too old: diffjax needs 3.11 or newer",
            "uv venv --python 3.12, or python3.12 -m venv FOLDER; then install diffjax there",
        )


def _versions(facts: Facts) -> Iterator[Finding]:
    """Requirements of installed packages that the installed versions do not fulfil."""
    for package, texts in facts.requirements.items():
        for needed in _needed(texts):
            installed = facts.versions.get(_normal(needed.name))
            if installed is None:
                yield Finding(
                    f"{package} needs {needed.name}, which is not installed",
                    _install(needed),
                )
            elif not needed.specifier.contains(installed, prereleases=True):
                yield Finding(
                    f"{package} {facts.versions.get(package, '')} needs "
                    f"{needed.name}{needed.specifier}, but {installed} is installed",
                    _install(needed),
                )


def _plugins(facts: Facts) -> Iterator[Finding]:
    """JAX's plugins for NVIDIA: the same version as jaxlib, and one CUDA only."""
    jaxlib = facts.versions.get("jaxlib")
    here = [name for name in _CUDA_PLUGINS if name in facts.versions]
    for name in here:
        version = facts.versions[name]
        if jaxlib is not None and _release(version) != _release(jaxlib):
            cuda = re.sub(r"\D", "", name)
            yield Finding(
                f"{name} {version} does not fit jaxlib {jaxlib}",
                f"pip install 'jax[cuda{cuda}]=={facts.versions.get('jax', jaxlib)}'",
            )
    if len(here) > 1:
        yield Finding(
            "plugins for CUDA 12 and for CUDA 13 are installed: JAX may load either of them",
            "pip uninstall -y jax-cuda12-plugin jax-cuda12-pjrt",
        )


def _no_devices(facts: Facts) -> Iterator[Finding]:
    if not facts.jax_error:
        return
    if facts.jax_error == SLOW and facts.load > 2 * facts.cores:
        why = f"{facts.load:.0f} programs compete for {facts.cores} cores"
        yield Finding(f"{SLOW}: {why}", "diffjax doctor, when the machine is less busy")
        return
    if "in use" in facts.jax_error or "lockfile" in facts.jax_error:
        mend = "end the process that uses the TPU: sudo lsof -w /dev/accel* /dev/vfio/*"
    elif facts.environment.get("JAX_PLATFORMS"):
        mend = "unset JAX_PLATFORMS"
    else:
        mend = "pip install --force-reinstall 'jax[cpu]', or jax[cuda13], or jax[tpu]"
    yield Finding(f"JAX finds no device: {facts.jax_error}", mend)


def _nvidia(facts: Facts) -> Iterator[Finding]:
    """A GPU of NVIDIA that JAX does not use, and what disturbs one that it does."""
    if not facts.nvidia_driver:
        return
    if not any(device.platform == "gpu" for device in facts.devices):
        yield _unused_gpu(facts)
    elif "cuda" in facts.environment.get("LD_LIBRARY_PATH", "").lower():
        yield Finding(
            "LD_LIBRARY_PATH names another CUDA, which hides the one that pip installed for JAX",
            "unset LD_LIBRARY_PATH",
            stops=False,
        )
    for index, used in enumerate(facts.nvidia_used_bytes):
        if used > GIB:
            yield Finding(
                f"other programs hold {_gib(used)} of GPU {index}: JAX takes three quarters of "
                "a GPU when it starts, and fails if that is not free",
                "end them (nvidia-smi lists them), or export XLA_CLIENT_MEM_FRACTION=0.5",
                stops=False,
            )


def _unused_gpu(facts: Facts) -> Finding:
    driver = int(re.match(r"\d*", facts.nvidia_driver)[0] or 0)  # pyright: ignore
    platforms = facts.environment.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return Finding(
            f"JAX_PLATFORMS={platforms} hides the GPU", "unset JAX_PLATFORMS", stops=False
        )
    if driver < _CUDA12_DRIVER:
        return Finding(
            f"the NVIDIA driver {facts.nvidia_driver} is too old for JAX, which needs "
            f"{_CUDA12_DRIVER} or newer: training runs on the CPU",
            "sudo apt install nvidia-driver-580, or your system's line for a newer driver",
            stops=False,
        )
    cuda = 13 if driver >= _CUDA13_DRIVER else 12
    if f"jax-cuda{cuda}-plugin" not in facts.versions:
        return Finding(
            f"there is an NVIDIA driver ({facts.nvidia_driver}), but JAX has no plugin for CUDA "
            f"{cuda}: training runs on the CPU",
            f"pip install 'jax[cuda{cuda}]=={facts.versions.get('jax', '')}'".replace("=='", "'"),
            stops=False,
        )
    if facts.environment.get("CUDA_VISIBLE_DEVICES", "unset") in ("", "-1"):
        return Finding("CUDA_VISIBLE_DEVICES hides all GPUs", "unset CUDA_VISIBLE_DEVICES", False)
    return Finding(
        f"JAX does not use the GPU, though driver {facts.nvidia_driver} and plugin are there",
        "nvidia-smi; then python -c 'import jax; jax.devices(\"cuda\")', which prints the reason",
        stops=False,
    )


def _tpu(facts: Facts) -> Iterator[Finding]:
    several = [name for name in ("libtpu", "libtpu-nightly") if name in facts.versions]
    if len(several) > 1 or len(facts.libtpu) > 1:
        where = ", ".join(facts.libtpu) or "one folder"
        yield Finding(
            f"there are two libtpu ({where}): which of them is loaded depends on their order",
            "pip uninstall -y libtpu libtpu-nightly && pip install 'jax[tpu]'",
        )
    on_tpu = any(device.platform == "tpu" for device in facts.devices)
    if facts.tpu_chips and not on_tpu and not facts.jax_error:
        hidden = facts.environment.get("JAX_PLATFORMS", "")
        mend = "unset JAX_PLATFORMS" if hidden else "pip install 'jax[tpu]'"
        yield Finding(
            f"there are {facts.tpu_chips} TPU chips, but training runs on the CPU", mend, False
        )


def _processor(facts: Facts) -> Iterator[Finding]:
    if facts.machine == "x86_64" and facts.cpu_features and "avx" not in facts.cpu_features:
        yield Finding(
            f"{facts.cpu or 'the processor'} has no AVX, which jaxlib's wheels need",
            "use another machine, or build jaxlib: docs.jax.dev/en/latest/developer.html",
        )


def _disks(facts: Facts) -> Iterator[Finding]:
    if facts.folder_error:
        yield Finding(
            f"runs can't be written to {facts.folder}: {facts.folder_error}",
            "--workdir=FOLDER, with a folder that you may write",
        )
    elif facts.free_bytes < _LEAST_FREE_BYTES:
        yield Finding(
            f"{_gib(facts.free_bytes)} are free in {facts.folder}: each checkpoint takes 16 bytes "
            "a parameter, and three are kept",
            "delete old runs, or --workdir=FOLDER on a larger disk",
            stops=False,
        )
    if facts.cache_error:
        yield Finding(
            f"compiled programs can't be kept in {facts.cache} ({facts.cache_error}): every start "
            "compiles again",
            "export JAX_COMPILATION_CACHE_DIR=FOLDER, with a folder that you may write",
            stops=False,
        )
    elif facts.cache and facts.cache_free_bytes < _LEAST_CACHE_BYTES:
        yield Finding(
            f"{_gib(facts.cache_free_bytes)} are free for compiled programs in {facts.cache}",
            f"rm -r {facts.cache}, or export JAX_COMPILATION_CACHE_DIR=FOLDER on a larger disk",
            stops=False,
        )


def _shared_memory(facts: Facts) -> Iterator[Finding]:
    """GPUs of one machine exchange arrays there where they have no direct links."""
    several = sum(device.platform == "gpu" for device in facts.devices) > 1
    if several and facts.shared_bytes is not None and facts.shared_bytes < _LEAST_SHARED_BYTES:
        yield Finding(
            f"/dev/shm has {_gib(facts.shared_bytes)}: NCCL needs more to exchange arrays between "
            "GPUs",
            "docker run --shm-size=8g …, or sudo mount -o remount,size=8G /dev/shm",
            stops=False,
        )


CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _python, _versions, _plugins, _no_devices, _nvidia, _tpu, _processor, _disks, _shared_memory,
)  # fmt: skip


def described(facts: Facts) -> dict[str, str]:
    """What is there, as lines by name."""
    first = [f"{name} {facts.versions[name]}" for name in PACKAGES if name in facts.versions]
    missing = [name for name in PACKAGES if name not in facts.versions]
    rows = {
        "Python": _dotted(facts.python),
        "packages": ", ".join([*first, *(f"{name} missing" for name in missing)]),
        "devices": _devices(facts.devices) or "none",
    }
    if facts.nvidia_driver:
        rows["NVIDIA driver"] = facts.nvidia_driver
    if facts.tpu_chips:
        rows["TPU chips"] = str(facts.tpu_chips)
    vectors = [name for name in _VECTORS if name in facts.cpu_features]
    rows["processor"] = ", ".join(
        filter(None, [facts.cpu or facts.machine, f"{facts.cores} cores", *vectors])
    )
    rows["memory"] = _gib(facts.memory_bytes)
    if facts.shared_bytes is not None:
        rows["/dev/shm"] = _gib(facts.shared_bytes)
    rows["compiled programs"] = f"{facts.cache} ({_gib(facts.cache_free_bytes)} free)"
    rows["runs"] = f"{facts.folder} ({_gib(facts.free_bytes)} free)"
    for name, state in extras(facts).items():
        rows.setdefault("extras", "")
        rows["extras"] += f"{', ' if rows['extras'] else ''}{name}{state}"
    if facts.environment:
        rows["environment"] = " ".join(f"{k}={v}" for k, v in facts.environment.items())
    return rows


_VECTORS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


def extras(facts: Facts) -> dict[str, str]:
    """Each extra of diffjax: empty if its packages are there, else `" missing"`.

    Example:
        >>> extras(Facts(versions={"a": "1.0"}, extras={"x": ["A>=1"], "y": ["a", "b"]}))
        {'x': '', 'y': ' missing'}
    """
    found = {}
    for name, texts in facts.extras.items():
        there = (_normal(Requirement(text).name) in facts.versions for text in texts)
        found[name] = "" if all(there) else " missing"
    return found


def _devices(devices: Sequence[Device]) -> str:
    counts: dict[Device, int] = {}
    for device in devices:
        counts[device] = counts.get(device, 0) + 1
    return ", ".join(
        f"{count} × {device.kind} ({device.platform}"
        + (f", {_gib(device.memory_bytes)} each)" if device.memory_bytes else ")")
        for device, count in counts.items()
    )


def _needed(texts: Sequence[str]) -> Iterator[Requirement]:
    """The requirements that hold on this machine, without those of extras."""
    for text in texts:
        try:
            needed = Requirement(text)
        except InvalidRequirement:
            continue
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            yield needed


def _install(needed: Requirement) -> str:
    return f"pip install '{needed.name}{needed.specifier}'"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _release(version: str) -> tuple[int, ...]:
    try:
        return Version(version).release
    except InvalidVersion:
        return ()


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
