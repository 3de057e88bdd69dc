"""Compiles JAX functions for a GPU that is not there; `hlo` reads facts off the result.

The compiler is the real one, XLA's for CUDA, in the wheel of JAX's plugin; it only needs a description of the GPU. No
kernel runs, so nothing here says how fast one is.
"""

import collections
import functools as ft
import importlib.metadata
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

Gpu = Literal["a100", "h100", "b200"]

# Compilation fails where a kernel needs more registers than it can have, and would keep values in device memory.
NO_SPILLS = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}

_INSTALL = 'pip install -e ".[test,aot]", and set JAX_PLATFORMS=cpu'
_TARGETS = pathlib.Path(__file__).parent / "gpu_targets"


@ft.cache
def obstacle() -> str | None:
    """Why nothing can be compiled here, and what would help; None if it can."""
    found = {name: _version(name) for name in ("jax-cuda12-pjrt", "jax-cuda13-pjrt")}
    versions = {name: version for name, version in found.items() if version}
    if not versions:
        return f"XLA's compiler for CUDA is not installed: {_INSTALL}."
    if jax.__version__ not in versions.values():
        name, version = versions.popitem()
        return f'{name} {version} is not for jax {jax.__version__}: pip install "{name}=={jax.__version__}".'
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        return f"JAX would look for a GPU: {_INSTALL}."
    try:
        _devices("h100", 1)
    except Exception as error:
        return f"XLA's compiler for CUDA does not load ({error}): {_INSTALL}."
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
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
    """The PTX of every kernel that is compiled for the function, by the kernel's name; each with its file's head."""
    kernels = {}
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        compile_for(gpu, function, *args, options={**(options or {}), **dump})
        for path in pathlib.Path(folder).glob("*.ptx"):
            head, *entries = re.split(r"\.entry (?=[\w$]+\()", path.read_text())
            kernels.update({entry[: entry.index("(")]: head + entry for entry in entries})
    return kernels


def load_widths(kernel_ptx: str) -> collections.Counter[int]:
    """How many instructions load how many bytes at once from device memory, for every thread; 16 is a full vector."""
    loads = re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\b", kernel_ptx)
    return collections.Counter(int(count or 1) * int(bits) // 8 for count, bits in loads)
