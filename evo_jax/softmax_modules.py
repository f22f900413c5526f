"""The softmax family as Flax nnx modules: flash, sliding-window, block-sparse and multi-scale attention."""

import inspect
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from evo_jax import attention, attention_masks, cached_attention, shapes
from evo_jax.cache import KVCache, MultiScaleCache, RingCache
from evo_jax.cached_attention import Group, Layout
from evo_jax.projections import GroupedHeads
from evo_jax.signatures import spelled_out
from reference.mask import FAR, window_runs


class SoftmaxOptions(TypedDict, total=False):
    """What the constructors of the softmax family share.

    num_kv_heads: K key/value heads, a divisor of the query heads N; None for N.
    head_dim: D; None for hidden_size / N.
    scale: factor of the scores; None for 1 / sqrt(D).
    is_causal: token i sees tokens up to i; False: the pattern alone decides.
    logits_soft_cap: c bends scores to c * tanh(score / c).
    sinks: learn one more score per head, the parameter `sinks` (N,), drawn as 0, that takes part in the softmax.
    dropout_rate: of the attention weights, in calls that are given a dropout_seed.
    dtype: of the computation, to which input and parameters are cast; None promotes them together (Flax's rule).
    param_dtype: of the parameters.
    rngs: `nnx.Rngs` with a `params` (or default) stream; parameters are drawn here, not at the first call. Required.
    """

    num_kv_heads: int | None
    head_dim: int | None
    scale: float | None
    is_causal: bool
    logits_soft_cap: float | None
    sinks: bool
    dropout_rate: float
    dtype: Any
    param_dtype: Any
    rngs: nnx.Rngs


_spelled_out = spelled_out(
    SoftmaxOptions,
    is_causal=True,
    sinks=False,
    dropout_rate=0.0,
    param_dtype=jnp.float32,
    rngs=inspect.Parameter.empty,
)


