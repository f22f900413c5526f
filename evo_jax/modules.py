"""The layers as Flax nnx modules: EvoAttention."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from evo_jax import padding, shapes
from evo_jax.evo import evo_attention, init_evo_params
from reference.evo_params import EvoParams


class EvoAttention(nnx.Module):
    """EvoAttention over (B, L, E): heads of width D = E / H share one set of D x D weights, and do not mix.

    The parameters are the ten arrays of EvoParams, each an nnx.Param under its own name, and those of `out_proj`.
    nnx.scan, nnx.vmap, nnx.remat and jax.jit apply to it as to any module. Source: the evo-attn package.

    Args:
        embed_dim: E.
        num_heads: H; H * head_dim must be E.
        head_dim: D; None for E / H.
        out_proj: add a linear (E, E) output projection, which mixes the heads.
        dtype: of the computation, to which input and parameters are cast; None promotes them together (Flax's rule).
        param_dtype: of the parameters.
        rngs: `nnx.Rngs` with a `params` (or default) stream; parameters are drawn here, not at the first call.

    Raises:
        ValueError: num_heads * head_dim is not embed_dim. TypeError: a dtype that is not a float.

    >>> import jax.numpy as jnp, evo_jax
    >>> from flax import nnx
    >>> layer = evo_jax.EvoAttention(embed_dim=64, num_heads=4, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 10, 64)), causal=True, attention_mask=None).shape
    (2, 10, 64)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        out_proj: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.head_dim = check_arguments(embed_dim, num_heads, head_dim, dtype, param_dtype)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.dtype, self.param_dtype = dtype, param_dtype
        for name, array in init_evo_params(rngs.params(), self.head_dim, self.param_dtype)._asdict().items():
            setattr(self, name, nnx.Param(array))
        options = {"dtype": dtype, "param_dtype": param_dtype, "promote_dtype": _promote}
        self.out_proj = nnx.Linear(embed_dim, embed_dim, **options, rngs=rngs) if out_proj else None

    @property
    def params(self) -> EvoParams:
        """The ten arrays that evo_attention takes."""
        return EvoParams(*(getattr(self, name)[...] for name in EvoParams._fields))

    def __call__(self, x: jax.Array, *, causal: bool = True, attention_mask: Any = None, **options: Any) -> jax.Array:
        """(B, L, E) -> (B, L, E).

        Args:
            x: hidden states.
            causal: token t sees tokens up to t; False: every token sees all.
            attention_mask: (B, L), (B, 1, L) or (B, 1, L, 1), 1 for a valid token; masked rows of the output are 0.
            options: mask_semantics, accum_dtype, block_m, num_warps, num_stages and implementation of evo_attention.

        Raises:
            ValueError: `x` is not (B, L, E), and whatever evo_attention raises.
        """
        x = shapes.float_array("EvoAttention", "x", x)
        if x.ndim != 3 or x.shape[2] != self.embed_dim:
            raise ValueError(f"EvoAttention: {x.shape=} must be (B, L, E) with E = embed_dim = {self.embed_dim}")
        batch, length, _ = x.shape
        x, *arrays = _promote((x, *self.params), dtype=self.dtype)
        v = x.reshape(batch, length, self.num_heads, self.head_dim).swapaxes(1, 2)
        out = evo_attention(v, EvoParams(*arrays), causal=causal, attention_mask=attention_mask, **options)
        out = out.swapaxes(1, 2).reshape(x.shape)
        return out if self.out_proj is None else self._project(out, attention_mask, options)

    def _project(self, out: jax.Array, mask: Any, options: dict[str, Any]) -> jax.Array:
        """The output projection; its bias does not reach tokens that do not exist."""
        assert self.out_proj is not None
        projected = self.out_proj(out)
        if mask is None or options.get("mask_semantics", "padding") != "padding":
            return projected
        valid = padding.valid_tokens("EvoAttention", mask, *out.shape[:2])
        return jnp.where(valid[..., None], projected, jnp.zeros((), projected.dtype))


def check_arguments(embed_dim: int, num_heads: int, head_dim: int | None, dtype: Any, param_dtype: Any) -> int:
    """The head width of an EvoAttention with these arguments, or the error that says why there is none."""
    for name, value in (("dtype", dtype), ("param_dtype", param_dtype)):
        if value is not None or name == "param_dtype":
            shapes.float_dtype("EvoAttention", name, value)
    return shapes.head_width("EvoAttention", embed_dim, num_heads, head_dim)


def _promote(arrays: Any, *, dtype: Any = None, **_: Any) -> tuple[Any, ...]:
    """Flax's promote_dtype, which also works where strict dtype promotion is on; None stays None."""
    if dtype is None:
        dtype = shapes.widest(*(a.dtype for a in arrays if a is not None))
    return tuple(None if a is None else a.astype(dtype) for a in arrays)
