r"""Plan a run for hardware that is not attached: memory, FLOPs, traffic, time and device hours.

  python -m experiments.plan --config=configs/imagenet256.py:model=DiT-XL/2 --topology=v5e:4x4
  python -m experiments.plan --config=configs/imagenet256.py --topology=v5e:4x4 --search
  python -m experiments.plan --config=configs/imagenet256.py --topology=h100:8 --sampling
  python -m experiments.plan --config=configs/imagenet256.py --topology=v5e:2x2,v5e:4x4,v5e:8x8 \
      --json=plan.json --page=plan.html

The run's own training step is compiled: for TPUs by libtpu, which needs no TPU, and for NVIDIA GPUs
by XLA for CUDA, which needs no GPU. Without XLA for CUDA, the numbers of GPUs come from an analytic
model. docs/planning.md explains each number.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from diffjax.errors import UserError, nearest
from diffjax.host.progress import progress
from diffjax.performance.planning import gpus, search
from diffjax.performance.planning.analytic import model_of
from diffjax.performance.planning.compiled import PROGRAMS, Needs, expected_data, needs_from
from diffjax.performance.planning.page import write_page
from diffjax.performance.planning.tables import details, plan_summary, plans_as_json
from diffjax.performance.planning.topologies import CHIPS, SHAPES, Topology, topology_called
from diffjax.reports.run_page import write_report
from diffjax.spec import TARGET, to_json
from experiments.flags import cli

FLAGS = flags.FlagValues()
cli.define_config(FLAGS)
flags.DEFINE_list(
    "topology", None, "chips, for example v5e:4x4 or h100:8; a comma-separated list makes a table",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_bool(
    "sampling", False, "plan sampling of one batch instead of training", flag_values=FLAGS
)
flags.DEFINE_bool(
    "search", False, "try all meshes x rematerialisation x scan, and report the best",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_list(
    "search_over", list(search.AXES), "what --search varies; each compiled program takes minutes",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_bool("largest_batch", False, "find the largest batch that fits", flag_values=FLAGS)
flags.DEFINE_bool(
    "analytic", False, "use the analytic model and don't compile, even if a compiler is installed",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string("json", None, "write all numbers to this file", flag_values=FLAGS)
flags.DEFINE_string(
    "workdir", None, "folder of a run: write plan.json there and add the plan to the run's report",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string("page", None, "write one HTML page to this file", flag_values=FLAGS)
flags.DEFINE_string(
    "libtpu", None, "folder with libtpu (pip install --target FOLDER libtpu), if it is not "
    "installed",
    flag_values=FLAGS,
)  # fmt: skip

flags.DEFINE_string(
    "cuda", None, "folder with XLA for CUDA (pip install --no-deps --target FOLDER "
    "jax-cuda13-plugin==V jax-cuda13-pjrt==V, V the version of jaxlib), if it is not installed",
    flag_values=FLAGS,
)  # fmt: skip

_FLAGS = os.environ.get("XLA_FLAGS", "").split()
_ALONE = {
    # Without these, libtpu queries a cloud server for the TPU it runs on.
    "tpu": {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        # No TPU is used, so several plans can be made at the same time.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # libtpu ends the process at an unknown flag, and it does not know some of the CPU flags.
        "XLA_FLAGS": " ".join(flag for flag in _FLAGS if not flag.startswith("--xla_cpu_")),
    },
    "gpu": {"XLA_FLAGS": " ".join([*_FLAGS, gpus.XLA_FLAGS])},
}
_CUDA = "jax_cuda13_plugin"


def main(args: SimpleNamespace) -> int:
    """Plans the config on each topology, prints tables and writes the files.

    Raises:
        UserError: a flag is wrong, or no plan fits.
    """
    topologies = checked(args)
    plans: list[tuple[str, ConfigDict, Needs]] = []
    failure = None
    try:
        for label, config, needs in _planned(args, topologies):
            plans.append((label, config, needs))
            print(f"{label}: {needs.topology}, batch {needs.batch_size}", file=sys.stderr)
    except UserError as error:
        failure = error
    if failure is not None and not plans:
        raise failure
    conclude(args, plans)
    if failure is not None:  # Earlier plans were printed first, so they are not lost.
        raise failure
    if not any(needs.fits for _, _, needs in plans):
        raise UserError(search.what_would_fit(plans[-1][1], plans[-1][2]))
    return 0


def checked(args: SimpleNamespace) -> list[Topology]:
    """Checks all flags and returns the topologies of `--topology`."""
    if not args.topology:
        raise UserError(f"--topology=CHIP:SHAPE is missing; chips: {', '.join(CHIPS)}")
    for path in (args.json, args.page):
        if path is not None and not Path(path).parent.is_dir():
            raise UserError(f"can't write {path}: there is no folder {Path(path).parent}")
    if args.workdir is not None and not Path(args.workdir).is_dir():
        raise UserError(f"--workdir={args.workdir}: there is no such folder")
    expected_data(args.config)
    for axis in args.search_over:
        if axis not in search.AXES:
            raise UserError(f"--search_over: there is no {axis!r}; {nearest(axis, search.AXES)}")
    if args.search_over != list(search.AXES) and not args.search:
        raise UserError("--search_over needs --search: it selects what --search varies")
    if len(args.topology) > 1 and (args.search or args.largest_batch):
        raise UserError("--search and --largest_batch take one --topology")
    if args.search and args.largest_batch:
        raise UserError("--search and --largest_batch are two searches: use one at a time")
    if args.libtpu is not None and not (Path(args.libtpu) / "libtpu").is_dir():
        raise UserError(
            f"--libtpu={args.libtpu} contains no libtpu: pip install --target FOLDER libtpu"
        )
    return [topology_called(name) for name in args.topology]


def conclude(args: SimpleNamespace, rows: Sequence[tuple[str, ConfigDict, Needs]]) -> None:
    """Prints the tables and writes the files."""
    chosen = search.largest if args.largest_batch else search.best if args.search else _last
    best = chosen(rows)
    text = plan_summary(rows)
    if best is not None:
        text = f"{details(best[1], best[2])}\n\n{text}"
    if args.search and best is not None:
        text += f"\n\nbest: {best[0]}"
    if args.largest_batch:
        text += f"\n\n{search.about_largest(rows, topology_called(args.topology[0]))}"
    print(text)
    contents = {"config": json.loads(to_json(args.config)), **plans_as_json(rows, best)}
    if args.json is not None:
        cli.save(args.json, json.dumps(contents, indent=2) + "\n")
    if args.workdir is not None:
        cli.save(str(Path(args.workdir) / "plan.json"), json.dumps(contents, indent=2) + "\n")
        print(f"open {write_report(args.workdir)}")
    if args.page is not None:
        write_page(args.page, args.config_name, rows, best, _command())


def _last(rows: Sequence[search.Row]) -> search.Row:
    return rows[-1]


def _planned(
    args: SimpleNamespace, topologies: Sequence[Topology]
) -> Iterator[tuple[str, ConfigDict, Needs]]:
    """Yields the label, the config and the needs of each plan."""
    program = PROGRAMS[args.sampling]

    def plan(config: ConfigDict, topology: Topology) -> Needs:
        on_gpus = topology.chip.platform == "gpu"
        missing = on_gpus and args.cuda is None and find_spec(_CUDA) is None
        if args.analytic or missing or (on_gpus and topology.chip.name not in gpus.GPUS):
            with progress(f"tracing the program for {topology.name}"):
                return model_of(config, topology, program)
        with progress(f"compiling the program for {topology.name}"):
            return in_own_process(config, topology, program, args.cuda if on_gpus else args.libtpu)

    if args.search:
        # Rematerialisation changes nothing without a backward pass.
        over = [axis for axis in args.search_over if not (args.sampling and axis == "remat")]
        yield from _those_that_can_be(
            search.candidate_plans(args.config, topologies[0], over),
            lambda c: plan(c, topologies[0]),
        )
    elif args.largest_batch:
        tried = search.largest_batch(args.config, topologies[0], lambda c: plan(c, topologies[0]))
        for config, needs in tried:
            yield f"batch {config.batch_size}", config, needs
    else:
        for topology in topologies:
            yield topology.name, args.config, plan(args.config, topology)


def _those_that_can_be(
    candidates: Iterable[tuple[str, ConfigDict]], plan: Callable[[ConfigDict], Needs]
) -> Iterator[tuple[str, ConfigDict, Needs]]:
    """Yields the plans of a search and prints why candidates are refused.

    Raises:
        UserError: that of the last candidate, if all of them are refused.
    """
    refused, planned = None, 0
    for label, config in candidates:
        try:
            needs = plan(config)
        except UserError as error:
            refused = error
            print(f"{label}: {error}", file=sys.stderr)
            continue
        planned += 1
        yield label, config, needs
    if refused is not None and not planned:
        raise refused


def in_own_process(
    config: ConfigDict, topology: Topology, program: str, compiler: str | None
) -> Needs:
    """Compiles in a subprocess that can import the compiler.

    In this process, an importable compiler would make JAX look for chips.

    Raises:
        UserError: the config does not fit the topology, or the compiler is missing or fails.
    """
    path = [part for part in (compiler, os.getcwd(), os.environ.get("PYTHONPATH")) if part]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answer.json"
        request = {
            "config": to_json(config),
            "packages": sorted(_packages(json.loads(to_json(config)))),
            "topology": topology.name,
            "program": program,
            "answer": str(file),
        }
        done = subprocess.run(
            [sys.executable, "-m", "diffjax.performance.planning.compiling_process"],
            input=json.dumps(request),
            env={
                **os.environ,
                **_ALONE[topology.chip.platform],
                "JAX_PLATFORMS": "cpu",
                "JAX_TRACEBACK_FILTERING": "off",  # Then the last line is the actual error.
                "PYTHONPATH": os.pathsep.join(path),
            },
            capture_output=True,
            text=True,
        )
        if done.returncode or not file.exists():
            last = (done.stderr.strip().splitlines() or ["no error message"])[-1]
            if "RET_CHECK" in last or "INTERNAL" in last:
                last += "; this is an error in the compiler: --analytic works without it"
            raise UserError(f"the compiling process ended with status {done.returncode}: {last}")
        answer = json.loads(file.read_text(encoding="utf-8"))
    if "error" in answer:
        raise UserError(answer["error"])
    return needs_from(answer["needs"])


def _packages(tree: Any) -> set[str]:
    """Packages of the callables that a config names; the user's own config is trusted."""
    if isinstance(tree, list):
        return set().union(*map(_packages, tree))
    if not isinstance(tree, dict):
        return set()
    own = {tree[TARGET].partition(":")[0].partition(".")[0]} if TARGET in tree else set()
    return own.union(*map(_packages, tree.values()))


def _command() -> str:
    return " ".join(["python -m experiments.plan", *sys.argv[1:]])


USAGE = f"""{__doc__}
Topologies (--topology=CHIP:SHAPE):
{chr(10).join(f"  {chip + ':':<6}{', '.join(shapes)}" for chip, shapes in SHAPES.items())}"""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
