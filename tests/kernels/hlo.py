"""Facts about a compiled program, read off its optimised HLO: launches, memory traffic, communication."""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Kernel(NamedTuple):
    """A launch: a Pallas kernel has its own name and the kind "pallas", a library call its target as its kind."""

    name: str
    kind: str


def kernels(compiled: jax.stages.Compiled) -> list[Kernel]:
    """What a run launches, in order. The body of a loop and every branch of a conditional are listed once.

    One operation that runs on the device counts as one, even where XLA or a library may take several launches for it: a
    sort, a convolution.
    """
    return [kernel for kernel, _ in results(compiled)]


def results(compiled: jax.stages.Compiled) -> list[tuple[Kernel, str]]:
    """Each launch with the type of what it writes, in XLA's words: `bf16[512,32,32,64]{3,2,1,0}`."""
    program = _parse(compiled)
    return [(_kernel(op), op.type) for op in _launches(program, program["ENTRY"])]


def collectives(compiled: jax.stages.Compiled) -> list[str]:
    """The communication between GPUs, in order: "all-gather", "all-reduce", …"""
    communication = re.compile("all-|reduce-scatter|collective-|ragged-|send|recv")
    return [kernel.kind for kernel in kernels(compiled) if communication.match(kernel.kind)]


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Device memory that a run needs besides its arguments and results."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError("The compiler does not tell how much memory the program needs.")
    return analysis.temp_size_in_bytes


