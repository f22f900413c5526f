"""The five layers of the complexity package as torch.nn.Modules: their keys, signatures and growing caches."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import torch
from jax import lax
from torch import Tensor
from torch.nn import Linear, Parameter
from torch.nn.functional import pad

from evo_jax import modules, shapes, softmax_modules
from evo_jax.interop.evo import as_bool
from evo_jax.interop.function import to_torch_function
from evo_jax.interop.state_dict import FULL_HEADS, NamedAsTheOriginals, Spec, assembled, plain, skeleton
from reference.linear_maps import LinearState

Pair = tuple[Tensor, Tensor]
_CONFIG = {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}


class TorchAttention(NamedAsTheOriginals):
    """What the five share: projections under the original's names, and one JAX program for a call.

    Args:
        hidden_size: width of the input and output; or the original's AttentionConfig, of which hidden_size,
            num_attention_heads, num_key_value_heads, head_dim and scale are read.
        num_heads: N query heads.
        num_kv_heads: K key/value heads, a divisor of N; None or 0 for N.
        head_dim: D; None for hidden_size / N.
        device, dtype: of the parameters.
        options: the other keyword arguments of the layer of the same name in evo_jax.

    Raises:
        ValueError: sizes that do not divide, and values out of range. TypeError: an unknown option.
    """

    kind: ClassVar[Any]
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    num_kv_heads: int

    def __init__(
        self,
        hidden_size: Any,
        num_heads: int | None = None,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__()
        sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        if not isinstance(hidden_size, int):
            names = {name: _CONFIG.get(name, name) for name in (*sizes, "scale")}
            sizes = {name: getattr(hidden_size, theirs) for name, theirs in names.items()}
        sizes["num_kv_heads"] = sizes["num_kv_heads"] or None
        if strange := [name for name in ("rngs", "param_dtype") if name in options]:
            raise TypeError(f"{type(self).__name__} takes no {strange[0]}: torch draws its parameters, of `dtype`")
        values = {n: tuple(x) if isinstance(x, list) else x for n, x in {**sizes, **options}.items()}
        self.spec = Spec(self.kind, tuple(sorted(values.items())))
        layer = skeleton(self.spec)
        self.hidden_size, self.num_heads = layer.hidden_size, layer.num_heads
        self.num_kv_heads, self.head_dim = layer.num_kv_heads, layer.head_dim
        wide, narrow = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        widths = {"q_proj": wide, "k_proj": narrow, "v_proj": narrow}
        for name, width in widths.items():
            setattr(self, name, Linear(self.hidden_size, width, bias=False, device=device, dtype=dtype))
        self.o_proj = Linear(wide, self.hidden_size, bias=False, device=device, dtype=dtype)
        has_sinks = getattr(layer, "sinks", None) is not None
        self.sinks = Parameter(torch.zeros(self.num_heads, device=device, dtype=dtype)) if has_sinks else None

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.spec.options if value is not None)

    def hints(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        wide = self.num_heads * self.head_dim
        full = self.num_kv_heads < self.num_heads and len(state_dict.get("k_proj.weight", ())) == wide
        return [FULL_HEADS] if full else []

    def weights(self) -> dict[str, Tensor]:
        """The parameters by their names."""
        found: dict[str, Tensor] = {}
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            layer = getattr(self, name)
            plain(op := type(self).__name__, name, layer, Linear)
            if layer.bias is not None:
                raise NotImplementedError(f"{op}: {name} has a bias, which this layer would not add")
            found[f"{name}.weight"] = layer.weight
        return found if self.sinks is None else {**found, "sinks": self.sinks}

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """As forward."""
        return super().__call__(*args, **kwargs)


class SoftmaxTwin(TorchAttention):
    """The forward pass of the four softmax layers, with the original's growing cache of keys and values."""

    window: int | None = None  # tokens that a cache keeps

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Pair | None = None,
        past_key_value: Pair | None = None,
        use_cache: bool = False,
        *,
        segment_ids: Tensor | None = None,
        implementation: str | None = None,
    ) -> tuple[Tensor, Pair | None]:
        """(B, n, hidden_size) -> ((B, n, hidden_size), (k, v) of all tokens so far, (B, S, K, D), or None).

        Args:
            hidden_states: the n new tokens.
            attention_mask: of all S tokens, the cached ones first: (B, S), (B, 1, S), (B, 1, S, 1) or, of keys,
                (B, 1, 1, S), 1 or True for a valid one, besides causality and pattern; the row of a masked token is 0.
                Or a mask of pairs, broadcastable to (B, N, n, S), bool (True = attend) or float (added to the scores),
                which takes the place of causality.
            position_embeddings: (cos, sin) of the new tokens' positions, (n, D), (B, n, D) or (1, n, 1, D).
            past_key_value: what an earlier call returned; the new tokens come after those in it, and see them.
            use_cache: return the cache. A sliding window keeps the last W tokens.
            segment_ids: (B, n) integers; a token sees its own segment alone. Not with past_key_value.
            implementation: None, "triton", "reference" or "interpret".

        Raises:
            ValueError: shapes that do not fit, a token mask with other values than 0 and 1, past_key_value with
                is_causal=False or segment_ids, or segment ids that int32 does not hold. TypeError: dtypes, or an
                unknown argument. NotImplementedError: a projection with a bias, hooks or a forward of its own.
        """
        tokens = shape_of(self, hidden_states)[1]
        past = None if past_key_value is None else self._past(past_key_value, hidden_states, segment_ids)
        length = 0 if past is None else past[0].shape[1]
        given = self._masks(attention_mask, hidden_states, length + tokens)
        if past is not None:
            given |= _padded(past, given, length, tokens)
        if self.training and dict[str, Any](self.spec.options).get("dropout_rate"):
            given["dropout_seed"] = torch.randint(2**31 - 1, (), dtype=torch.int32, device=hidden_states.device)
        if segment_ids is not None:
            given["segment_ids"] = segments(type(self).__name__, segment_ids)
        out, new = _softmax_attention(
            self.spec,
            self.weights(),
            hidden_states,
            position_embeddings,
            given,
            keep=bool(use_cache),
            implementation=implementation,
        )
        if new is not None and past is not None:
            new = [torch.cat([old.to(a.dtype), a], dim=1) for old, a in zip(past, new, strict=True)]
        if new is not None and self.window is not None:
            new = [a[:, -self.window :] for a in new]
        return out, None if new is None else (new[0], new[1])

    def _past(self, past: Pair, x: Tensor, segment_ids: Any) -> Pair:
        """The cache, checked."""
        op = type(self).__name__
        if segment_ids is not None or not dict(self.spec.options).get("is_causal", True):
            raise ValueError(f"{op}: past_key_value needs is_causal=True and no segment_ids")
        key, value = past
        if key.shape != value.shape or (key.shape[0], *key.shape[2:]) != (x.shape[0], self.num_kv_heads, self.head_dim):
            wanted = f"(B, S, K, D) = ({x.shape[0]}, S, {self.num_kv_heads}, {self.head_dim})"
            raise ValueError(
                f"{op}: past_key_value of {tuple(key.shape)}, {tuple(value.shape)} must be two of {wanted}"
            )
        return key, value

    def _masks(self, mask: Tensor | None, x: Tensor, total: int) -> dict[str, Tensor]:
        """The mask as `valid` (B, S) of tokens, or as `pairs`."""
        if mask is None:
            return {}
        op, batch = type(self).__name__, x.shape[0]
        of_keys = mask.ndim == 4 and mask.shape[1:3] == (1, 1) and not mask.is_floating_point()
        if mask.ndim == 4 and not of_keys and not (mask.shape[1::2] == (1, 1) and mask.shape[2] == total > 1):
            if mask.is_floating_point():
                shapes.additive(op, mask.detach().float().cpu().numpy())
            width, tokens = mask.shape[-1], x.shape[1]
            cut = self.window is not None and total > tokens and width > total  # of tokens that left the cache too
            if width not in (1, total) and not cut:
                full = (batch, self.num_heads, tokens, total)
                raise ValueError(
                    f"{op}: attention_mask.shape={tuple(mask.shape)} must broadcast to (B, N, n, S) = {full}"
                )
            return {"pairs": mask[..., -total:] if cut else mask}
        valid = as_bool(op, mask)
        valid = valid[:, 0, 0].expand(batch, -1) if of_keys else valid
        return {"valid": token_mask(op, valid, batch, total, cut=self.window is not None)}


