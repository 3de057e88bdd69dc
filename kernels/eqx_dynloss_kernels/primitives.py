"""What all our primitives have in common."""

import functools as ft
from typing import Any

import jax
from jax import Array, lax
from jax.extend.core import Primitive


def run(primitive: Primitive, *args: Array, **params: Any) -> Any:
    """What a primitive does outside of `jax.jit`: the same as inside. For `Primitive.def_impl`."""
    with jax.disable_jit(False):  # where it is disabled, the primitive would call itself for ever
        return compiled(primitive, **params)(*args)


@ft.cache
def compiled(primitive: Primitive, **params: Any) -> Any:
    return jax.jit(ft.partial(primitive.bind, **params))


def vary_alike(*operands: Array) -> list[Array]:
    """Inside `shard_map`, marks all operands as varying over the mesh axes that any of them varies over."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    missing = [tuple(frozenset().union(*varying) - axes) for axes in varying]
    return [lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(operands, missing, strict=True)]
