"""Compiles JAX functions for a GPU that is not there, and reads facts off the result: launches, traffic, collectives.

The compiler is the real one, XLA's for CUDA, in the wheel of JAX's plugin; it only needs a description of the GPU. No
kernel runs, so nothing here says how fast one is.
"""

import collections
import functools as ft
import importlib.metadata
import math
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

Gpu = Literal["a100", "h100", "b200"]

# Compilation fails where a kernel needs more registers than it can have, and would keep values in device memory.
NO_SPILLS = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}

_TARGETS = pathlib.Path(__file__).parent / "gpu_targets"


@ft.cache
def obstacle() -> str | None:
    """Why nothing can be compiled here, and what would help; None if it can."""
    versions = {}
    for name in ("jax-cuda12-pjrt", "jax-cuda13-pjrt"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    install = 'pip install -e ".[test,aot]", and set JAX_PLATFORMS=cpu'
    if not versions:
        return f"XLA's compiler for CUDA is not installed: {install}."
    if jax.__version__ not in versions.values():
        found = ", ".join(f"{name} {version}" for name, version in versions.items())
        return f"XLA's compiler for CUDA must be as old as jax {jax.__version__}, and is {found}: {install}."
    if jax.config.jax_platforms != "cpu":
        return f"JAX would look for a GPU: {install}."
    try:
        _devices("h100", 1)
    except Exception as error:
        return f"XLA's compiler for CUDA does not load ({error}): {install}."
    return None


@ft.cache
def _devices(gpu: Gpu, count: int):
    target = (_TARGETS / f"{gpu}.textproto").read_text()
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{count}").devices


def mesh(gpu: Gpu, **axes: int) -> Mesh:
    """A mesh of GPUs in one machine, for shardings and `shard_map`: `mesh("h100", data=8)`."""
    devices = np.array(_devices(gpu, math.prod(axes.values()))).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes))


def compile_for(gpu: Gpu, function: Callable, *args: Any, options: dict[str, Any] | None = None) -> jax.stages.Compiled:
    """Compiles a function, jitted or not, for a GPU; or for several, if an argument is sharded over a `mesh` of them.

    **Arguments:**

    - `args`: PyTrees of arrays or `jax.ShapeDtypeStruct`s, of which only shape, dtype and `NamedSharding` matter.
      Without a sharding they are replicated.
    - `options`: compiler options, XLA's flags by name.
    """
    device = _devices(gpu, 1)[0]
    shardings = [getattr(x, "sharding", None) for x in jax.tree.leaves(args)]
    meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
    default = NamedSharding(meshes[0], PartitionSpec()) if meshes else SingleDeviceSharding(device)

    def place(x):
        given = getattr(x, "sharding", None)
        sharding = given if isinstance(given, NamedSharding) else default
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    jitted: Any = function if hasattr(function, "trace") else jax.jit(function)
    # Pallas asks this mesh, and not the arguments' devices, which GPU it writes for.
    kind = AbstractDevice(device_kind=device.device_kind, num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        lowered = jitted.trace(*jax.tree.map(place, args)).lower(lowering_platforms=("cuda",))
    return lowered.compile(compiler_options=options)


def ptx(gpu: Gpu, function: Callable, *args: Any, options: dict[str, Any] | None = None) -> dict[str, str]:
    """The PTX of every kernel that is compiled for the function, by the kernel's name."""
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        compile_for(gpu, function, *args, options={**(options or {}), **dump})
        text = "".join(path.read_text() for path in sorted(pathlib.Path(folder).glob("*.ptx")))
    entries = re.split(r"\.entry (?=[\w$]+\()", text)[1:]
    return {entry[: entry.index("(")]: entry for entry in entries}


def load_widths(kernel_ptx: str) -> collections.Counter[int]:
    """How many instructions load how many bytes at once from device memory, for every thread; 16 is a full vector."""
    loads = re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\b", kernel_ptx)
    return collections.Counter(int(count or 1) * int(bits) // 8 for count, bits in loads)


class Kernel(NamedTuple):
    """A launch: a Pallas kernel has its own name and the kind "pallas", a library call its target as its kind."""

    name: str
    kind: str


def kernels(compiled: jax.stages.Compiled) -> list[Kernel]:
    """What a run launches, in order. The body of a loop and every branch of a conditional are listed once.

    One operation that runs on the device counts as one, even where XLA or a library may take several launches for it: a
    sort, a convolution.
    """
    program = _parse(compiled)
    return [_kernel(op) for op in _launches(program, program["ENTRY"])]


def collectives(compiled: jax.stages.Compiled) -> list[str]:
    """The communication between GPUs, in order: "all-gather", "all-reduce", …"""
    return [kernel.kind for kernel in kernels(compiled) if re.match("all-|reduce-scatter|collective|send|recv", kernel.kind)]


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Device memory that a run needs besides its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def memory_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of device memory that a run moves, on one GPU, if each kernel reads its inputs once and writes its outputs.

    The model: caches keep nothing from one kernel to the next, and everything within a kernel. An operand that a kernel
    takes twice counts once. Of an operand that is sliced or gathered from, the elements that are used count; of one
    that is updated in place, those that are written. A loop counts as often as it runs, a conditional by its dearest
    branch. Memory is counted by element, not by sector of 32 bytes, which a gather of single elements reads.
    """
    program = _parse(compiled)
    return _traffic(program, program["ENTRY"])


class _Op(NamedTuple):
    name: str
    type: str
    code: str
    operands: list[str]
    attributes: str
    is_root: bool


_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "add-dependency"}
_ELEMENTWISE_READS = {"reduce", "dot", "convolution", "sort", "reduce-window", "custom-call", "fusion", "scatter"}