def memory_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of device memory that a run moves, on one GPU, if each kernel reads its inputs once and writes its outputs.

    The model: caches keep nothing from one kernel to the next, and everything within a kernel. An operand that a kernel
    takes twice counts once. Of an operand that is sliced or gathered from, the elements that are used count; of one
    that is updated in place, those that are written. A loop counts as often as it runs, a conditional by its dearest
    branch. Memory is counted by element, not by sector of 32 bytes, which a gather of single elements reads. What a
    Pallas kernel or a library does with its operands nobody knows: they count as a whole.
    """
    program = _parse(compiled)
    return _traffic(program, program["ENTRY"])


# Below, the optimised program is read from its text, the only public form that it has.


class _Op(NamedTuple):
    name: str
    type: str
    code: str
    operands: list[str]
    rest: str  # operands and attributes
    is_root: bool

    def called(self, attribute: str) -> list[str]:
        names = re.search(rf"\b{attribute}=(%[\w.-]+|\{{[^}}]*\}})", self.rest)
        return re.findall(r"%([\w.-]+)", names[1]) if names else []


_Program = dict[str, dict[str, _Op]]  # computations by name, and their operations in order, by name

_IN_PLACE = ("dynamic-update-slice", "scatter")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "add-dependency"}


def _parse(compiled: jax.stages.Compiled) -> _Program:
    program: _Program = {}
    ops: dict[str, _Op] = {}
    for line in (compiled.as_text() or "").splitlines():
        if header := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
            ops = program["ENTRY" if header[1] else header[2]] = {}
        elif op := re.match(r"\s+(ROOT )?%([\w.-]+) = (.*)", line):
            end = _closing(op[3], 0) if op[3].startswith("(") else op[3].index(" ")
            start = op[3].index("(", end)
            stop = _closing(op[3], start)
            code, operands = op[3][end:start].strip(), re.findall(r"%([\w.-]+)", op[3][start:stop])
            ops[op[2]] = _Op(op[2], op[3][:end], code, operands, op[3][start:], bool(op[1]))
    return program


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    raise ValueError(f"No closing parenthesis: {text}")


def _launches(program: _Program, ops: dict[str, _Op]) -> Iterator[_Op]:
    for op in ops.values():
        children = _children(op)
        if children is not None:
            for child in children:
                yield from _launches(program, program[child])
        elif op.code not in _FREE and not op.code.endswith(("-done", "-update")):
            yield op


def _children(op: _Op) -> list[str] | None:
    """The computations that an operation launches one by one; None if it is one launch, or none, itself."""
    if op.code == "while":
        return ([] if _trips(op) else op.called("condition")) + op.called("body")
    if op.code == "conditional":
        return op.called("branch_computations") or op.called("true_computation") + op.called("false_computation")
    if op.code == "call":
        return op.called("to_apply")
    if op.code == "async-start":
        return op.called("calls")
    return None


def _trips(loop: _Op) -> int:
    """How often a loop runs, 0 if the compiler does not know."""
    count = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    return int(count[1]) if count else 0


def _kernel(op: _Op) -> Kernel:
    if op.code in ("fusion", "fusion-start"):
        kind = "triton" if '"kind":"__triton' in op.rest else re.findall(r"\bkind=k(\w+)", op.rest)[0].lower()
        return Kernel(op.name, f"{kind} fusion")
    if op.code == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', op.rest)
        name = re.search(r'\bname = "([^"]*)"', op.rest)
        if target and "triton" in target[1]:
            return Kernel(name[1] if name else op.name, "pallas")
        return Kernel(op.name, target[1] if target else op.code)
    return Kernel(op.name, op.code.removesuffix("-start"))


def _arrays(type: str) -> list[tuple[int, int]]:
    """Of each array of a type, the number of elements and the bits of one."""
    arrays = re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", type)
    bits = {"pred": 8, "token": 0, "opaque": 0}
    width = lambda dtype: bits[dtype] if dtype in bits else int(re.sub(r"^[a-z]+(\d+).*", r"\1", dtype))
    return [(math.prod(map(int, filter(None, dims.split(",")))), width(dtype)) for dtype, dims in arrays]


def _bytes(type: str) -> int:
    return sum(-(-count * bits // 8) for count, bits in _arrays(type))


def _elements(type: str) -> int:
    return sum(count for count, _ in _arrays(type))


def _traffic(program: _Program, ops: dict[str, _Op]) -> int:
    total = 0
    for op in ops.values():
        children = _children(op)
        if children is not None:
            costs = [_traffic(program, program[child]) for child in children]
            if op.code == "while" and not _trips(op):
                raise ValueError(f"Nobody knows how often the loop {op.name} runs.")
            total += max(costs) if op.code == "conditional" else max(1, _trips(op)) * sum(costs)
        elif op.code in ("fusion", "fusion-start"):
            total += _fusion_bytes(program[op.called("calls")[0]], [_source(ops, name) for name in op.operands])
        elif op.code.endswith("-start"):
            total += sum(_bytes(ops[name].type) for name in set(op.operands))
        elif op.code.endswith("-done"):
            total += 0 if op.code in ("async-done", "fusion-done") else _bytes(op.type)
        elif op.code not in _FREE and not op.code.endswith("-update"):
            names = list(dict.fromkeys(op.operands))
            body = {n: ops[n]._replace(code="parameter", operands=[], rest=f"({i})") for i, n in enumerate(names)}
            total += _fusion_bytes({**body, op.name: op._replace(is_root=True)}, [_source(ops, n) for n in names])
    return total


def _source(ops: dict[str, _Op], name: str) -> tuple[str, str]:
    """Where an operand comes from: the operation that made it, and which of its results it is."""
    index = ""
    while ops[name].code in ("bitcast", "get-tuple-element"):
        index += "".join(re.findall(r"\bindex=\d+", ops[name].rest))
        name = ops[name].operands[0]
    return name, index


def _fusion_bytes(body: dict[str, _Op], sources: list[tuple[str, str]]) -> int:
    """What one kernel reads and writes: from its results back to its parameters, how many elements of each are used."""
    used: collections.Counter[str] = collections.Counter()
    updated, written = set(), 0
    root = next(op for op in body.values() if op.is_root)
    for name in root.operands if root.code == "tuple" else [root.name]:
        used[name] += _elements(body[name].type)
        maker = body[_source(body, name)[0]]
        if maker.code in _IN_PLACE and body[_source(body, maker.operands[0])[0]].code == "parameter":
            updated.add(maker.name)
            written += _bytes(body[maker.operands[-1 if maker.code == "scatter" else 1]].type)
        else:
            written += _bytes(body[name].type)
    for op in reversed(body.values()):
        total = _elements(op.type)
        count = min(used[op.name], total)
        for i, name in enumerate(op.operands):
            size = _elements(body[name].type)
            if op.name in updated and i == 0:
                size = _elements(body[op.operands[-1]].type) if op.code == "scatter" else 0
            elif op.code in ("slice", "dynamic-slice", "gather") and i == 0:
                size = min(size, count)
            elif count < total:
                size = size * count // total if op.code == "reduce" else min(size, count)
            used[name] += size
    read: collections.Counter[tuple[str, str]] = collections.Counter()
    whole: dict[tuple[str, str], int] = {}
    for op in body.values():
        if op.code == "parameter":
            source = sources[int(op.rest[1 : op.rest.index(")")])]
            size, whole[source] = _elements(op.type), _bytes(op.type)
            read[source] += whole[source] * min(used[op.name], size) // max(1, size)
    return written + sum(min(count, whole[source]) for source, count in read.items())