def shape_of(layer: TorchAttention, x: Tensor) -> torch.Size:
    """The shape of hidden states, checked."""
    if x.ndim != 3 or x.shape[2] != layer.hidden_size:
        op = type(layer).__name__
        raise ValueError(f"{op}: hidden_states.shape={tuple(x.shape)} must be (B, L, {layer.hidden_size})")
    return x.shape


def segments(op: str, ids: Tensor) -> Tensor:
    """Segment ids as int32. Those of 64 bits are looked at, which waits for their device."""
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"{op}: segment_ids.dtype={ids.dtype} must be an integer dtype")
    if ids.dtype in (torch.int64, torch.uint32, torch.uint64):
        ids = ids.to(torch.int64)  # torch has no minimum of unsigned ones
        if ids.numel():
            shapes.within_int32(op, "segment_ids", *(int(n) for n in torch.aminmax(ids)))
    return ids.to(torch.int32)


def token_mask(op: str, mask: Tensor, batch: int, total: int, cut: bool) -> Tensor:
    """A mask of tokens as (B, S), its last S columns where the cache holds not all that there were."""
    flat = mask.reshape(batch, -1) if mask.shape[:1] == (batch,) else mask
    if tuple(mask.shape) not in ((batch, n := flat.shape[-1]), (batch, 1, n), (batch, 1, n, 1)) or n < total:
        raise ValueError(
            f"{op}: attention_mask.shape={tuple(mask.shape)} must be {shapes.MASK_SHAPES} with B={batch} and "
            f"L={total}, the cached tokens among them; a mask of pairs must have four axes, as mask[None, None] has"
        )
    if n > total and not cut:
        raise ValueError(f"{op}: attention_mask.shape={tuple(mask.shape)} has more than the L={total} tokens")
    return flat[:, n - total :]


