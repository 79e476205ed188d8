"""What is wrong with a machine follows from facts alone; each problem has a line that mends it."""

from dataclasses import replace

import pytest

from diffjax.host.diagnosis import GIB, SLOW, Device, Facts, described, extras, findings

VERSIONS = {
    "diffjax": "0.1.0",
    "jax": "0.10.2",
    "jaxlib": "0.10.2",
    "flax": "0.12.8",
    "optax": "0.2.8",
    "orbax-checkpoint": "0.12.8",
}
FINE = Facts(
    python=(3, 12, 4),
    versions=VERSIONS,
    requirements={
        "jax": ["jaxlib<=0.10.2,>=0.10.2", "numpy>=2; python_version < '3'"],
        "flax": ["jax>=0.8.1", "this is no requirement ///"],
    },
    extras={"text": ["tokenizers>=0.22"], "own": ["Flax"]},
    devices=[Device("cpu", "cpu")],
    cpu="EPYC",
    cpu_features=frozenset({"avx", "avx2"}),
    cores=2,
    memory_bytes=16 * GIB,
    shared_bytes=8 * GIB,
    cache="/home/me/.cache/diffjax",
    cache_free_bytes=50 * GIB,
    folder="/home/me",
    free_bytes=50 * GIB,
)
GPU = [Device("H100", "gpu", 60 * GIB)]
ON_GPU = {"devices": GPU, "nvidia_driver": "580.65"}
PLUGIN = {**VERSIONS, "jax-cuda13-plugin": "0.10.2"}


def test_nothing_is_wrong_with_a_machine_that_has_all():
    assert findings(FINE) == []
    assert findings(replace(FINE, **ON_GPU, versions=PLUGIN)) == []
    assert findings(replace(FINE, tpu_chips=4, devices=[Device("TPU v5", "tpu")])) == []


