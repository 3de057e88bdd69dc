r"""Curvature of the loss landscape, without forming a matrix: spectra of the Hessian and the neural tangent kernel.

A matrix $A$ is a function $v \mapsto Av$. Lanczos' algorithm (`matfree`, with full reorthogonalisation) compresses it
to a small tridiagonal matrix, whose eigenvalues, the Ritz values, approach the extreme ones of $A$ first. Everything
is a pure function of arrays: it can be jitted, vmapped over the members of an ensemble, and called inside a scan.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped
from matfree import decomp

Matvec = Callable[[Float[Array, " n"]], Float[Array, " n"]]


class Spectrum(eqx.Module):
    """What Lanczos' algorithm found out about the eigenvalues of a symmetric matrix."""

    eigenvalues: Float[Array, " order"]
    """Ritz values, ascending: the largest is `eigenvalues[-1]`, never above the matrix's own."""
    errors: Float[Array, " order"]
    """Norms of the Ritz residuals: the matrix has an eigenvalue within this distance. Infinite for entries that only
    fill the array, where the start vector's Krylov space has fewer dimensions than the order."""
    weights: Float[Array, " order"]
    """The start vector's share in every Ritz vector, squared; they sum to 1."""
    vectors: Float[Array, "vectors n"]
    """Ritz vectors of the largest Ritz values, as many as were asked for, in their order: `vectors[-1]` belongs to
    `eigenvalues[-1]`. Of length 1, the entry that is largest in size positive; 0 for entries that only fill."""


def lanczos(matvec: Matvec, start: Float[Array, " n"], order: int, *, vectors: int = 0) -> Spectrum:
    r"""Ritz values of a symmetric matrix, and Ritz vectors of the largest ones.

    **Arguments:**

    - `matvec`: the product of the matrix with a vector.
    - `start`: any vector that is not orthogonal to the eigenvectors of interest; its length does not matter.
    - `order`: how many products to take; more than the dimension are not needed, and not taken.
    - `vectors`: how many Ritz vectors to return. The residual of a Ritz vector $x$ with value $\theta$, of length 1, is
        its `errors` entry: $\lVert Ax - \theta x\rVert$.
    """
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}.")
    order = min(order, len(start))
    if not 0 <= vectors <= order:
        raise ValueError(f"vectors must be between 0 and the order, {order}, got {vectors}.")
    algorithm = decomp.tridiag_sym(order, materialize=False, reortho="full", custom_vjp=False)
    basis, (diagonal, off_diagonal), residual, _ = algorithm(matvec, start)
    # Beyond an off-diagonal entry of (nearly) 0, the Krylov space is complete and what follows is made of rounding.
    scale = jnp.abs(diagonal[0]) + jnp.max(jnp.nan_to_num(jnp.abs(off_diagonal)), initial=0.0)
    goes_on = off_diagonal > 100 * jnp.finfo(start.dtype).eps * scale
    is_real = jnp.concatenate([jnp.ones(1, bool), jnp.cumprod(goes_on).astype(bool)])
    diagonal = jnp.where(is_real, diagonal, diagonal[0])
    off_diagonal = jnp.where(is_real[1:], off_diagonal, 0.0)
    last = jnp.where(is_real[-1], jnp.linalg.norm(residual), 0.0)
    small = jnp.diag(diagonal) + jnp.diag(off_diagonal, 1) + jnp.diag(off_diagonal, -1)
    eigenvalues, rotation = jnp.linalg.eigh(small)
    is_filler = jnp.sum(jnp.where(is_real[:, None], rotation, 0.0) ** 2, 0) < 0.5
    errors = jnp.where(is_filler, jnp.inf, last * jnp.abs(rotation[-1]))
    wanted = jnp.where(is_filler, 0.0, rotation)[:, order - vectors :]
    ritz = wanted.T @ jnp.where(is_real[:, None], jnp.asarray(basis), 0.0)
    ritz *= jnp.sign(jnp.take_along_axis(ritz, jnp.argmax(jnp.abs(ritz), 1)[:, None], 1))
    return Spectrum(eigenvalues, errors, jnp.where(is_filler, 0.0, rotation[0] ** 2), ritz)


def hessian(
    objective: Callable[..., Float[Array, ""]], model: PyTree, batches: PyTree | None = None
) -> tuple[Matvec, int]:
    """The Hessian of an objective in all floating-point arrays of a model, as a product with flat vectors.

    **Arguments:**

    - `objective`: a function of the model, for example the loss on all data at the schedule's present step; or, with
        `batches`, of the model and a batch. Of a model with dropout, take `eqx.nn.inference_mode(model)`.
    - `batches`: a PyTree of arrays with a leading axis of batches of equal size. The Hessian is that of the mean over
        the batches, and only one batch is in memory at a time.

    **Returns:** the product, and the number of parameters.
    """
    parameters, static = eqx.partition(model, eqx.is_inexact_array)
    flat, unravel = ravel_pytree(parameters)
    gradient = lambda p, *batch: jax.grad(lambda p: objective(eqx.combine(unravel(p), static), *batch))(p)
    if batches is None:
        return jax.linearize(gradient, flat)[1], flat.size

    def product(v):
        def add(total, batch):
            return total + jax.jvp(lambda p: gradient(p, batch), (flat,), (v,))[1], None

        total, _ = lax.scan(add, jnp.zeros_like(flat), batches)
        return total / len(jax.tree.leaves(batches)[0])

    return product, flat.size


