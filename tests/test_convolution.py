"""The oracle is `lax.conv_general_dilated` with JAX's own derivatives and batching, in float64."""

import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from eqx_dynloss import convolution, winograd
from eqx_dynloss.convolution import conv3x3

from .helpers import slow, tree_allclose, undecorated
from .kernels import hlo

pytestmark = pytest.mark.usefixtures("x64")


def reference(x, k):
    flat = x.reshape(-1, *x.shape[-3:])
    out = lax.conv_general_dilated(flat, k, (1, 1), "SAME", dimension_numbers=("NCHW", "HWIO", "NCHW"))
    return out.reshape(*x.shape[:-3], *out.shape[1:])


def scalar(conv):
    return lambda x, k: jnp.sum(jnp.tanh(conv(x, k)) ** 2)


def gradient(conv):
    return jax.grad(scalar(conv), (0, 1))


def descend(conv, k, xs):
    """Three steps of gradient descent on the kernel, in a scan."""

    def step(k, x):
        return k - 0.01 * jax.grad(scalar(conv), 1)(x, k), scalar(conv)(x, k)

    return lax.scan(step, k, xs)


# Each takes the convolution, images [5, 3, 7, 6] and a kernel [3, 3, 3, 4], and tangents of both.
TRANSFORMS = {
    "value": lambda c, x, k, dx, dk: c(x, k),
    "one image": lambda c, x, k, dx, dk: c(x[0], k),
    "grad": lambda c, x, k, dx, dk: gradient(c)(x, k),
    "jvp": lambda c, x, k, dx, dk: jax.jvp(scalar(c), (x, k), (dx, dk)),
    "jvp of grad": lambda c, x, k, dx, dk: jax.jvp(gradient(c), (x, k), (dx, dk)),
    "grad of jvp": lambda c, x, k, dx, dk: jax.grad(
        lambda x, k: jax.jvp(scalar(c), (x, k), (dx, dk))[1], argnums=(0, 1)
    )(x, k),
    "linearize of grad": lambda c, x, k, dx, dk: jax.linearize(gradient(c), x, k)[1](dx, dk),
    "hessian": lambda c, x, k, dx, dk: jax.hessian(scalar(c), (0, 1))(x[:1, :, :3, :3], k),
    "reverse over reverse": lambda c, x, k, dx, dk: jax.jacrev(jax.jacrev(scalar(c), 1), 0)(x[:1, :, :3, :3], k),
    "jacfwd": lambda c, x, k, dx, dk: jax.jacfwd(c, (0, 1))(x[:1], k),
    "jacrev": lambda c, x, k, dx, dk: jax.jacrev(c, (0, 1))(x[:1], k),
    "scan": lambda c, x, k, dx, dk: descend(c, k, jnp.stack([x, dx, x + 1])),
    "grad through scan": lambda c, x, k, dx, dk: jax.grad(
        lambda k: jnp.sum(descend(c, k, jnp.stack([x, dx, x + 1]))[1])
    )(k),
    "remat": lambda c, x, k, dx, dk: jax.grad(jax.checkpoint(scalar(c)), (0, 1))(x, k),
    "vmap per image": lambda c, x, k, dx, dk: jax.vmap(lambda image: gradient(c)(image, k))(x),
    "nested vmap": lambda c, x, k, dx, dk: jax.vmap(
        lambda k: jax.vmap(lambda image: jax.grad(scalar(c), 1)(image, k))(x)
    )(jnp.stack([k, dk])),
    "vmap over other axes": lambda c, x, k, dx, dk: jax.vmap(c, (3, 2), 2)(
        jnp.stack([x, dx], 3), jnp.stack([k, dk], 2)
    ),
    "vmap over no images": lambda c, x, k, dx, dk: (
        jax.vmap(gradient(c), (0, None))(x[:0], k) if c is conv3x3 else (0 * x[:0], jnp.zeros((0, 3, 3, 3, 4)))
    ),
    "shard_map": lambda c, x, k, dx, dk: jax.jit(
        jax.shard_map(
            lambda x, k: (gradient(c)(x, k)[0], descend(c, k, x[None])),
            mesh=Mesh(jax.devices()[:1], ("data",)),
            in_specs=(P("data"), P()),
            out_specs=(P("data"), (P(), P("data"))),
        )
    )(x, k),
    "empty batch": lambda c, x, k, dx, dk: jax.grad(lambda k: jnp.sum(c(x[:0], k)))(k) if c is conv3x3 else 0 * k,
}


def check(transform):
    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.normal(size=shape)) for shape in 2 * [(5, 3, 7, 6), (3, 3, 3, 4)]]
    ours, theirs = jax.jit(lambda *args: (transform(conv3x3, *args), transform(reference, *args)))(*args)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_equals_xlas_convolution_under(transform):
    check(transform)