@pytest.mark.parametrize(
    ("facts", "problem", "mend", "stops"),
    [
        ({"python": (3, 10, 1)}, "Python 3.10.1 is too old", "uv venv --python 3.12", True),
        (
            {"versions": {**VERSIONS, "jaxlib": "0.9.0"}},
            "jax 0.10.2 needs jaxlib<=0.10.2,>=0.10.2, but 0.9.0 is installed",
            "pip install 'jaxlib<=0.10.2,>=0.10.2'",
            True,
        ),
        (
            {"versions": {k: v for k, v in VERSIONS.items() if k != "jax"}},
            "flax needs jax, which is not installed",
            "pip install 'jax>=0.8.1'",
            True,
        ),
        (
            {"versions": {**PLUGIN, "jax-cuda13-plugin": "0.9.1"}, **ON_GPU},
            "jax-cuda13-plugin 0.9.1 does not fit jaxlib 0.10.2",
            "pip install 'jax[cuda13]==0.10.2'",
            True,
        ),
        (
            {"versions": {**PLUGIN, "jax-cuda12-plugin": "0.10.2"}, **ON_GPU},
            "CUDA 12 and for CUDA 13",
            "pip uninstall -y jax-cuda12-plugin",
            True,
        ),
        ({"jax_error": "no backend", "devices": ()}, "no backend", "--force-reinstall", True),
        ({"jax_error": SLOW, "devices": ()}, "within a minute", "--force-reinstall", True),
        (
            {"jax_error": SLOW, "devices": (), "load": 12.3, "cores": 2},
            "within a minute: 12 programs compete for 2 cores",
            "when the machine is less busy",
            True,
        ),
        (
            {"jax_error": "x", "devices": (), "environment": {"JAX_PLATFORMS": "cuda"}},
            "finds no device",
            "unset JAX_PLATFORMS",
            True,
        ),
        (
            {"jax_error": "The TPU is already in use by process 7", "devices": ()},
            "process 7",
            "end the process",
            True,
        ),
        (
            {"nvidia_driver": "580.65"},
            "no plugin for CUDA 13: training runs on the CPU",
            "pip install 'jax[cuda13]==0.10.2'",
            False,
        ),
        ({"nvidia_driver": "550.1"}, "no plugin for CUDA 12", "'jax[cuda12]==0.10.2'", False),
        ({"nvidia_driver": "470.82"}, "too old for JAX", "nvidia-driver-580", False),
        (
            {"nvidia_driver": "580.65", "environment": {"JAX_PLATFORMS": "cpu"}},
            "JAX_PLATFORMS=cpu hides the GPU",
            "unset JAX_PLATFORMS",
            False,
        ),
        (
            {
                "nvidia_driver": "580.65",
                "versions": PLUGIN,
                "environment": {"CUDA_VISIBLE_DEVICES": ""},
            },
            "hides all GPUs",
            "unset CUDA_VISIBLE_DEVICES",
            False,
        ),
        (
            {"nvidia_driver": "580.65", "versions": PLUGIN},
            "does not use the GPU",
            "jax.devices",
            False,
        ),
        (
            {**ON_GPU, "environment": {"LD_LIBRARY_PATH": "/usr/local/cuda-12/lib64"}},
            "another CUDA",
            "unset LD_LIBRARY_PATH",
            False,
        ),
        (
            {**ON_GPU, "nvidia_used_bytes": [0, 30 * GIB]},
            "hold 30.0 GiB of GPU 1",
            "nvidia-smi",
            False,
        ),
        ({**ON_GPU, "devices": GPU * 2, "shared_bytes": GIB // 16}, "0.1 GiB", "--shm-size", False),
        (
            {"libtpu": ["/a/libtpu", "/b/libtpu"]},
            "two libtpu (/a/libtpu, /b/libtpu)",
            "pip uninstall -y libtpu",
            True,
        ),
        (
            {"versions": {**VERSIONS, "libtpu": "0.0.52", "libtpu-nightly": "0.1"}},
            "two libtpu (one folder)",
            "pip uninstall",
            True,
        ),
        ({"tpu_chips": 4}, "4 TPU chips", "pip install 'jax[tpu]'", False),
        (
            {"tpu_chips": 4, "environment": {"JAX_PLATFORMS": "cpu"}},
            "4 TPU chips",
            "unset JAX_PLATFORMS",
            False,
        ),
        ({"cpu_features": frozenset({"sse4_2"})}, "EPYC has no AVX", "build jaxlib", True),
        ({"folder_error": "Read-only file system"}, "Read-only", "--workdir=FOLDER", True),
        ({"free_bytes": GIB}, "1.0 GiB are free in /home/me", "delete old runs", False),
        ({"cache_error": "denied"}, "(denied)", "JAX_COMPILATION_CACHE_DIR=FOLDER", False),
        ({"cache_free_bytes": 0}, "0.0 GiB are free for compiled", "rm -r /home/me/", False),
    ],
)
def test_each_problem_has_one_line_that_mends_it(facts, problem, mend, stops):
    (found,) = findings(replace(FINE, **facts))
    assert problem in found.problem
    assert mend in found.mend
    assert found.stops is stops
    assert "\n" not in found.problem + found.mend


def test_versions_that_cannot_be_read_do_not_fit_and_jax_is_named_without_one():
    odd = replace(FINE, versions={**PLUGIN, "jax-cuda13-plugin": "odd"}, **ON_GPU)
    assert [one.stops for one in findings(odd)] == [True]
    unknown = Facts(nvidia_driver="580.1", devices=[Device("cpu", "cpu")], free_bytes=9 * GIB)
    assert [one.mend for one in findings(unknown)] == ["pip install 'jax[cuda13]'"]


def test_what_stops_training_comes_first():
    facts = replace(FINE, cache_error="denied", python=(3, 9, 0), free_bytes=0)
    assert [one.stops for one in findings(facts)] == [True, False, False]


def test_what_is_there_is_listed():
    rows = described(replace(FINE, devices=GPU * 8, nvidia_driver="580.65", tpu_chips=2))
    assert rows["packages"].startswith("jax 0.10.2, jaxlib 0.10.2, flax 0.12.8")
    assert rows["devices"] == "8 × H100 (gpu, 60.0 GiB each)"
    assert (rows["NVIDIA driver"], rows["TPU chips"]) == ("580.65", "2")
    assert rows["processor"] == "EPYC, 2 cores, avx2"
    assert rows["extras"] == "text missing, own"
    bare = described(Facts(environment={"JAX_PLATFORMS": "cpu"}))
    assert bare["packages"].startswith("jax missing")
    assert (bare["devices"], bare["environment"]) == ("none", "JAX_PLATFORMS=cpu")
    assert "/dev/shm" not in bare
    assert extras(Facts()) == {}
