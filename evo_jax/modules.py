"""The layers as Flax nnx modules: EvoAttention, LinearAttention."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from evo_jax import padding, shapes
from evo_jax.evo import evo_attention, init_evo_params, init_evo_state
from evo_jax.linear import linear_attention
from evo_jax.projections import GroupedHeads, check_dtypes, check_rngs, promote
from evo_jax.stream import Streams
from reference.evo_params import EvoParams, EvoState
from reference.linear_maps import LinearState


class EvoAttention(Streams):
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
        ValueError: num_heads * head_dim is not embed_dim. TypeError: a dtype that is not a float, an out_proj that is
            no bool, or no nnx.Rngs.

    >>> import jax.numpy as jnp, evo_jax
    >>> from flax import nnx
    >>> layer = evo_jax.EvoAttention(embed_dim=64, num_heads=4, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 10, 64)), causal=True, attention_mask=None).shape
    (2, 10, 64)
    >>> first, cache = layer(jnp.ones((2, 7, 64)), cache=layer.init_cache(batch_size=2))
    >>> rest, cache = layer(jnp.ones((2, 3, 64)), cache=cache)
    >>> rest.shape, cache.sum.shape, cache.count.tolist()
    ((2, 3, 64), (2, 4, 16), [10, 10])
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
        check_dtypes("EvoAttention", dtype, param_dtype)
        check_rngs("EvoAttention", rngs)
        self.head_dim = shapes.head_width("EvoAttention", embed_dim, num_heads, head_dim)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.dtype, self.param_dtype = dtype, param_dtype
        for name, array in init_evo_params(rngs.params(), self.head_dim, self.param_dtype)._asdict().items():
            setattr(self, name, nnx.Param(array))
        options = {"dtype": dtype, "param_dtype": param_dtype, "promote_dtype": promote}
        own = shapes.boolean("EvoAttention", "out_proj", out_proj)
        self.out_proj = nnx.Linear(embed_dim, embed_dim, **options, rngs=rngs) if own else None

    @property
    def params(self) -> EvoParams:
        """The ten arrays that evo_attention takes."""
        return EvoParams(*(getattr(self, name)[...] for name in EvoParams._fields))

    def init_cache(self, batch_size: int, capacity: int | None = None, dtype: Any = None) -> EvoState:
        """The state before the first token, of a size that no sequence changes: `capacity` is not used.

        `dtype` is that of the computation (None: the layer's own, or else that of its parameters); sums are kept in it,
        but never in less than float32.
        """
        batch, dtype = state_sizes(self, batch_size, dtype)
        return init_evo_state(batch, self.num_heads, self.head_dim, dtype)

    def __call__(
        self,
        x: jax.Array,
        *,
        causal: bool = True,
        attention_mask: Any = None,
        cache: EvoState | None = None,
        **options: Any,
    ) -> Any:
        """(B, L, E) -> (B, L, E); with a cache, ((B, L, E), the cache after these tokens).

        Args:
            x: hidden states; with a cache, of the new tokens.
            causal: token t sees tokens up to t; False: every token sees all, and there can be no cache.
            attention_mask: (B, L), (B, 1, L) or (B, 1, L, 1), 1 for a valid token; masked rows of the output are 0.
            cache: what the tokens before left, from init_cache or an earlier call.
            options: mask_semantics, accum_dtype, block_m, num_warps, num_stages and implementation of evo_attention.

        Raises:
            ValueError: `x` is not (B, L, E), and whatever evo_attention raises.
        """
        x = shapes.hidden_states("EvoAttention", "x", x, self.embed_dim)
        batch, length, _ = x.shape
        x, *arrays = promote((x, *self.params), dtype=self.dtype)
        v = x.reshape(batch, length, self.num_heads, self.head_dim).swapaxes(1, 2)
        given = {} if cache is None else {"initial_state": cache, "return_state": True}
        out = evo_attention(v, EvoParams(*arrays), causal=causal, attention_mask=attention_mask, **given, **options)
        out, after = out if given else (out, None)
        out = out.swapaxes(1, 2).reshape(x.shape)
        out = out if self.out_proj is None else self._project(out, attention_mask, options)
        return (out, as_before(after, cache)) if given else out

    def _project(self, out: jax.Array, mask: Any, options: dict[str, Any]) -> jax.Array:
        """The output projection; its bias does not reach tokens that do not exist."""
        assert self.out_proj is not None
        projected = self.out_proj(out)
        if mask is None or options.get("mask_semantics", "padding") != "padding":
            return projected
        valid = padding.valid_tokens("EvoAttention", mask, *out.shape[:2])
        return jnp.where(valid[..., None], projected, jnp.zeros((), projected.dtype))


class LinearAttention(GroupedHeads):
    """Linear attention over (B, L, hidden_size): q, k, v and output projections around evo_jax.linear_attention.

    Its parameters are the projections of GroupedHeads. Source: "Transformers are RNNs" (Katharopoulos et al., 2020) and
    the complexity package.

    Args:
        hidden_size: width of the input and output.
        num_heads: N query heads.
        num_kv_heads: K key/value heads, a divisor of N; None for N.
        head_dim: D; None for hidden_size / N.
        scale: a factor on the queries before the feature map; None for 1.
        feature_map: "elu", "relu", "softmax" or a function, as in linear_attention.
        is_causal: token i sees tokens up to i; False: every token sees all.
        eps: added to the denominator.
        dtype: of the computation, to which input and parameters are cast; None promotes them together (Flax's rule).
        param_dtype: of the parameters.
        rngs: `nnx.Rngs` with a `params` (or default) stream; parameters are drawn here, not at the first call.

    Raises:
        ValueError: sizes that do not divide, an unknown feature map, eps that is negative, or eps or scale that is not
            finite. TypeError: a dtype that is not a float, an is_causal that is no bool, or no nnx.Rngs.

    >>> import jax.numpy as jnp, evo_jax
    >>> from flax import nnx
    >>> layer = evo_jax.LinearAttention(hidden_size=64, num_heads=4, num_kv_heads=2, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((2, 10, 64))
    >>> out, cache = layer(x)
    >>> out.shape, cache
    ((2, 10, 64), None)
    >>> first, cache = layer(x[:, :7], cache=layer.init_cache(batch_size=2))
    >>> rest, cache = layer(x[:, 7:], cache=cache)
    >>> bool(jnp.allclose(jnp.concatenate([first, rest], axis=1), out, atol=1e-5))
    True
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        scale: float | None = None,
        feature_map: str | Callable[[jax.Array], jax.Array] = "elu",
        is_causal: bool = True,
        eps: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shapes.feature_map(type(self).__name__, feature_map)
        super().__init__(
            hidden_size,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        op = type(self).__name__
        self.scale = shapes.scale(op, scale)
        self.feature_map, self.is_causal = feature_map, shapes.boolean(op, "is_causal", is_causal)
        self.eps = shapes.not_negative(op, "eps", eps)

    def init_cache(self, batch_size: int, capacity: int | None = None, dtype: Any = None) -> LinearState:
        """The state before the first token, of a size that no sequence changes: `capacity` is not used.

        `dtype` is that of the computation (None: the layer's own, or else that of its parameters); sums are kept in it,
        but never in less than float32.
        """
        (batch, dtype), heads, width = state_sizes(self, batch_size, dtype), self.num_kv_heads, self.head_dim
        features = width if isinstance(self.feature_map, str) else self._features(width)
        kv = jnp.zeros((batch, heads, features, width), dtype)
        return LinearState(kv, jnp.zeros((batch, heads, features), dtype))

    def _features(self, width: int) -> int:
        """How many features a function makes of D values."""
        assert callable(self.feature_map)
        return jax.eval_shape(self.feature_map, jax.ShapeDtypeStruct((1, 1, 1, width), jnp.float32)).shape[-1]

    def __call__(
        self,
        hidden_states: jax.Array,
        *,
        attention_mask: Any = None,
        position_embeddings: Any = None,
        segment_ids: Any = None,
        cache: LinearState | None = None,
        implementation: str | None = None,
    ) -> tuple[jax.Array, LinearState | None]:
        """(B, L, hidden_size) -> ((B, L, hidden_size), the cache after these tokens or None).

        Args:
            hidden_states: the new tokens.
            attention_mask: (B, L), (B, 1, L) or (B, 1, L, 1), 1 for a valid token; a masked one does not exist, and its
                output row is 0.
            position_embeddings: (cos, sin) of the new tokens' positions, (L, D), (B, L, D) or (1, L, 1, D), which turn
                queries and keys before the feature map.
            segment_ids: (B, L) integers; the sums start anew wherever the id changes; a negative id is no token.
            cache: what the tokens before left, from init_cache or an earlier call; the new tokens stay causal.
            implementation: None, "triton", "reference" or "interpret".

        Raises:
            ValueError: `hidden_states` is not (B, L, hidden_size), and whatever linear_attention raises.
        """
        if cache is not None and not self.is_causal:
            raise ValueError(
                "LinearAttention: cache= needs is_causal=True: a token in the cache sees none that come later"
            )
        query, key, value = self.project(hidden_states, position_embeddings)
        if self.scale is not None:
            query = query * jnp.asarray(self.scale, query.dtype)
        out, state = linear_attention(
            query,
            key,
            value,
            feature_map=self.feature_map,
            is_causal=self.is_causal,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            initial_state=cache,
            return_state=True,
            eps=self.eps,
            implementation=implementation,
        )
        return self.merge(out), None if cache is None else as_before(state, cache)


def state_sizes(layer: Any, batch_size: Any, dtype: Any) -> tuple[int, Any]:
    """(B, dtype of the sums) of a state to be made."""
    op = type(layer).__name__
    given = layer.dtype or layer.param_dtype if dtype is None else dtype
    dtype = shapes.widest(shapes.float_dtype(op, "dtype", given), jnp.float32)
    return shapes.at_least(op, "batch_size", batch_size, 0), dtype


def as_before(state: Any, cache: Any) -> Any:
    """The state in the dtypes that the cache came in, so that loops can carry it."""
    return jax.tree.map(lambda new, old: new.astype(old.dtype), state, cache)
