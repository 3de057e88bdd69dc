"""What only a machine with a GPU can tell, in eight minutes: `python -m benchmarks.gpu`.

Tests and benchmarks are called part after part, the most important first, each with a deadline. Every row of the
benchmarks is added to a file of JSON lines as soon as it is known, and a line on every part when it ends: a machine
that is gone after five minutes has left what was found by then. With --rehearse problems are small, and any machine
will do.
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
GRACE_S = 10  # from being told to stop to being stopped


@dataclass(frozen=True)
class Part:
    """A call of pytest: its name, its arguments, and the seconds that it may take."""

    name: str
    arguments: str
    seconds: float


PARTS = (
    Part("gradients", "benchmarks/test_precision.py --benchmark", 60),
    Part("training", "benchmarks/test_cifar.py --benchmark", 170),
    Part("spiral", "benchmarks/test_spiral.py --benchmark", 45),
    Part("kernel", "tests/kernels/test_gpu.py -m gpu -k 'last or member or value_and and (1001 or 8192 or 50257)'", 60),
    Part("loss", "benchmarks/test_loss.py --benchmark -k 'imagenet or vocab-32k or vocab-gpt2 or cifar'", 65),
    Part("tests", "tests/test_gpu.py tests/kernels/test_gpu.py -m gpu -k 'not every_gradient'", 50),
    Part("convolutions", "benchmarks/test_convolution.py --benchmark", 30),
)


@dataclass(frozen=True)
class Ended:
    """How a part ended: `done`, `failed` or `out of time`, after how many seconds, and the end of what it said."""

    part: str
    status: str
    seconds: float
    said: list[str]


def call(part: Part, seconds: float, out: Path, rehearse: bool) -> Ended:
    """Calls a part in a process of its own, whose rows go to `out` and whose output to the log beside it."""
    arguments = [*shlex.split(part.arguments), "-p", "no:cacheprovider"]
    if "--benchmark" in arguments:
        arguments += ["--rows", str(out), *(["--rehearse"] if rehearse else [])]
        arguments += ["--benchmark-json", str(out.with_suffix(f".{part.name}.json"))]
    paths = [str(ROOT / "kernels"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # PyTorch, and commands that tests start, need some of the GPU's memory as well.
    own = {"PYTHONPATH": os.pathsep.join(paths), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    log, start = out.with_suffix(".log"), time.monotonic()  # one for all parts: a machine may give back few files
    with log.open("ab") as file:
        before = file.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *arguments],
            cwd=ROOT,
            env=os.environ | own,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it has started is stopped with it
        )
        try:
            code = process.wait(seconds)
            status = "done" if code in (0, 5) else "failed"  # 5: there was nothing to test
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            _stop(process)
    lines = log.read_bytes()[before:].decode("utf-8", "replace").splitlines()
    said = [line for line in lines if re.match(r"FAILED |ERROR |.* in [\d.]+s\b", line)] or lines[-1:]
    return Ended(part.name, status, round(time.monotonic() - start, 1), said)


def _stop(process: subprocess.Popen) -> None:
    """Tells a process to stop, waits a little, and stops all that it has started."""
    for number, patience in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:  # all of them have ended
            return
        except subprocess.TimeoutExpired:
            pass


def run(parts: Sequence[Part], out: Path, minutes: float, rehearse: bool) -> list[Ended]:
    """Calls the parts until the time is up; those that there is no time for are left out."""
    out.parent.mkdir(parents=True, exist_ok=True)
    end, ended = time.monotonic() + 60 * minutes, []
    for part in parts:
        left = end - time.monotonic() - GRACE_S
        now = (
            call(part, min(part.seconds, left), out, rehearse)
            if left > 0
            else Ended(part.name, "no time left", 0.0, [])
        )
        with out.open("a", encoding="utf-8") as file:
            print(json.dumps(dataclasses.asdict(now)), file=file)
        print(f"{now.part}: {now.status} after {now.seconds:.0f} s. {' | '.join(now.said)}", flush=True)
        ended.append(now)
    return ended


def _backend() -> str:
    """What JAX computes on in the parts, found out by a process of its own: this one shall not hold the GPU."""
    code = "import jax; print(jax.default_backend())"
    return subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True).stdout.strip() or "nothing"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    parser.add_argument("--out", type=Path, default=Path("results") / f"gpu-{now}.jsonl", help="the file of JSON lines")
    parser.add_argument("--minutes", type=float, default=8.0, help="all that it may take (default: 8)")
    parser.add_argument("--rehearse", action="store_true", help="time small problems")
    given = parser.parse_args(arguments)
    if not given.rehearse and (found := _backend()) != "gpu":
        print(f"JAX finds no GPU here but {found}: nothing was measured (with --rehearse any machine will do).")
        return 2
    ended = run(PARTS, given.out.absolute(), given.minutes, given.rehearse)
    print(f"All numbers: {given.out}")
    return int(any(one.status == "failed" for one in ended))


if __name__ == "__main__":
    sys.exit(main())
