"""Training processes for tests: really separate, really killed, and quick to start."""

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS = 8
# Nearly all of a run's time is tracing: the smallest network, no guidance, one table row. Saving,
# logging and drawing fall on different steps, and stops between all of them.
CONFIG = f"""
from configs import digits
from diffjax import choices
from diffjax.spec import spec
from tests.support.tiny_network import Tiny

def get_config():
    config = digits.get_config()
    config.name, config.num_steps, config.batch_size = "tiny", {STEPS}, 16
    config.model = spec(Tiny)
    config.optimizer.warmup_steps = 2
    config.sampling.solver = choices.copy(choices.SOLVERS["euler"])
    config.sampling.update(num_steps=2, guidance_scale=1.0)
    config.log_every_steps, config.sample_every_steps = 3, 4
    config.checkpoint_every_steps, config.checkpoints_to_keep = 2, 9
    config.evaluation.update(num_samples=20, batch_size=20, solvers=(), num_steps=())
    return config
"""
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OPENBLAS_NUM_THREADS": "1",  # whose threads would not survive the fork
}

# Imports take longer than the training: one process makes them, and forks for each run.
SERVER = """
import contextlib, json, os, sys, time, traceback
import grain, matplotlib.pyplot, orbax.checkpoint, pytest, sklearn.datasets, tensorboardX
from importlib import import_module
from experiments import evaluate, sample, train
from experiments.flags import cli
import tests.support.tiny_network
from diffjax.loop import loop
from tests.support.tiny_run import without_pictures

@contextlib.contextmanager
def paused(seconds, stop_signals=loop.stop_signals):
    with stop_signals() as asked:
        yield lambda: time.sleep(seconds) or asked()

xla_flags = os.environ["XLA_FLAGS"]
for line in sys.stdin:
    pids = []
    for order in json.loads(line):
        pid = os.fork()
        if pid == 0:
            status = 70
            # XLA reads these at the first use of its devices.
            devices = f"--xla_force_host_platform_device_count={order['devices']}"
            os.environ["XLA_FLAGS"] = f"{xla_flags} {devices}"
            try:
                sink = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(sink, 1), os.dup2(sink, 2)
                if not order["pictures"]:
                    without_pictures(pytest.MonkeyPatch())
                    train.headline = lambda workdir: "trained"
                if order["pause"]:
                    loop.stop_signals = lambda: paused(order["pause"])
                program = import_module("experiments." + order["program"])
                status = cli.run(program.main, program.FLAGS, usage="", argv=order["argv"])
                import jax
                if jax.distributed.is_initialized():
                    jax.distributed.shutdown()  # which is otherwise done at the interpreter's exit
            except KeyboardInterrupt:
                status = 130
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        pids.append(pid)
    print(json.dumps(pids), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]), flush=True)
"""


# Permissions bind root as well then.
AS_ANYONE = ("setpriv", "--bounding-set=-dac_override")


@functools.cache
def may_drop() -> bool:
    """Whether this is root, who may write everywhere, and can really give that up."""
    if os.geteuid() != 0 or shutil.which(AS_ANYONE[0]) is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o500)
        write = 'touch "$0/x" 2> /dev/null; test "$?" != 0 -a ! -e "$0/x"'
        done = subprocess.run([*AS_ANYONE, "sh", "-c", write, folder], check=False)
    return done.returncode == 0


@functools.cache
def server_of(xla_flags: str) -> subprocess.Popen:
    """The process that forks, one for all files that a worker tests; it ends with the worker."""
    as_anyone = AS_ANYONE if may_drop() else ()
    return subprocess.Popen(
        [*as_anyone, sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**ENVIRONMENT, "XLA_FLAGS": xla_flags},
    )  # fmt: skip


class Trainer:
    """Starts the executables again and again, compiled quickly as the tests are (conftest.py).

    With `xla_flags=""` they are compiled as a user's runs are. Without pictures, trainings neither
    draw nor evaluate, which is most of the time of a run.
    """

    def __init__(
        self,
        outputs: Path,
        config: str = CONFIG,
        xla_flags: str = os.environ.get("XLA_FLAGS", ""),
        *,
        pictures: bool = True,
    ):
        self.outputs = outputs
        self.pictures = pictures
        self.config = outputs / "tiny.py"
        self.config.write_text(config)
        self.xla_flags = xla_flags

    def run(self, workdir: Path, disturb=lambda pid: None, pause: float = 0) -> tuple[int, str]:
        """The exit status (minus the signal that ended it) and the output.

        A run that should be stopped by a signal pauses for so many seconds after each step: its
        steps are over within milliseconds, and of several processes JAX looks for SIGTERM once a
        second.
        """
        ((status, said),) = self.start(
            "train", [self.arguments(workdir)], lambda pids: disturb(*pids), pause=pause
        )
        return status, said

    def together(
        self,
        number: int,
        arguments: Sequence[str],
        program: str = "train",
        disturb: Callable[[list[int]], None] = lambda pids: None,
        devices: int = 1,
        pause: float = 0,
    ) -> list[tuple[int, str]]:
        """As `run`, of several processes of one run, each with so many devices."""
        if number == 1:
            return self.start(program, [arguments], disturb, devices, pause)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        flags = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={number}"]
        argvs = [[*arguments, *flags, f"--process_index={i}"] for i in range(number)]
        return self.start(program, argvs, disturb, devices, pause)

    def start(
        self,
        program: str,
        argvs: Sequence[Sequence[str]],
        disturb: Callable[[list[int]], None] = lambda pids: None,
        devices: int = 1,
        pause: float = 0,
    ) -> list[tuple[int, str]]:
        outputs = [self.outputs / f"{time.monotonic_ns()}-{i}.txt" for i in range(len(argvs))]
        every = {"program": program, "devices": devices, "pause": pause}
        every["pictures"] = self.pictures or program != "train"
        orders = [
            {**every, "argv": list(argv), "output": str(output)}
            for argv, output in zip(argvs, outputs, strict=True)
        ]
        server = server_of(self.xla_flags)
        assert server.stdin
        assert server.stdout
        try:
            server.stdin.write(json.dumps(orders) + "\n")
            server.stdin.flush()
            disturb(json.loads(server.stdout.readline()))
            statuses = json.loads(server.stdout.readline())
        except BaseException:
            server_of.cache_clear()  # Further output of this one is no answer to another command.
            raise
        said = (path.read_text() if path.exists() else "" for path in outputs)
        return list(zip(statuses, said, strict=True))

    def arguments(self, workdir: Path) -> list[str]:
        return [f"--config={self.config}", f"--workdir={workdir}"]