class SoftmaxAttention(GroupedHeads):
    """Projections around one of the functions of evo_jax.attention, which `attend` of each kind calls."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        scale: float | None = None,
        is_causal: bool = True,
        logits_soft_cap: float | None = None,
        sinks: bool = False,
        dropout_rate: float = 0.0,
        **projections: Any,
    ):
        op = type(self).__name__
        super().__init__(hidden_size, num_heads, **projections)
        self.scale, self.is_causal = shapes.scale(op, scale), shapes.boolean(op, "is_causal", is_causal)
        self.logits_soft_cap = shapes.soft_cap(op, logits_soft_cap)
        self.dropout_rate = shapes.dropout_rate(op, dropout_rate)
        own = shapes.boolean(op, "sinks", sinks)
        self.sinks = nnx.Param(jnp.zeros((num_heads,), self.param_dtype)) if own else None

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
        """(B, L, N, D) of one kind of attention."""
        raise NotImplementedError(f"{type(self).__name__} must say which attention it is")

    def attend_to_all(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
        """The same of the heads without a window, over a cache."""
        return self.attend(query, key, value, **options)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many tokens a head sees: one number for all, or one for each; None: no limit."""
        return (None,)

    def _layout(self) -> Layout:
        group = self.num_heads // self.num_kv_heads
        runs = window_runs(self.windows, self.num_heads, group)
        groups = tuple(Group((a, b), (a // group, -(-b // group)), window) for a, b, window in runs)
        return Layout(type(self).__name__, groups, split=len(self.windows) > 1)

    def init_cache(self, batch_size: int, capacity: int | None = None, dtype: Any = None) -> Any:
        """The cache before the first token, for calls with `cache=`.

        Args:
            batch_size: B.
            capacity: most tokens of a sequence; needed unless every head has a window, whose cache never fills.
            dtype: of the keys and values kept; None for the layer's `dtype`, or else `param_dtype`.

        Returns:
            A KVCache, or for a sliding window a RingCache, or for multi-scale attention a MultiScaleCache of both.

        Raises:
            ValueError: no capacity, or sizes below 1. TypeError: a dtype that is not a float.
        """
        op = type(self).__name__
        dtype = shapes.float_dtype(op, "dtype", self.dtype or self.param_dtype if dtype is None else dtype)
        return cached_attention.init(self._layout(), batch_size, capacity, self.head_dim, dtype)

    def __call__(
        self,
        hidden_states: jax.Array,
        *,
        attention_mask: Any = None,
        position_embeddings: Any = None,
        segment_ids: Any = None,
        cache: KVCache | RingCache | MultiScaleCache | None = None,
        dropout_seed: Any = None,
        implementation: str | None = None,
    ) -> tuple[jax.Array, Any]:
        """(B, L, hidden_size) -> ((B, L, hidden_size), the cache with these tokens or None).

        Args:
            hidden_states: the tokens; with a cache, the new ones.
            attention_mask: (B, L), (B, 1, L), (B, 1, L, 1) or, of keys, (B, 1, 1, L): 1 or True for a valid token,
                besides causality and pattern; the row of a masked token is 0. Or a mask of pairs, broadcastable to (B,
                N, L, L), bool (True = attend) or float (added to the scores), which takes the place of causality.
                One of float that holds only 0 and 1 is refused: it was meant as bool.
            position_embeddings: (cos, sin) of the tokens' positions, (L, D), (B, L, D) or (1, L, 1, D), as from
                evo_jax.rotary_embedding, which turn queries and keys.
            segment_ids: (B, L) integers; a token sees its own segment alone, and a negative id is no token.
            cache: what the tokens before left, from init_cache or an earlier call; the new tokens see them too, and
                come after them. `attention_mask` is then of the new tokens, of which a masked one takes no slot and no
                position; or, with a KVCache, a mask of pairs of them with all tokens, the cached ones first.
            dropout_seed: an integer or scalar array of one; without it nothing is dropped.
            implementation: None, "triton", "reference" or "interpret".

        Raises:
            ValueError: `hidden_states` is not (B, L, hidden_size), a cache with too little room (if that is not known
                while tracing: rows of NaN, and a cache that keeps what it has), a cache together with
                is_causal=False, segment_ids or dropout_seed, and whatever the function raises.
        """
        op = type(self).__name__
        query, key, value = self.project(hidden_states, position_embeddings)
        if cache is not None:
            self._check_cached(segment_ids, dropout_seed)
            sinks = None if self.sinks is None else self.sinks[...]
            options = {"scale": self.scale, "logits_soft_cap": self.logits_soft_cap, "sinks": sinks}
            options["implementation"] = implementation
            out, cache = cached_attention.attend(
                self._layout(), self.attend_to_all, (query, key, value), cache, attention_mask, options
            )
            return self.merge(out), cache
        options = {"is_causal": self.is_causal} | attention_masks.of_module(op, attention_mask, query.shape)
        out = self.attend(
            query,
            key,
            value,
            segment_ids=segment_ids,
            scale=self.scale,
            logits_soft_cap=self.logits_soft_cap,
            sinks=None if self.sinks is None else self.sinks[...],
            dropout_rate=self.dropout_rate,
            dropout_seed=dropout_seed,
            implementation=implementation,
            **options,
        )
        return self.merge(out), None

    def _check_stream(self, cache: Any, count: Any) -> None:
        groups = cache.groups if isinstance(cache, MultiScaleCache) else (cache,)
        cached_attention.check_room(type(self).__name__, list(groups), count)

    def _check_cached(self, segment_ids: Any, dropout_seed: Any) -> None:
        """ValueError for what a cache cannot serve."""
        op = type(self).__name__
        if not self.is_causal:
            raise ValueError(f"{op}: cache= needs is_causal=True: a token in the cache sees none that come later")
        for name, value in (("segment_ids", segment_ids), ("dropout_seed", dropout_seed)):
            if value is not None:
                raise ValueError(f"{op}: {name} cannot be given together with cache=")


class FlashAttention(SoftmaxAttention):
    """Softmax attention over (B, L, hidden_size) in O(L) memory: projections around evo_jax.flash_attention.

    Args:
        hidden_size: width of the input and output.
        num_heads: N query heads.
        options: those of SoftmaxOptions; its parameters are the projections of GroupedHeads, and `sinks`.

    Raises:
        ValueError: sizes that do not divide, or scale, logits_soft_cap or dropout_rate out of range. TypeError: a dtype
            that is not a float, or an option that is unknown or of another type.

    >>> import jax.numpy as jnp, evo_jax
    >>> from flax import nnx
    >>> layer = evo_jax.FlashAttention(hidden_size=64, num_heads=4, num_kv_heads=2, rngs=nnx.Rngs(0))
    >>> out, cache = layer(jnp.ones((2, 10, 64)), position_embeddings=evo_jax.rotary_embedding(jnp.arange(10), 16))
    >>> out.shape
    (2, 10, 64)
    """

    @_spelled_out
    def __init__(self, hidden_size: int, num_heads: int, **options: Unpack[SoftmaxOptions]):
        super().__init__(hidden_size, num_heads, **options)

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
        """evo_jax.flash_attention."""
        return attention.flash_attention(query, key, value, **options)


class SlidingWindowAttention(SoftmaxAttention):
    """Attention over the last `window_size` tokens, the current one included: evo_jax.sliding_window_attention.

    Args, parameters and errors are those of FlashAttention, and `window_size` >= 1; with is_causal=False the window
    reaches to both sides.
    """

    @_spelled_out
    def __init__(self, hidden_size: int, num_heads: int, *, window_size: int = 4096, **options: Unpack[SoftmaxOptions]):
        super().__init__(hidden_size, num_heads, **options)
        self.window_size = shapes.at_least(type(self).__name__, "window_size", window_size, 1)

    @property
    def windows(self) -> tuple[int | None, ...]:
        return (self.window_size,)

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
        """evo_jax.sliding_window_attention."""
        return attention.sliding_window_attention(query, key, value, window_size=self.window_size, **options)


class SparseAttention(SoftmaxAttention):
    """Block-sparse attention: a band, global tokens and random blocks, as in evo_jax.sparse_attention.

    Args, parameters and errors are those of FlashAttention, and `block_size`, `num_global_tokens`, `num_random_blocks`
    and the `seed` that draws them.
    """

    @_spelled_out
    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        block_size: int = 64,
        num_global_tokens: int = 1,
        num_random_blocks: int = 3,
        seed: int = 0,
        **options: Unpack[SoftmaxOptions],
    ):
        super().__init__(hidden_size, num_heads, **options)
        attention.sparse_pattern(type(self).__name__, block_size, num_global_tokens, num_random_blocks, seed)
        self.block_size, self.num_global_tokens = block_size, num_global_tokens
        self.num_random_blocks, self.seed = num_random_blocks, seed

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
        """evo_jax.sparse_attention."""
        return attention.sparse_attention(
            query,
            key,
            value,
            block_size=self.block_size,
            num_global_tokens=self.num_global_tokens,
            num_random_blocks=self.num_random_blocks,
            seed=self.seed,
            **options,
        )


class MultiScaleAttention(SoftmaxAttention):
    """Heads of different reach, the first with windows and the others with none: evo_jax.multiscale_attention.

    Args, parameters and errors are those of FlashAttention, and `local_heads` (None for half of the heads) and
    `window_sizes`.
    """

    @_spelled_out
    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        local_heads: int | None = None,
        window_sizes: tuple[int, ...] = attention.DEFAULT_WINDOWS,
        **options: Unpack[SoftmaxOptions],
    ):
        super().__init__(hidden_size, num_heads, **options)
        attention.head_windows(type(self).__name__, num_heads, local_heads, window_sizes)
        self.local_heads, self.window_sizes = local_heads, tuple(window_sizes)

    @property
    def windows(self) -> tuple[int | None, ...]:
        op = type(self).__name__
        reach = attention.head_windows(op, self.num_heads, self.local_heads, self.window_sizes)
        return tuple(None if left == FAR else left + 1 for left, _ in reach)

    def attend_to_all(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
        """evo_jax.flash_attention."""
        return attention.flash_attention(query, key, value, **options)

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
        """evo_jax.multiscale_attention."""
        return attention.multiscale_attention(
            query, key, value, local_heads=self.local_heads, window_sizes=self.window_sizes, **options
        )
