"""Values for the hyperparameters of an optimiser, which may differ between the members of an ensemble."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import PyTree


def inject(opt_state: PyTree, hyperparams: Mapping[str, ArrayLike]) -> PyTree:
    """The state of an optimiser with other values for hyperparameters, by name.

    They are those that `optax.inject_hyperparams` was asked for, of the whole optimiser or of parts of it, such as a
    link of an `optax.chain`; a name that several parts have is set in all of them.

    **Raises:** `ValueError` for names that it does not have, and for those that it sets by a schedule of its own.
    """
    nodes, structure = jax.tree.flatten(opt_state, is_leaf=_is_injected)
    injected = [node for node in nodes if _is_injected(node)]
    scheduled = sorted({name for node in injected for name in hyperparams if name in node.hyperparams_states})
    if scheduled:
        raise ValueError(
            f"the optimiser sets {', '.join(scheduled)} by a schedule of its own, which would overwrite a value: "
            "inject a number that scales the schedule instead."
        )
    known = list(dict.fromkeys(name for node in injected for name in node.hyperparams))
    unknown = sorted(set(hyperparams) - set(known))
    if unknown:
        raise ValueError(
            f"the optimiser has no hyperparameter {', '.join(unknown)}; those that it was given with "
            f"optax.inject_hyperparams are: {', '.join(known) or 'none'}."
        )
    return structure.unflatten(_with_values(node, hyperparams) if _is_injected(node) else node for node in nodes)


def _is_injected(node: Any) -> bool:
    return hasattr(node, "hyperparams") and hasattr(node, "hyperparams_states")


def _with_values(node: Any, hyperparams: Mapping[str, ArrayLike]) -> Any:
    own = node.hyperparams
    # An optimiser that was given 1 holds an integer, which would truncate 0.5 to 0.
    dtype = lambda old: old.dtype if jnp.issubdtype(old.dtype, jnp.floating) else float
    values = {name: jnp.asarray(value, dtype(own[name])) for name, value in hyperparams.items() if name in own}
    return node._replace(hyperparams=own | values)