@pytest.mark.parametrize("transform", ["grad", "jvp of grad", "scan", "shard_map"])
def test_equals_xlas_convolution_image_by_image_under(transform, monkeypatch):
    """As of many images on a CPU, a cacheful at a time."""
    monkeypatch.setattr(winograd, "CACHED", 1)
    check(TRANSFORMS[transform])


BATCHED = {
    "value": lambda c: c,
    "grad": gradient,
    "hessian-vector product": lambda c: lambda x, k: jax.jvp(gradient(c), (x, k), (x, k)),
    "linearize": lambda c: lambda x, k: jax.linearize(gradient(c), x, k)[1](x, k),
}


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=["images", "kernels", "both"])
@pytest.mark.parametrize("function", BATCHED.values(), ids=BATCHED.keys())
def test_equals_xlas_convolution_under_vmap(function, axes):
    def transform(c, x, k, dx, dk):
        args = [jnp.stack([a, b, a + 1]) if axis == 0 else a for a, b, axis in zip((x, k), (dx, dk), axes, strict=True)]
        return jax.vmap(function(c), axes)(*args)

    check(transform)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=["images", "kernels", "both"])
def test_gradient_of_vmap_equals_xlas(axes):
    def transform(c, x, k, dx, dk):
        args = [jnp.stack([a, b]) if axis == 0 else a for a, b, axis in zip((x, k), (dx, dk), axes, strict=True)]
        return gradient(jax.vmap(c, axes))(*args)

    check(transform)


@pytest.mark.parametrize("num_images", [slow(1), slow(4), slow(8), 9])
@pytest.mark.parametrize(
    "size, channels",
    [((1, 1), (2, 3)), ((2, 3), (2, 3)), ((64, 65), (2, 3)), ((32, 31), (16, 17)), ((1, 256), (16, 16))]
    + [slow((256, 127), (2, 3)), slow((64, 65), (17, 16)), slow((256, 1), (16, 16)), slow((8, 8), (16, 16))],
)
def test_many_images_a_part_at_a_time(num_images, size, channels):
    check_gradient(num_images, size, channels)


@pytest.mark.parametrize("which", ["convolution", "input gradient", "weight gradient"])
def test_many_images_take_hardly_more_memory_than_few(which):
    """On a CPU: copies of all of them at once were three times as large as they are."""

    def temporaries(num_images):
        x, k = jnp.zeros((num_images, 16, 32, 32)), jnp.zeros((3, 3, 16, 16))
        function = {
            "convolution": lambda x, k: conv3x3(x, k),
            "input gradient": lambda dy, k: jax.vjp(lambda x: conv3x3(x, k), x)[1](dy),
            "weight gradient": lambda x, dy: jax.vjp(lambda k: conv3x3(x, k), k)[1](dy),
        }[which]
        args = (x, x) if which == "weight gradient" else (x, k)
        return hlo.temporary_bytes(jax.jit(function).lower(*args).compile())

    few, many = temporaries(4), temporaries(64)
    assert many < 2 * few + 1e5, (few, many)


@pytest.mark.parametrize("width", [1, slow(2), slow(6), slow(3), 9])
@pytest.mark.parametrize(
    "channels", [(1, 1), slow((3, 8)), (3, 16), slow((3, 32)), (7, 5), slow((8, 8)), (16, 3), slow((16, 16)), (12, 17)]
)
def test_few_channels_at_any_width(channels, width):
    check_gradient(2, (4, width), channels)


