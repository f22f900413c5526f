"""Derivatives of derivatives: right in the references that have them, and an error everywhere else, never a 0."""

import jax
import jax.numpy as jnp
import pytest
from checks import assert_close

import evo_jax
from reference.evo import EvoSpec, evo_dense
from reference.linear import LinearSpec, linear_dense
from reference.prefix_scan import prefix_sum_dense

L, D = 150, 8  # more than two chunks of linear attention
X, DIRECTION = (jax.random.normal(jax.random.key(n), (1, 2, L, D)) for n in range(2))


def swapped(attention):
    """A function of (B, L, N, D) arrays as one of a single (B, H, L, D) array."""
    return lambda x, **options: attention(*[x.swapaxes(1, 2)] * 3, **options).swapaxes(1, 2)


def softmax(x):
    scores = jnp.where(jnp.tri(L, dtype=bool), jnp.einsum("bhid,bhjd->bhij", x, x) * D**-0.5, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1) @ x


OPS = {
    "prefix sum": (evo_jax.prefix_sum, prefix_sum_dense, None),
    "evo": (
        lambda x, causal, **options: evo_jax.evo_attention(x, params(x), causal=causal, **options),
        lambda x, causal: evo_dense(x, None, params(x), None, EvoSpec(causal, True, x.dtype.name)),
        "causal",
    ),
    "linear": (
        swapped(evo_jax.linear_attention),
        swapped(lambda q, k, v, is_causal: linear_dense(q, k, v, None, None, LinearSpec(causal=is_causal))[0]),
        "is_causal",
    ),
    "flash": (swapped(evo_jax.flash_attention), softmax, None),
}  # the operation, its dense formulas, and which option says whether it is causal
BOTH = [("evo", True), ("evo", False), ("linear", True), ("linear", False)]


def params(x):
    return jax.tree.map(lambda a: a.astype(x.dtype), evo_jax.init_evo_params(jax.random.key(2), D))


def slope(function, **options):
    """The gradient of a sum of cubes: that of squares is next to 0 after a LayerNorm."""
    return jax.grad(lambda x: (function(x, **options) ** 3).sum())


def reverse_over_reverse(gradient, x):
    return jax.grad(lambda x: jnp.vdot(gradient(x), DIRECTION.astype(x.dtype)))(x)


def forward_over_reverse(gradient, x):
    return jax.jvp(gradient, (x,), (DIRECTION.astype(x.dtype),))[1]


def options_of(op, causal):
    return {} if OPS[op][2] is None else {OPS[op][2]: causal}


REVERSE = [(*case, reverse_over_reverse) for case in (*BOTH, ("prefix sum", True), ("flash", True))]
FORWARD = [(*case, forward_over_reverse) for case in (*BOTH[1:], ("flash", True))]


@pytest.mark.parametrize(("op", "causal", "mode"), REVERSE + FORWARD)
def test_references_have_them(op, causal, mode, x64):
    function, dense, _ = OPS[op]
    options, x = options_of(op, causal), X.astype("float64")
    expected = mode(slope(dense, **options), x)
    assert float(jnp.abs(expected).max()) > 1e-3
    actual = mode(slope(function, implementation="reference", **options), x)
    assert_close("second derivative", actual, expected, 1e-10)


@pytest.mark.parametrize(
    ("op", "mode", "error", "message"),
    [
        ("prefix sum", forward_over_reverse, TypeError, "forward-mode"),
        ("evo", forward_over_reverse, TypeError, "forward-mode"),  # its causal form has prefix sums
    ],
)
def test_references_raise_where_they_have_none(op, mode, error, message):
    with pytest.raises(error, match=message):
        mode(slope(OPS[op][0], implementation="reference", **options_of(op, True)), X)


def test_softmax_attention_of_long_sequences_has_none_in_reverse_over_reverse():
    """Loops whose bounds are computed; 150 tokens need none."""
    gradient = slope(OPS["flash"][0], implementation="reference")
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.grad(lambda x: gradient(x).sum())(jnp.concatenate([X] * 4, 2))


@pytest.mark.parametrize("mode", [reverse_over_reverse, forward_over_reverse])
@pytest.mark.parametrize(("op", "causal"), BOTH)
def test_in_bfloat16_the_references_raise(op, causal, mode):
    """They slice and write bits, whose derivative would be 0."""
    with pytest.raises(NotImplementedError, match="second derivative in bfloat16"):
        mode(slope(OPS[op][0], implementation="reference", **options_of(op, causal)), X.astype("bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", [reverse_over_reverse, forward_over_reverse])
@pytest.mark.parametrize(("op", "causal"), [*BOTH, ("flash", True)])
def test_kernels_raise(op, causal, mode, dtype):
    gradient = slope(OPS[op][0], implementation="interpret", **options_of(op, causal))
    with pytest.raises(NotImplementedError, match=r"the kernel [a-z_]+ has first derivatives only, in reverse mode"):
        mode(gradient, X.astype(dtype))


def test_the_kernel_of_prefix_sums_has_them():
    function = evo_jax.prefix_sum
    actual, expected = (
        reverse_over_reverse(slope(lambda x, how=how: function(x, implementation=how) ** 2), X)
        for how in ("interpret", "reference")
    )
    assert_close("second derivative", actual, expected, 1e-5)
