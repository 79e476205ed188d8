"""Measurements of tools/accelerator_check.sh: one section of its report a call.

python tools/accelerator_check.py --size=full attention|ensembles|plans|exported
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import config_files
from diffjax.ensemble.members import compile_steps, members_of, stack
from diffjax.errors import UserError
from diffjax.models.layers.attention import IMPLEMENTATIONS, attention
from diffjax.performance.planning import fitting
from diffjax.performance.planning.analytic import model_of
from diffjax.performance.planning.compiled import expected_data, needs_on
from diffjax.performance.planning.roofline import estimate
from diffjax.performance.planning.topologies import CHIPS, GIB, USABLE, Chip, Topology
from diffjax.performance.throughput import noise_batch, peak_memory, timed, training_program
from diffjax.runs.setup import set_up
from diffjax.training.sharding import make_mesh

LEAST_GAIN = 1.5
_ROUNDS = 5


def milliseconds(run: Callable[[], Any], repeats: int = 10) -> float:
    """The median time of a call, after one that compiles; the calls of a round are queued."""

    def all_of_them() -> None:
        jax.block_until_ready([run() for _ in range(repeats)])

    jax.block_until_ready(run())
    return 1e3 * statistics.median(timed(all_of_them) for _ in range(_ROUNDS)) / repeats


def in_float64(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention in NumPy."""
    logits = np.einsum("bqhd,bkhd->bhqk", q, k, dtype=np.float64) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


def attentions(small: bool) -> list[str]:
    """Each implementation against NumPy, and its gradient against that of XLA's own in float32."""
    shapes = [(2, 32, 2, 16)] if small else [(32, 256, 6, 64), (8, 1024, 16, 72)]
    lines = ["| shape | type | attention | error | of the gradient | ms | with gradient, ms |"]
    lines.append("|---" * 7 + "|")
    for shape in shapes:
        exact = [np.random.default_rng(i).normal(size=shape) for i in range(4)]
        for dtype in ("float32", "bfloat16"):
            q, k, v, up = (jnp.asarray(x, dtype) for x in exact)
            wide = [np.asarray(x, np.float64) for x in (q, k, v)]
            reference = in_float64(*wide)
            with jax.default_matmul_precision("highest"):
                slopes = _with_gradient("xla")(*(x.astype("float32") for x in (q, k, v, up)))[1]
            for name in IMPLEMENTATIONS:
                cells = [f"{shape}", dtype, name]
                try:
                    alone = jax.jit(lambda q, k, v, name=name: attention(q, k, v, name))
                    both = _with_gradient(name)
                    found, gradients = both(q, k, v, up)
                    cells += [
                        f"{_error(found, reference):.1e}",
                        f"{max(map(_error, gradients, slopes)):.1e}",
                        f"{milliseconds(lambda: alone(q, k, v)):.3f}",  # noqa: B023 called here
                        f"{milliseconds(lambda: both(q, k, v, up)):.3f}",  # noqa: B023
                    ]
                except Exception as error:  # An implementation may not run on this device.
                    cells += [f"not here: {' '.join(str(error).split())[:60]}", "", "", ""]
                lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", "Errors are relative to the largest entry; 1e-2 is usual in bfloat16."]


def _with_gradient(name: str) -> Callable[..., Any]:
    def both(q: Any, k: Any, v: Any, up: Any) -> Any:
        out, back = jax.vjp(lambda q, k, v: attention(q, k, v, name), q, k, v)
        return out, back(up)

    return jax.jit(both)


def _error(found: Any, exact: Any) -> float:
    found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    return float(np.abs(found - exact).max() / np.abs(exact).max())


def ensembles(small: bool) -> list[str]:
    """How much faster members train as one program than one after the other."""
    lines = ["| config | batch | members | ms of one | ms of all | gain |", "|---" * 6 + "|"]
    gains = []
    for batch, number in ((8, 2),) if small else ((128, 4), (512, 4)):
        configs = []
        for seed in range(number):
            config = config_files.load("digits")
            config.batch_size, config.seed = batch, seed
            configs.append(config.lock())
        mesh = make_mesh(devices=jax.devices()[:1])
        setups = [set_up(config, *expected_data(config), mesh) for config in configs]
        states = [setup.init(jax.random.key(setup.config.seed)) for setup in setups]
        members = members_of(setups)
        stacked = stack(members, states)
        together = compile_steps(members, stacked, jax.vmap)
        alone = training_program(setups[0], states[0], steps=10)
        batches = jax.tree.map(lambda x, n=number: jnp.stack([x] * n), noise_batch(setups[0]))

        def run(together: Any = together, batches: Any = batches) -> None:
            nonlocal stacked
            for _ in range(10):
                stacked, _ = together(stacked, batches)
            jax.block_until_ready(stacked)

        run()
        one, every = [], []
        for _ in range(_ROUNDS):
            one.append(timed(alone.run) / 10)
            every.append(timed(run) / 10)
        gains.append(statistics.median(number * a / b for a, b in zip(one, every, strict=True)))
        cells = (f"{1e3 * statistics.median(x):.2f}" for x in (one, every))
        lines.append(f"| digits | {batch} | {number} | {' | '.join(cells)} | {gains[-1]:.2f} |")
    best = max(gains)
    verdict = (
        f"The gain reaches {best:.2f}: ensembles stay."
        if best >= LEAST_GAIN
        else f"The gain is at most {best:.2f}, BELOW {LEAST_GAIN}: ensembles are not worth it here."
    )
    return [*lines, "", verdict]