def _padded(past: Pair, given: dict[str, Tensor], length: int, tokens: int) -> dict[str, Any]:
    """The cache with room for the new tokens, its size a power of two, so that few sizes are ever compiled."""
    total = length + tokens
    room = max(16, 1 << (total - 1).bit_length()) - total
    widened = {name: pad(mask, (0, room)) for name, mask in given.items() if mask.shape[-1] == total}
    key, value = (pad(a, (0, 0, 0, 0, 0, room + tokens)) for a in past)
    start = torch.full((key.shape[0],), length, dtype=torch.int32, device=key.device)
    return widened | {"past": (key, value, start)}


@to_torch_function
def _softmax_attention(
    spec: Spec, weights: Any, x: Any, rotary: Any, given: dict[str, Any], keep: bool, implementation: Any
):
    layer = assembled(spec, weights)
    query, key, value = layer.project(x, rotary)
    own = {name: given[name] for name in ("dropout_seed", "segment_ids") if name in given}
    seen, chosen = ((key, value), {}) if "past" not in given else _joined(given, key, value)
    chosen = {"is_causal": layer.is_causal, **own, **chosen, **_pairs(spec.kind.__name__, given, query)}
    if "valid" in given and "past" not in given:
        chosen["attention_mask"] = given["valid"]
    out = layer.attend(
        query,
        *seen,
        scale=layer.scale,
        logits_soft_cap=layer.logits_soft_cap,
        sinks=None if layer.sinks is None else layer.sinks[...],
        dropout_rate=layer.dropout_rate,
        implementation=implementation,
        **chosen,
    )
    return layer.merge(out), (key, value) if keep else None


def _joined(given: dict[str, Any], key: jax.Array, value: jax.Array) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """(keys and values with the new ones in their places, where the queries stand and which tokens exist)."""
    *past, start = given["past"]
    tokens, first = key.shape[1], start[0] if start.shape[0] else jnp.int32(0)
    seen = tuple(
        lax.dynamic_update_slice_in_dim(old.astype(new.dtype), new, first, axis=1)
        for old, new in zip(past, (key, value), strict=True)
    )
    chosen: dict[str, Any] = {"q_offset": start, "key_value_seq_lengths": start + tokens}
    if "valid" in given:
        ids = jnp.where(given["valid"], 0, -1).astype(jnp.int32)
        chosen["segment_ids"] = (lax.dynamic_slice_in_dim(ids, first, tokens, axis=1), ids)
    return seen, chosen


