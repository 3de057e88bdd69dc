import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

from eqx_dynloss import linear, models
from eqx_dynloss.loss import softmax_cross_entropy
from eqx_dynloss.models import MLP, Convolution, Myrtle

from .helpers import slow, tree_allclose, undecorated


def sizes(model):
    arrays = [leaf for leaf in jax.tree.leaves(model) if eqx.is_array(leaf)]
    weights = sum(leaf.size for leaf in arrays if leaf.ndim > 1)
    return weights, sum(leaf.size for leaf in arrays) - weights


def test_the_papers_networks_have_the_stated_numbers_of_parameters(getkey):
    assert sizes(Myrtle(64, key=getkey())) == (112_960, 266)
    assert sum(sizes(MLP(2, 100, 3, key=getkey()))) == 603


@pytest.mark.parametrize(
    "in_size, depth, use_bias", [(2, 1, True), (2, 3, True), (2, 1, False), (1, 0, True), (5, 1, True)]
)
def test_mlp_is_its_layers_one_after_another(getkey, in_size, depth, use_bias):
    model = MLP(in_size, 7, 3, depth=depth, init="glorot", use_bias=use_bias, key=getkey())
    x = jr.normal(getkey(), (6, in_size))
    expected = np.asarray(x, np.float64)
    for number, layer in enumerate(model.layers):
        expected = expected @ np.asarray(layer.weight, np.float64).T
        expected += 0 if layer.bias is None else np.asarray(layer.bias, np.float64)
        expected = np.maximum(expected, 0) if number < depth else expected
    np.testing.assert_allclose(jax.vmap(model)(x), expected, rtol=1e-5, atol=1e-6)
    assert jnp.all(jnp.isnan(model(x[0].at[0].set(jnp.nan))))


@pytest.mark.parametrize("in_size, out_size, use_bias", [(2, 3, True), (1, 1, True), (4, 4, False), (3, 2, False)])
def test_what_other_platforms_than_a_cpu_run_is_the_same_layer(in_size, out_size, use_bias, getkey, x64):
    layer = MLP(in_size, 1, out_size, depth=0, init="glorot", use_bias=use_bias, key=getkey()).layers[0]
    x = jr.normal(getkey(), (in_size,))
    assert tree_allclose(linear._few_inputs(layer.weight, layer.bias, x), layer(x))
    assert tree_allclose(linear._few_outputs(layer.weight, x), layer.weight @ x)


@pytest.mark.parametrize("in_size, width, depth", [slow(2, 100, 1), slow(1, 7, 1), (4, 3, 2), slow(5, 7, 1)])
def test_derivatives_of_an_mlp_are_those_of_its_layers(in_size, width, depth, getkey, x64):
    """Gradients, products with the Hessian and Jacobians, also of several networks side by side."""
    models = eqx.filter_vmap(lambda key: MLP(in_size, width, 3, depth=depth, key=key))(jr.split(getkey(), 2))
    x = jr.normal(getkey(), (6, in_size))

    def by_the_book(model, x):
        *hidden, last = model.layers
        for layer in hidden:
            x = jnp.maximum(x @ layer.weight.T + layer.bias.reshape(1, -1), 0)
        return x @ last.weight.T + last.bias.reshape(1, -1)

    def derivatives(outputs):
        def of_one(arrays):
            out = lambda arrays: outputs(eqx.combine(arrays, static), x)
            gradient = jax.grad(lambda arrays: jnp.sum(jnp.sin(out(arrays))))
            return gradient(arrays), jax.jvp(gradient, (arrays,), (arrays,)), jax.jacfwd(out)(arrays)

        arrays, static = eqx.partition(models, eqx.is_array)
        together_and_alone = lambda arrays: (
            jax.vmap(of_one)(arrays),
            of_one(jax.tree.map(lambda leaf: leaf[0], arrays)),
        )
        return jax.jit(together_and_alone)(arrays)

    assert tree_allclose(derivatives(lambda model, x: jax.vmap(model)(x)), derivatives(by_the_book))


