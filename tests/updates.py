"""One update of a training, as a function of arrays alone, for a compiler that needs no device."""

import equinox as eqx
import jax
import jax.random as jr
import optax

from eqx_dynloss import train
from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.schedule import OscillatingWeights


def update_of(make_model, inputs, labels, classes, members=None):
    """An update on a minibatch, of one network or of several side by side, and the shapes of its arguments.

    `inputs` and `labels` are the shapes of the minibatch; inputs of another dtype become floats in the program.
    """
    optimiser = optax.sgd(0.02, 0.9, nesterov=True)
    one_of = lambda key: (train.init(make_model, optimiser, key), DynamicalLoss(OscillatingWeights(classes, 10.0, 100)))
    all_of = one_of if members is None else eqx.filter_vmap(one_of)
    keys = jr.key(0) if members is None else jr.split(jr.key(0), members)
    arrays, static = eqx.partition(
        eqx.filter_eval_shape(all_of, keys), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    )

    def update(arrays, inputs, labels):
        state, loss = eqx.combine(arrays, static)
        state, metrics = train.train_step(state, loss, optimiser, inputs.astype(float), labels)
        return eqx.filter(state, eqx.is_array), metrics

    mapped = update if members is None else jax.vmap(update, (0, None, None))
    return mapped, (arrays, inputs, labels)