def hessian_spectrum(
    objective: Callable[..., Float[Array, ""]],
    model: PyTree,
    batches: PyTree | None = None,
    *,
    order: int = 10,
    vectors: int = 0,
    key: Key[Array, ""],
) -> Spectrum:
    """Extreme eigenvalues of the Hessian, from a random start vector, and eigenvectors of the largest ones. See
    `hessian` and `lanczos`. A vector is flat, in the order of `jax.flatten_util.ravel_pytree`.

    Ten products, as in the paper, give the largest eigenvalue; its error comes with it. For k of them at either end,
    and for eigenvectors, take several times as many.
    """
    product, size = hessian(objective, model, batches)
    dtype = jnp.result_type(*jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
    return lanczos(product, jr.normal(key, (size,), dtype), order, vectors=vectors)


def ntk(model: PyTree, inputs: Shaped[Array, "points ..."]) -> Float[Array, "points points"]:
    r"""The empirical neural tangent kernel, averaged over the outputs: $\frac1C \sum_c J_c J_c^\top$.

    $J_c$ is the Jacobian of output c in the parameters, one row for each point. Not divided by the number of points, as
    in the paper's figure. Needs memory for points × outputs × parameters numbers; `ntk_spectrum` does not.
    """
    outputs, flat = _outputs(model, inputs)
    jacobian = jax.jacrev(outputs)(flat)  # [points, outputs, parameters]
    return jnp.einsum("icp,jcp->ij", jacobian, jacobian) / jacobian.shape[1]


def ntk_spectrum(
    model: PyTree, inputs: Shaped[Array, "points ..."], *, order: int = 10, key: Key[Array, ""]
) -> Spectrum:
    """Extreme eigenvalues of `ntk`, which is not formed."""
    outputs, flat = _outputs(model, inputs)
    value, forward = jax.linearize(outputs, flat)
    backward = jax.linear_transpose(forward, flat)
    num_outputs = value.shape[1]

    def product(v):
        def of_output(c):
            return forward(backward(jnp.zeros_like(value).at[:, c].set(v))[0])[:, c]

        return jnp.mean(jax.vmap(of_output)(jnp.arange(num_outputs)), 0)

    return lanczos(product, jr.normal(key, (len(value),), value.dtype), order)


def _outputs(model, inputs) -> tuple[Any, Array]:
    """All outputs, `[points, outputs]`, as a function of the flat parameters; and those."""
    parameters, static = eqx.partition(model, eqx.is_inexact_array)
    flat, unravel = ravel_pytree(parameters)

    def outputs(p):
        value = jax.vmap(eqx.combine(unravel(p), static))(inputs)
        return value.reshape(len(value), -1)

    return outputs, flat


def spectral_density(
    spectra: Spectrum, grid: Float[Array, " grid"], width: Float[Array, ""] | float
) -> Float[Array, " grid"]:
    r"""The density of eigenvalues, by stochastic Lanczos quadrature: Gaussians at the Ritz values.

    $$\rho(x) = \frac1K \sum_k \sum_i w_{ki}\,\mathcal N(x;\,\theta_{ki}, \sigma^2)$$

    It integrates to 1 over the real line.

    ??? cite

        Ghorbani, Krishnan and Xiao: *An Investigation into Neural Net Optimization via Hessian Eigenvalue Density*,
        ICML 2019, arXiv:1901.10159.

    **Arguments:**

    - `spectra`: a `Spectrum` whose arrays have a leading axis of probes: `jax.vmap` over the keys of random start
        vectors.
    - `grid`: where to evaluate.
    - `width`: standard deviation σ of the Gaussians.
    """
    distance = (grid[:, None, None] - spectra.eigenvalues[None]) / width
    gaussians = jnp.exp(-0.5 * distance**2) / (width * jnp.sqrt(2 * jnp.pi))
    return jnp.sum(spectra.weights[None] * gaussians, (1, 2)) / len(spectra.weights)


def one_step_difference(loss: Float[Array, "*batch steps"]) -> Float[Array, "*batch steps-1"]:
    """F[t] − F[t+1], positive where the loss falls, as the paper plots it."""
    return -jnp.diff(loss, axis=-1)


def period(
    loss: Float[Array, "*batch steps"], *, tolerance: float = 0.1, resolution: float = 1e-3
) -> Int[Array, "*batch"]:
    """After how many updates the loss repeats itself: 1, 2 or 4, or 0 if it does not.

    A loss that only drifts has period 1; past the first bifurcation it alternates (2), past the second it takes turns
    between four values (4), and then it is chaotic, or of another period (0). An oscillation so slow that it is smooth
    from one update to the next, of some five updates and more, counts as a drift. Ours: the paper reads it off by eye.

    **Arguments:**

    - `loss`: of consecutive updates, at least 9, and few enough that the schedule hardly moves: some tens.
    - `tolerance`: how much of the oscillation may be left over after a period, relative to its size.
    - `resolution`: an oscillation is one if it is larger than this, relative to the loss. The kinks of a ReLU network,
        which examples cross one after another, make a smooth descent uneven by about 1e-5.
    """
    if loss.shape[-1] < 9:
        raise ValueError(f"a period needs the loss of at least 9 updates, got {loss.shape[-1]}.")

    def change(lag):
        """Second differences, which do not see a drift. They grow with the lag squared if the loss is smooth."""
        return jnp.mean(jnp.abs(loss[..., 2 * lag :] - 2 * loss[..., lag:-lag] + loss[..., : -2 * lag]), -1)

    one, two, four = change(1), change(2), change(4)
    is_still = one <= 4 * resolution * jnp.mean(jnp.abs(loss), -1)  # ±a gives 4a
    repeats = [is_still, two <= tolerance * one, four <= tolerance * jnp.maximum(one, two), two > 2 * one]
    return jnp.select(repeats, [jnp.full(one.shape, p) for p in (1, 2, 4, 1)], 0)
