"""How the speed of training scales with members, width and devices: `python -m benchmarks.scaling`.

Trains Myrtle5 ensembles of 1 to 64 members and widths 16 to 128, on one device and on all (on a CPU, one per core), and
leaves `scaling-….json` and `scaling-….png` in `results/`. Two to five minutes on two cores. Rounds go over all
cases, so that none has a quieter time than the others.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from experiments.problems.cifar import flops_per_image
from experiments.running.devices import use_all_cores

from .comparison import rotated
from .contestant import Contestant
from .environment import environment
from .test_cifar import minibatch, ours

BATCH = 8  # images of a member's update
ROUNDS = 3
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("black", "^"), ("#009E73", "D"))


@dataclass(frozen=True)
class Point:
    """What was measured of one ensemble.

    **Fields:**

    - `width`, `members`, `devices`: the ensemble, and the devices that it was spread over.
    - `images_per_second`: of every round.
    """

    width: int
    members: int
    devices: int
    images_per_second: list[float]


def measure(widths: list[int], sizes: list[int], seconds: float = 0.5, size: int = 32) -> list[Point]:
    """Times every ensemble on one device and on as many as there are and divide its members.

    **Arguments:**

    - `widths`, `sizes`: channels and members.
    - `seconds`: about how long a call is to take; of large ensembles it is one update, which takes longer.
    - `size`: height and width of the images.
    """
    data = minibatch(BATCH, size)
    cases: list[tuple[Contestant, tuple[int, int, int], int]] = []
    for width in widths:
        for members in sizes:
            keys = jax.random.split(jax.random.key(0), members)
            usable = max(n for n in range(1, jax.device_count() + 1) if members % n == 0)
            for devices in dict.fromkeys((1, usable)):
                at_once = seconds * 100e9 * (32 / size) ** 2 / flops_per_image(width)  # images, at a CPU's usual pace
                steps = max(1, round(at_once / (members * BATCH)))
                contestant = ours("ours", data, keys, width, steps, jax.devices()[:devices])
                jax.block_until_ready(contestant.call())  # compiles
                cases.append((contestant, (width, members, devices), members * BATCH * steps))
                print(f"compiled: width {width}, {members} members, {devices} device(s)", flush=True)
    rates: dict[tuple[int, int, int], list[float]] = {case: [] for _, case, _ in cases}
    about = {id(contestant): (case, images) for contestant, case, images in cases}
    for contestant in rotated([contestant for contestant, _, _ in cases], ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(contestant.call())
        case, images = about[id(contestant)]
        rates[case].append(images / (time.perf_counter() - start))
    return [Point(*case, found) for case, found in rates.items()]


def draw(points: list[Point], path: Path, machine: str) -> Figure:
    """Writes a PNG: images and floating-point operations a second against the members, by width and devices."""
    figure = Figure(figsize=(10, 5.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for width, (colour, marker) in zip(dict.fromkeys(point.width for point in points), STYLES, strict=False):
        for several in (True, False):
            mine = [p for p in points if p.width == width and (p.devices > 1) == several]
            if not mine:
                continue
            name = f"width {width}, {max(p.devices for p in mine)} device{'s' if several else ''}"
            members = [point.members * (1.04 if several else 0.96) for point in mine]  # bars side by side
            rates = np.array([point.images_per_second for point in mine])
            middle = np.median(rates, 1)
            spread = np.abs(np.stack([rates.min(1), rates.max(1)]) - middle)
            look: dict[str, Any] = {"color": colour, "marker": marker, "capsize": 3, "label": name}
            look |= {
                "linestyle": "solid" if several else (0, (4, 2)),
                "markerfacecolor": colour if several else "white",
            }
            for axes, unit in ((left, 1.0), (right, flops_per_image(width) / 1e9)):
                axes.errorbar(members, middle * unit, spread * unit, **look)
    for axes, label in ((left, "images / s"), (right, "GFLOP / s, by the definition of a convolution")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({point.members for point in points}))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("members")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    left.set_yscale("log")
    left.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    right.set_ylim(bottom=0)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, handlelength=4)
    title = f"Training Myrtle5 ensembles, float32: {machine}"
    figure.suptitle(f"{title}\nmedian of {ROUNDS} rounds, bars: all rounds", fontsize=12, fontweight="bold")
    figure.savefig(path, format="png", metadata={"Title": title})
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    use_all_cores()
    points = measure([16, 64, 128], [1, 4, 16, 64])
    versions = environment()
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    path = Path("results") / f"scaling-{now}.json"
    path.parent.mkdir(exist_ok=True)
    content = {"machine_info": versions, "batch": BATCH, "points": [asdict(point) for point in points]}
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    machine = f"{versions['devices']} x {versions['device_kind']}, jax {versions['jax']}"
    draw(points, path.with_suffix(".png"), machine)
    for point in points:
        rates = np.median(point.images_per_second)
        print(f"width {point.width}, {point.members} members, {point.devices} device(s): {rates:,.0f} images/s")
    print(f"{path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