def _pairs(op: str, given: dict[str, Any], query: jax.Array) -> dict[str, Any]:
    """The options that a mask of pairs stands for: it takes the place of causality; a float one of keys does not."""
    if "pairs" not in given:
        return {}
    mask, floating = given["pairs"], jnp.issubdtype(given["pairs"].dtype, jnp.floating)
    if not floating and mask.dtype != bool:
        raise TypeError(f"{op}: attention_mask {mask.shape} of {mask.dtype.name}, of pairs, must be bool or float")
    of_keys = floating and mask.shape[2] == 1 and query.shape[1] > 1
    return {"bias" if floating else "mask": mask} | ({} if of_keys else {"is_causal": False})


class FlashAttention(SoftmaxTwin):
    """Torch twin of evo_jax.FlashAttention, under the original's keys; gives (output, cache).

    >>> import torch
    >>> from evo_jax.interop import FlashAttention
    >>> layer = FlashAttention(hidden_size=64, num_heads=4, num_kv_heads=2)
    >>> out, cache = layer(torch.randn(2, 10, 64), use_cache=True)
    >>> out, cache = layer(torch.randn(2, 1, 64), past_key_value=cache, use_cache=True)
    >>> out.shape, cache[0].shape
    (torch.Size([2, 1, 64]), torch.Size([2, 11, 2, 16]))
    """

    kind = softmax_modules.FlashAttention


class SlidingWindowAttention(SoftmaxTwin):
    """Torch twin of evo_jax.SlidingWindowAttention; its option is `window_size`, 4096. A cache keeps the last W."""

    kind = softmax_modules.SlidingWindowAttention

    def __init__(self, hidden_size: Any, num_heads: int | None = None, *, window_size: int = 4096, **options: Any):
        super().__init__(hidden_size, num_heads, window_size=window_size, **options)
        self.window = self.window_size = window_size


class SparseAttention(SoftmaxTwin):
    """Torch twin of evo_jax.SparseAttention; options `block_size`, `num_global_tokens`, `num_random_blocks`, `seed`.

    The original never looks at its random blocks: num_random_blocks=0 computes what it does.
    """

    kind = softmax_modules.SparseAttention


class MultiScaleAttention(SoftmaxTwin):
    """Torch twin of evo_jax.MultiScaleAttention; options `local_heads` and `window_sizes`."""

    kind = softmax_modules.MultiScaleAttention


class LinearAttention(TorchAttention):
    """Torch twin of evo_jax.LinearAttention; options `feature_map`, `scale`, `is_causal` and `eps`."""

    kind = modules.LinearAttention

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Pair | None = None,
        past_key_value: Pair | None = None,
        use_cache: bool = False,
        *,
        segment_ids: Tensor | None = None,
        implementation: str | None = None,
    ) -> tuple[Tensor, Pair | None]:
        """(B, n, hidden_size) -> ((B, n, hidden_size), the sums after these tokens or None).

        The cache is (sum of phi(k) v^T, (B, N, D, D); sum of phi(k), (B, N, 1, D)), float32 or float64, alike for the
        query heads that share a key/value head. Arguments and errors are those of FlashAttention, but that a mask is
        of tokens; with past_key_value its last n columns are those of the new tokens.
        """
        batch, tokens, _ = shape_of(self, hidden_states)
        if attention_mask is not None:
            mask = as_bool("LinearAttention", attention_mask)
            attention_mask = token_mask("LinearAttention", mask, batch, tokens, cut=past_key_value is not None)
        segment_ids = None if segment_ids is None else segments("LinearAttention", segment_ids)
        options = {"position_embeddings": position_embeddings, "segment_ids": segment_ids}
        options |= {"attention_mask": attention_mask, "implementation": implementation}
        return _linear_attention(
            self.spec, self.weights(), hidden_states, past_key_value, options, keep=bool(use_cache)
        )


@to_torch_function
def _linear_attention(spec: Spec, weights: Any, x: Any, past: Any, given: dict[str, Any], keep: bool):
    layer = assembled(spec, weights)
    group = layer.num_heads // layer.num_kv_heads
    dtype = shapes.widest(jnp.float32, x.dtype, *(w.dtype for w in weights.values()))
    state = layer.init_cache(x.shape[0], dtype=dtype) if keep else None
    if past is not None:
        state = LinearState(past[0][:, ::group], past[1][:, ::group, 0])
    out, after = layer(x, cache=state, **given)
    if not keep:
        return out, None
    return out, tuple(jnp.repeat(a, group, axis=1) for a in (after.kv, after.z[:, :, None]))