def plans(small: bool) -> list[str]:
    """Plans against the memory and the time that training needed, each in its own process."""
    names = ["digits"] if small else ["cifar10:model=DiT-S/2", "imagenet256:model=DiT-B/2"]
    lines = [
        "| config | analytic GiB | compiled GiB | needed GiB | bound ms | ms | of the bound |",
        "|---" * 7 + "|",
    ]
    for name in names:
        done = subprocess.run(
            [sys.executable, __file__, f"--size={'small' if small else 'full'}", f"plan:{name}"],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise UserError((done.stderr.strip().splitlines() or ["no message"])[-1])
        lines.append(done.stdout.strip().splitlines()[-1])
    return [*lines, "", "Needed is the peak since the start of the process, with the first state."]


def plan(name: str) -> list[str]:
    """A line of the table of plans."""
    config = config_files.load(name)
    config.batch_size, config.mesh.fsdp = min(config.batch_size, 128), 1
    if "dtype" in config.model:
        half = fitting.multiplies_bfloat16(jax.devices()[0])
        config.model.dtype = "bfloat16" if half else "float32"
    mesh = make_mesh(devices=jax.devices()[:1])
    topology = here(jax.devices()[0])
    analytic = model_of(config, topology)
    compiled = needs_on(config, mesh, topology)
    setup = set_up(config, *expected_data(config), mesh)
    program = training_program(setup, setup.init(jax.random.key(0)), steps=5)
    seconds = statistics.median(timed(program.run) for _ in range(_ROUNDS)) / 5
    needed = peak_memory(mesh)[1]
    known = topology.chip.name in CHIPS
    bound = estimate(compiled, topology).seconds if known else None
    cells = [
        f"`{name}`, batch {config.batch_size}",
        f"{analytic.peak_bytes / GIB:.3f}",
        f"{compiled.peak_bytes / GIB:.3f}",
        "unknown" if needed is None else f"{needed / GIB:.3f}",
        "unknown chip" if bound is None else f"{1e3 * bound:.2f}",
        f"{1e3 * seconds:.2f}",
        "" if bound is None else f"{bound / seconds:.0%}",
    ]
    return [f"| {' | '.join(cells)} |"]


def here(device: Any) -> Topology:
    """The device as one of the planner's chips, or else as one of unknown speed."""
    kind = device.device_kind.lower().replace(" ", "").replace("lite", "e")
    kind = "tpuv5p" if kind == "tpuv5" else kind  # "TPU v5" is a v5p, "TPU v5 lite" a v5e
    for name, chip in CHIPS.items():
        if name in kind and chip.platform == device.platform:
            return Topology(chip, (1, 1))
    platform = device.platform if device.platform in USABLE else "tpu"
    return Topology(Chip(kind, platform, 1.0, 16 * GIB, 1.0, 1.0, 1.0, ""), (1, 1))


_ALONE = """
import sys
from pathlib import Path
import numpy as np
from jax import export
sys.modules["diffjax"] = None  # it can't be imported
sampler = export.deserialize(bytearray(Path(sys.argv[1]).read_bytes()))
np.save(sys.argv[2], np.asarray(sampler.call(np.uint32(0), np.arange(16, dtype=np.int32) % 10)))
"""


def exported(small: bool) -> list[str]:
    """A run of few steps, exported, and sampled on this device where diffjax can't be imported."""
    import diffjax

    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    with tempfile.TemporaryDirectory() as folder:
        workdir, file, out = (str(Path(folder) / name) for name in ("run", "file.bin", "out.npy"))
        settings = ["num_steps=20", "evaluation.num_samples=32", "evaluation.batch_size=32"]
        flags = [f"--config.{text}" for text in [*settings, "sample_images=8"]]
        _called("experiments.train", "--config=digits", *flags, f"--workdir={workdir}")
        _called(
            "experiments.export", f"--workdir={workdir}", f"--out={file}", f"--platforms={platform}"
        )
        place = subprocess.run(
            [sys.executable, "-I", "-c", _ALONE, file, out], capture_output=True, text=True
        )
        if place.returncode:
            raise UserError((place.stderr.strip().splitlines() or ["no message"])[-1])
        inside = np.asarray(diffjax.load(workdir).sample(np.arange(16) % 10, seed=0))
        difference = float(np.abs(np.load(out) - inside).max())
        size = Path(file).stat().st_size / 1e6
    close = difference < 1e-2
    line = f"{size:.1f} MB for {platform}; 16 samples differ by at most {difference:.1e} of 2"
    if not close:
        raise UserError(f"{line}: too much")
    return [f"{line}: equal up to rounding."]


def _called(module: str, *flags: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *flags], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{module}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def main(argv: Sequence[str]) -> int:
    """Prints a section as Markdown."""
    parser = argparse.ArgumentParser(description=textwrap.dedent(__doc__ or ""))
    parser.add_argument("--size", choices=["small", "full"], default="full")
    parser.add_argument("section")
    args = parser.parse_args(argv)
    sections = {
        "attention": attentions, "ensembles": ensembles, "plans": plans, "exported": exported,
    }  # fmt: skip
    kind, _, name = args.section.partition(":")
    if kind != "plan" and kind not in sections:
        parser.error(f"no section {kind!r}: {', '.join(sections)}")
    try:
        lines = plan(name) if kind == "plan" else sections[kind](args.size == "small")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    device = jax.devices()[0]
    print("\n".join(lines if kind == "plan" else [f"{device.device_kind}", "", *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