def check_gradient(num_images, size, channels):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(num_images, channels[0], *size)))
    k = jnp.asarray(rng.normal(size=(3, 3, *channels)))
    of_both = jax.jit(lambda *args: [(conv(*args), *gradient(conv)(*args)) for conv in (conv3x3, reference)])
    for ours, theirs in zip(*of_both(x, k), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels", [(3, 16), (17, 17)])
def test_a_pixel_that_is_not_finite_is_not_lost_and_stays_near(channels):
    """In its group of four rows, in the next where it is beside it, and in its columns."""
    rng = np.random.default_rng(2)
    images, k = rng.normal(size=(2, channels[0], 9, 16)), jnp.asarray(rng.normal(size=(3, 3, *channels)))
    finite = jax.jit(lambda x: [jnp.isfinite(conv(x, k)) for conv in (conv3x3, reference)])
    for value, row in itertools.product([np.nan, np.inf], [0, 2, 3, 4, 6, 8]):
        x = images.copy()
        x[0, 1, row, 8] = value
        ours, theirs = map(np.asarray, finite(x))
        assert not np.any(ours & ~theirs) and not np.all(theirs), (value, row)
        _, _, rows, columns = np.nonzero(~ours)
        assert np.all(ours[1]) and set(columns) == {7, 8, 9}, (value, row)
        assert set(rows // 4) == {max(0, row - 1) // 4, min(8, row + 1) // 4}, (value, row)


@pytest.mark.parametrize("channels", [1, 16, 64])
def test_rounds_little_more_than_the_definition(channels):
    rng = np.random.default_rng(5)
    x = np.maximum(rng.normal(size=(4, channels, 16, 16)), 0)
    k = rng.normal(size=(3, 3, channels, channels)) / np.sqrt(4.5 * channels)
    rounded = [jnp.asarray(a, jnp.float32) for a in (x, k)]
    exact = np.asarray(reference(*(a.astype(float) for a in rounded)))
    error = lambda conv: np.std(np.asarray(conv(*rounded)) - exact) / np.std(exact)
    assert error(conv3x3) < 6e-7 and error(conv3x3) < 3.5 * error(reference)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_keeps_the_dtype(dtype):
    rng = np.random.default_rng(2)
    x, k = jnp.asarray(rng.normal(size=(2, 3, 8, 8)), dtype), jnp.asarray(rng.normal(size=(3, 3, 3, 4)), dtype)
    out = conv3x3(x, k)
    assert out.dtype == dtype
    exact = reference(x.astype(float), k.astype(float))
    np.testing.assert_allclose(out.astype(float), exact, atol=20 * float(jnp.finfo(dtype).eps), rtol=0.02)


@pytest.mark.parametrize("channels", [(3, 4), (16, 16)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_sums_over_many_pixels_in_enough_precision(dtype, channels):
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(64, channels[0], 16, 16)), dtype)
    k = jnp.asarray(rng.normal(size=(3, 3, *channels)), dtype)
    sum_of_squares = lambda conv: jax.jit(jax.grad(lambda x, k: 1e-3 * jnp.sum(conv(x, k).astype(float) ** 2), (0, 1)))
    exact = sum_of_squares(reference)(x.astype(float), k.astype(float))
    for ours, theirs in zip(sum_of_squares(conv3x3)(x, k), exact, strict=True):
        assert ours.dtype == dtype
        error = np.linalg.norm(ours.astype(float) - theirs) / np.linalg.norm(theirs)
        # 16-bit numbers are summed in float32, which itself rounds at each of the 16,384 terms, like XLA's convolution.
        assert error < (10 if dtype == jnp.float32 else 2) * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("channels", [(3, 16), (1, 4), (8, 3), (9, 17)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_what_gpus_run_are_the_same_three_maps(dtype, channels):
    """With small whole numbers, so that 16 bits hold every sum exactly."""
    rng = np.random.default_rng(4)
    draw = lambda *shape: jnp.asarray(rng.integers(-1, 2, shape), dtype)
    x, k, dy = draw(2, channels[0], 4, 5), draw(3, 3, *channels), draw(2, channels[1], 4, 5)

    @jax.jit
    def of_both(x, k, dy):
        out, pullback = jax.vjp(reference, x.astype(float), k.astype(float))
        ours = convolution._conv(x, k), convolution._input_grad(dy, k), convolution._weight_grad(x, dy)
        return ours, (out, *pullback(dy.astype(float)))

    for actual, expected in zip(*of_both(x, k, dy), strict=True):
        assert actual.dtype == dtype
        np.testing.assert_array_equal(actual.astype(float), expected)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_members_never_make_a_grouped_convolution(platform):
    x, k = jnp.zeros((4, 2, 3, 8, 8)), jnp.zeros((4, 3, 3, 3, 5))
    text = jax.jit(jax.vmap(gradient(conv3x3))).trace(x, k).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.convolution" in text) == (platform == "cuda")  # on a CPU products
    assert "feature_group_count = 1" in text or "feature_group_count" not in text
    assert not any(f"group_count = {n}" in text for n in range(2, 100))


@pytest.mark.parametrize("shape", [(3, 3, 2, 4), (5, 5, 3, 4), (3, 3, 3)])
def test_a_kernel_that_does_not_fit_is_an_error_that_says_so(shape):
    with pytest.raises(ValueError, match=r"the kernel \[3, 3, in_channels, out_channels\], got"):
        undecorated(conv3x3)(jnp.zeros((2, 3, 8, 8)), jnp.zeros(shape))


@pytest.mark.parametrize("transform", [lambda f: f, jax.vmap], ids=["alone", "members"])
def test_without_jit_it_is_the_same(transform, getkey):
    x, k = jr.normal(getkey(), (2, 1, 2, 4, 4)), jr.normal(getkey(), (2, 3, 3, 2, 3))
    args = (x, k) if transform is jax.vmap else (x[0], k[0])
    gradient = transform(jax.grad(lambda x, k: jnp.sum(conv3x3(x, k) ** 2), (0, 1)))
    expected = jax.jit(gradient)(*args)
    with jax.disable_jit():
        assert tree_allclose(gradient(*args), expected)
