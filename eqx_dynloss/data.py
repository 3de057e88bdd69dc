"""Labelled examples, and which of them, with which keys, an update sees: functions of a key and the step alone."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int, Integer, Key, Shaped


class Dataset(eqx.Module):
    """Labelled examples as they are stored, and what turns one of them into a network's input.

    Images may stay uint8, a quarter of their size in float32: a minibatch is transformed when it is drawn. Labels are
    class indices, or distributions over the classes for a loss that takes these.
    """

    inputs: Shaped[Array, "examples ..."] = eqx.field(converter=jnp.asarray)
    labels: Integer[Array, " examples"] | Float[Array, "examples classes"] = eqx.field(converter=jnp.asarray)
    transform: Callable[[Array], Array] = eqx.nn.Identity()

    def __check_init__(self):
        if len(self.inputs) != len(self.labels):
            raise ValueError(f"got {len(self.inputs)} inputs but {len(self.labels)} labels.")

    def __len__(self) -> int:
        return len(self.labels)

    def batch(
        self, indices: Int[Array, " batch"] | slice = slice(None)
    ) -> tuple[Shaped[Array, "batch ..."], Shaped[Array, "batch ..."]]:
        """The network's inputs for some of the examples, or for all, and their labels."""
        return jax.vmap(self.transform)(self.inputs[indices]), self.labels[indices]


def minibatches(
    key: Key[Array, ""], step: Int[Array, ""], num_steps: int, num_examples: int, batch_size: int
) -> Int[Array, "{num_steps} {batch_size}"]:
    """The examples of the minibatches `step`, …, `step + num_steps - 1`: epoch e is a permutation drawn with key e."""
    per_epoch = num_examples // batch_size
    first = step // per_epoch
    num_epochs = (num_steps + 2 * per_epoch - 2) // per_epoch  # that many steps can touch, wherever they begin

    def epoch(number):
        return jr.permutation(jr.fold_in(key, number), num_examples)[: per_epoch * batch_size]

    orders = jax.vmap(epoch)(first + jnp.arange(num_epochs))
    return lax.dynamic_slice_in_dim(
        orders.reshape(num_epochs * per_epoch, batch_size), step - first * per_epoch, num_steps
    )


def example_keys(key: Key[Array, ""], step: Int[Array, ""], batch_size: int) -> Key[Array, " {batch_size}"]:
    """The keys of the examples of a batch, for models that take one; no other than those of another step."""
    return jr.split(jr.fold_in(jr.fold_in(key, 2**32 - 1), step), batch_size)  # the order of examples folds in epochs