def myrtle_by_the_book(model, images):
    """Myrtle5 as the reference describes it, on a batch, from XLA's own convolution and pooling."""

    def conv(x, layer):
        x = lax.conv_general_dilated(x, layer.kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.maximum(x + layer.bias.reshape(1, 1, 1, -1), 0)

    def pool(x):
        return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4

    first, second, third, fourth = model.convolutions
    x = pool(conv(conv(images, first), second))
    x = conv(pool(conv(x, third)), fourth)
    return jnp.mean(x, (1, 2)) @ model.head.weight.T + model.head.bias.reshape(1, -1)


def test_myrtle_computes_what_the_reference_describes(getkey):
    model, images = Myrtle(8, key=getkey()), jr.normal(getkey(), (3, 32, 32, 3))
    of_both = jax.jit(lambda images: (jax.vmap(model)(images), myrtle_by_the_book(model, images)))
    assert tree_allclose(*of_both(images), atol=1e-5)


def test_derivatives_of_myrtle_are_those_of_the_reference(getkey, x64):
    """Gradients, products with the Hessian and Jacobians; ReLU and pools have derivatives of their own."""
    model, images = Myrtle(3, key=getkey()), jr.normal(getkey(), (2, 8, 8, 3))
    arrays, static = eqx.partition(model, eqx.is_array)

    def derivatives(outputs):
        def of_one(arrays):
            out = lambda arrays: outputs(eqx.combine(arrays, static), images)
            gradient = jax.grad(lambda arrays: jnp.sum(jnp.sin(out(arrays))))
            return gradient(arrays), jax.jvp(gradient, (arrays,), (arrays,)), jax.jacfwd(out)(arrays)

        return jax.jit(of_one)(arrays)

    assert tree_allclose(derivatives(lambda model, x: jax.vmap(model)(x)), derivatives(myrtle_by_the_book))


def value_and_gradient(key, images, compute_dtype):
    """Of a weighted cross-entropy of Myrtle5-16."""
    model = Myrtle(16, compute_dtype=compute_dtype, key=key)
    labels, weights = jnp.arange(len(images)) % 2, jnp.linspace(0.5, 1.5, 10)
    loss = lambda model: jnp.mean(softmax_cross_entropy(jax.vmap(model)(images), labels, weights))
    return eqx.filter_jit(eqx.filter_value_and_grad(loss))(model)


def test_every_gradient_in_bfloat16_is_near_that_in_float32(getkey):
    """One part in a hundred; a bias's gradient summed in bfloat16 would be a third off."""
    key, images = getkey(), jr.normal(getkey(), (64, 32, 32, 3)) + 1
    (value, expected), (rounded, actual) = (value_and_gradient(key, images, dtype) for dtype in (None, jnp.bfloat16))
    assert rounded.dtype == jnp.float32 and 0 < abs(rounded / value - 1) < 1e-3
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype == jnp.float32
        assert 0 < jnp.linalg.norm(ours - theirs) < 0.015 * jnp.linalg.norm(theirs)


@pytest.mark.parametrize("compute_dtype", [None, jnp.bfloat16])
def test_a_pixel_that_is_not_a_number_ends_in_nan(compute_dtype, getkey):
    value, gradient = value_and_gradient(getkey(), jnp.ones((4, 8, 8, 3)).at[1, 3, 3, 0].set(jnp.nan), compute_dtype)
    assert jnp.isnan(value) and all(jnp.all(jnp.isnan(leaf)) for leaf in jax.tree.leaves(gradient))


def test_the_compute_dtype_is_that_of_the_parameters_unless_it_is_given(getkey, x64):
    image = jnp.ones((8, 8, 3), jnp.float32)
    assert Myrtle(2, key=getkey())(image).dtype == jnp.float64
    model = Myrtle(2, compute_dtype="float32", key=getkey())
    assert model(image).dtype == jnp.float64  # of the linear layer
    assert model.convolutions[0](image.transpose(2, 0, 1)).dtype == jnp.float32


def test_relu_is_jaxs_with_all_its_derivatives():
    """Zero at zero, of either sign."""
    x = jnp.array([-2.0, -0.0, 0.0, 1e-30, 3.0, jnp.inf])
    square = lambda relu: lambda x: relu(x) ** 2
    nth = [lambda f: f, jax.grad, lambda f: jax.grad(jax.grad(f)), lambda f: jax.jacfwd(jax.grad(f))]
    for derivative in nth:
        ours, theirs = (jax.vmap(derivative(square(relu)))(x) for relu in (models._relu, jax.nn.relu))
        np.testing.assert_array_equal(ours, theirs)


def test_gradients_of_vmapped_models_equal_those_of_each_alone(getkey):
    keys, images = jr.split(getkey(), 3), jr.normal(getkey(), (4, 8, 8, 3))

    @eqx.filter_jit
    def gradient(model):
        return eqx.filter_grad(lambda m: jnp.sum(jax.vmap(m)(images) ** 2))(model)

    together = eqx.filter_vmap(gradient)(eqx.filter_vmap(lambda key: Myrtle(5, key=key))(keys))
    for i, key in enumerate(keys):
        alone = gradient(Myrtle(5, key=key))
        assert tree_allclose(jax.tree.map(lambda leaf, i=i: leaf[i], together), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["paper", "glorot"])
def test_mlp_initialisation_has_the_stated_distribution(init, getkey):
    model = MLP(50, 2000, 30, init=init, key=getkey())
    for layer, fan_in, fan_out in zip(model.layers, (50, 2000), (2000, 30), strict=True):
        variance = 1 / fan_in if init == "paper" else 2 / (fan_in + fan_out)
        weight = np.asarray(layer.weight)
        assert abs(weight.mean()) < 5 * (variance / weight.size) ** 0.5
        assert np.isclose(weight.var(), variance, rtol=0.03)
        if init == "glorot":
            assert np.abs(weight).max() < 2.3 * variance**0.5  # truncated at two standard deviations before rescaling
            assert np.isclose(np.std(np.asarray(model.layers[0].bias)), 0.01, rtol=0.1)
        else:
            assert np.abs(weight).max() > 3 * variance**0.5
            assert not np.any(layer.bias)


def test_myrtle_initialisation_is_he_normal_with_zero_biases(getkey):
    model = Myrtle(64, key=getkey())
    for layer in model.convolutions[1:]:
        assert np.isclose(np.var(layer.kernel), 2 / (9 * 64), rtol=0.03)
        assert not np.any(layer.bias)
    assert np.isclose(np.var(model.head.weight), 2 / 64, rtol=0.2)


def test_a_kernel_is_what_jaxs_initialiser_draws_with_all_four_axes(getkey):
    key = getkey()
    layer = Convolution(3, 5, key=key)
    assert tree_allclose(layer.kernel, jax.nn.initializers.he_normal()(key, (3, 3, 3, 5), float), rtol=0, atol=0)


def test_keys_decide_the_parameters(getkey):
    key = getkey()
    assert tree_allclose(MLP(2, 10, 3, key=key), MLP(2, 10, 3, key=key), rtol=0, atol=0)
    assert not tree_allclose(MLP(2, 10, 3, key=key), MLP(2, 10, 3, key=getkey()))


def test_depth_counts_hidden_layers(getkey):
    model = MLP(4, 7, 2, depth=3, key=getkey())
    assert [layer.weight.shape for layer in model.layers] == [(7, 4), (7, 7), (7, 7), (2, 7)]
    assert model(jnp.ones(4)).shape == (2,)


def test_an_unknown_initialisation_is_an_error(getkey):
    with pytest.raises(ValueError, match='init must be "paper" or "glorot", got \'lecun\''):
        undecorated(MLP.__init__)(object.__new__(MLP), 2, 10, 3, init="lecun", key=getkey())


@pytest.mark.parametrize("init", ["paper", "glorot"])
def test_without_biases_the_weights_are_the_same(init, getkey):
    key = getkey()
    without, usual = (MLP(2, 100, 3, init=init, use_bias=flag, key=key) for flag in (False, True))
    assert sum(leaf.size for leaf in jax.tree.leaves(without)) == 500
    for mine, theirs in zip(without.layers, usual.layers, strict=True):
        assert mine.bias is None and np.array_equal(mine.weight, theirs.weight)
