"""Which launches are fastest on this GPU: candidates are checked, timed in turns, and the best ones stored."""

import datetime
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from evo_jax._version import __version__
from evo_jax.backend import aligned, on_arrays
from pallas_kernels import tuned, tuned_store
from pallas_kernels.tuned import Key

ROUNDS = 7
SAMPLE = 0.01  # seconds that a sample of the default lasts at least
GAIN = 1.02  # a candidate must be this much faster than the default: less is noise
# Relative error of a row of results, in L2: some roundings of the dtype, and TF32 x 3 with sums in another order.
TOLERANCE = {"bfloat16": 2**-6, "float16": 2**-8, "float32": 2**-10, "float64": 2**-10}
SWEPT_MASKS = {"attend_decode": "causal+rows16", "prefix": "inner"}  # of benchmarks.sweep's programs; else "causal"

Fields = dict[str, Any]
Call = Callable[[list[Any]], Any]


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was found for one key; seconds are medians of the whole function's calls."""

    key: Key
    default: Fields
    best: Fields  # the default again where nothing is faster
    default_seconds: float
    seconds: float
    tried: int
    rejected: tuple[tuple[Fields, str], ...]  # and why

    @property
    def gain(self) -> float:
        """How many times faster the function is than under the default."""
        return self.default_seconds / self.seconds


@dataclass(frozen=True, slots=True)
class TuneReport:
    """What autotune() returns; printed as a table."""

    device: str
    rows: tuple[Tuned, ...]

    def __str__(self) -> str:
        if not self.rows:
            return "no kernel was launched whose launch is not the caller's own"
        head = ("launch", "default", "best", "tried", "rejected", "default ms", "best ms", "gain")
        return aligned([head, *map(_row, self.rows)])


def autotune(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> TuneReport:
    """Find and store the fastest launches of the kernels in `fn(*args, **kwargs)` on this process's CUDA device.

    `fn` is traced and compiled as jax.jit would, once for each candidate, so a single operation with its gradient is a
    better argument than a training step. Array arguments may be jax.ShapeDtypeStruct: then they are drawn. All are put
    on the first CUDA device, wherever they lie. One kernel is tuned after the other; a candidate counts only if its
    results are the default's, up to rounding; EvoAttention's are judged on positive values, where it is
    well-conditioned. Where no candidates were compiled beforehand for just this kernel, dtype,
    mask and architecture, the nearest of its dtype are tried, if any; EVO_AUTOTUNE=1 leaves the default there.

    What is found holds for this device, these dtypes and head widths, lengths up to the next power of two, and this
    version of the kernels and of JAX, in all later processes; in this one, for what is traced from now on
    (jax.clear_caches()).

    Results lie in EVO_CACHE_DIR, else in evo-jax under XDG_CACHE_HOME (~/.cache).

    Raises:
        RuntimeError: JAX sees no CUDA device.
    """
    return tune(*on_arrays(fn, args, kwargs))


def tune(
    call: Call, arrays: Sequence[Any], progress: Callable[[str], None] = lambda text: None, *, asked: bool = True
) -> TuneReport:
    """autotune() of call(arrays); `progress` is told what is timed next.

    Where nobody `asked` for it, what has a result stays as it is, and only launches are tried that were compiled for
    just this case: a program that the compiler does not survive would end the user's process.
    """
    device = tuned_store.device_kind()
    if device is None:
        raise RuntimeError("autotune times kernels on a GPU, and JAX sees no CUDA device")
    rows: list[Tuned] = []
    with jax.default_device(tuned_store.device()):
        found = tunable(call, arrays)
        if not asked:
            found = {key: x for key, x in found.items() if not tuned_store.has(key) and candidates(key, x, exact=True)}
        arrays = _placed(arrays) if found else []
        for key, default in found.items():
            progress(str(key))
            settled = {row.key: row.best for row in rows}
            rows.append(_tune_key(key, default, call, arrays, settled, exact=not asked))
            _save(device, rows[-1])
    return TuneReport(device, tuple(rows))


def tunable(call: Call, arrays: Sequence[Any]) -> dict[Key, Fields]:
    """The default launches in call(arrays), found by tracing it alone; without those that the caller chose."""
    with tuned.override(stored=False), tuned.recording() as launches:
        jax.eval_shape(call, list(arrays))
    return {key: tuned.fields_of(key, c.default) for key, c in launches.items() if c.source != "caller"}


def candidates(key: Key, default: Fields, exact: bool = False) -> list[Fields]:
    """What benchmarks.sweep found to compile without spills, for rows as wide as these or the next wider ones.

    `exact`: for this architecture, precision and mask; nothing for others. Else for the nearest that were swept: what
    spills is slow, and what does not compile is rejected. Prefix sums along the last axis have no near ones.
    """
    if key.mask != SWEPT_MASKS.get(key.kernel, "causal") and (exact or key.kernel == "prefix"):
        return []
    swept = _nearest(key)
    if exact and key.precision not in (swept, "bfloat16", "float32"):
        return []
    rows = [row for row in _shipped() if row["kernel"] == key.kernel and row["precision"] == swept]
    same = [row for row in rows if row["arch"] == _arch(exact)]
    wider = [row for row in (same if exact else same or rows) if row["width"] >= key.width]
    if not wider:
        return []
    found = min(wider, key=lambda row: row["width"])["candidates"]
    launches = [{name: value for name, value in launch.items() if name in default} for launch in found]
    return [launch for launch in launches if {**default, **launch} != default]


def _nearest(key: Key) -> str:
    """Of the precisions that are swept; a prefix sum's is a dtype."""
    if key.kernel == "prefix":
        return "tf32x3" if jnp.dtype(key.precision).itemsize >= 4 else "bf16"
    return {"tf32": "tf32x3", "fp16": "bf16"}.get(key.precision, key.precision)


def _tune_key(
    key: Key, default: Fields, call: Call, arrays: list[Any], settled: dict[Any, Fields], *, exact: bool
) -> Tuned:
    """Of the candidates whose results hold, the fastest; `settled` are the launches of other keys, found before."""
    tried, rejected = candidates(key, default, exact), []
    judged = [_positive(n, x) for n, x in enumerate(arrays)] if tried and key.kernel.startswith("evo_") else arrays
    runs: dict[int, Callable[..., Any]] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        begun = {-1: _compiled(call, arrays, {**settled, key: default}, pool)}
        for number, launch in enumerate(tried):
            begun[number] = _compiled(call, arrays, {**settled, key: {**default, **launch}}, pool)
        runs[-1] = begun.pop(-1)
        expected = runs[-1](judged)
        for number, run in begun.items():
            launch = tried[number]
            try:
                fault = difference(run(judged), expected)
            except Exception as error:  # too much shared memory, too few registers: the compiler has many names for it
                rejected.append((launch, in_a_line(error)))
                continue
            if fault is None:
                runs[number] = run
                continue
            rejected.append((launch, fault))
            warnings.warn(f"autotune rejects {launch} for {key}: {fault}", RuntimeWarning, stacklevel=2)
    seconds = timed(runs)
    best = min(seconds, key=lambda number: seconds[number])
    best = best if seconds[-1] >= GAIN * seconds[best] else -1
    launch = default if best < 0 else {**default, **tried[best]}
    return Tuned(key, default, launch, seconds[-1], seconds[best], len(tried), tuple(rejected))


def _compiled(call: Call, arrays: list[Any], launches: dict[Any, Fields], pool: Executor) -> Callable[..., Any]:
    """call(arrays), traced here and compiled in `pool`, where compilers let each other run.

    The function returned takes other arrays of the same types, or none for these, and raises what the compiler did.
    Kernels that are not among `launches` run as they would for the caller, from what is stored.
    """
    try:
        with tuned.override(launches):
            lowered = jax.jit(lambda arrays: call(arrays)).lower(arrays)
        compiling = pool.submit(lowered.compile)
    except Exception as error:
        compiling = Future()
        compiling.set_exception(error)
    return lambda given=arrays: compiling.result()(given)


def in_a_line(error: BaseException) -> str:
    """Its kind and its first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def difference(actual: Any, expected: Any) -> str | None:
    """What of a candidate's results is not the default's, or None: each row, along the last axis, by its own error.

    A whole array's error would hide a wrong row among thousands. Rows of next to nothing count as large as an
    average row: they are differences of larger numbers. Everything is finite where the default's result is.
    """
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for number, (a, b) in enumerate(pairs):
        if b.size == 0 or b.dtype == jax.dtypes.float0:
            continue
        if not jnp.issubdtype(b.dtype, jnp.inexact):
            if not _same(a, b):
                return f"result {number} differs"
            continue
        limit = TOLERANCE.get(b.dtype.name, TOLERANCE["float32"])
        finite, worst, beyond = jax.device_get(_errors(a, b, limit))
        if not finite:
            return f"result {number} is not finite"
        if beyond:
            return f"result {number} is off by {worst:.1e} in a row, {limit:.1e} allowed; {beyond} rows are"
    return None


@jax.jit
def _same(actual: jax.Array, expected: jax.Array) -> jax.Array:
    return (actual == expected).all()


@jax.jit
def _errors(actual: jax.Array, expected: jax.Array, limit: float) -> tuple[jax.Array, ...]:
    """(all finite, largest error of a row, rows beyond `limit`), on the arrays' device."""
    wide = expected.dtype if expected.dtype.itemsize >= 4 else jnp.float32
    actual, expected = jnp.atleast_1d(actual), jnp.atleast_1d(expected)
    same = actual == expected  # infinities among them
    kept = jnp.where(jnp.isfinite(expected), expected, 0).astype(wide)
    off = jnp.where(same, 0, actual).astype(wide) - jnp.where(same, 0, expected).astype(wide)
    unit = jnp.maximum(jnp.abs(kept).max(), 1e-30)  # lest squares overflow, or vanish
    size, error = (jnp.sqrt(((jnp.abs(x) / unit) ** 2).reshape(-1, x.shape[-1]).sum(1)) for x in (kept, off))
    mean = jnp.maximum(jnp.sqrt((size**2).mean()), 1e-30)
    rows = error / jnp.maximum(size, mean)
    return jnp.isfinite(off).all(), rows.max(), (rows > limit).sum()


def _positive(number: int, x: jax.Array) -> jax.Array:
    """|x| times random factors from 1/2 to 3/2: what Evo's candidates are judged on.

    Sums of numbers of one sign stay away from 0, where Evo's denominators magnify rounding without bound and its
    gradient jumps. The factors see to it that no gradient is 0 but for rounding, as that of a LayerNorm's square is.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    factors = jax.random.uniform(jax.random.key(number), x.shape, jnp.float32, 0.5, 1.5)
    return jnp.where(jnp.isfinite(x), jnp.abs(x) * factors.astype(x.dtype), x)


def timed(runs: dict[int, Callable[..., Any]]) -> dict[int, float]:
    """Median seconds of a call of each; rounds take turns, so that what else the GPU does hits all alike."""
    for run in runs.values():
        jax.block_until_ready(run())
    calls = max(1, min(1000, math.ceil(SAMPLE / max(_seconds(runs[-1], 1), 1e-9))))
    samples: dict[int, list[float]] = {number: [] for number in runs}
    for _ in range(ROUNDS):
        for number, run in runs.items():
            samples[number].append(_seconds(run, calls))
    return {number: statistics.median(sample) for number, sample in samples.items()}


def _seconds(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    out = None
    for _ in range(calls):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


def _save(device: str, row: Tuned) -> None:
    """A folder that cannot be written costs the memory of what was found, not the caller's call."""
    facts = {"seconds": row.seconds, "default_seconds": row.default_seconds, "evo_jax": __version__}
    try:
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        tuned_store.save(device, row.key, row.best, {**facts, "date": date})
    except (OSError, RuntimeError) as error:  # the latter: there is no home
        warnings.warn(f"autotune cannot store what it found: {error}", RuntimeWarning, stacklevel=2)


def _placed(arrays: Sequence[Any]) -> list[Any]:
    """On the device that is tuned for, drawn where they are shapes alone."""
    return [jax.device_put(_drawn(number, x), tuned_store.device()) for number, x in enumerate(arrays)]


def _drawn(number: int, x: Any) -> Any:
    """`x`, or an array like it: normal numbers, smaller in a matrix of weights; ones; True."""
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.ones(x.shape, x.dtype)
    scale = x.shape[0] ** -0.5 if len(x.shape) == 2 else 1.0
    return (scale * jax.random.normal(jax.random.key(number), x.shape, jnp.float32)).astype(x.dtype)


def _arch(exact: bool) -> str:
    """This device's architecture, as "sm_90"; or the nearest that was swept: that from Hopper on, else "sm_80"."""
    capability = float(jax.devices("cuda")[0].compute_capability)
    return f"sm_{10 * capability:.0f}" if exact else "sm_90" if capability >= 9 else "sm_80"


@cache
def _shipped() -> list[dict[str, Any]]:
    return json.loads((tuned_store.tables() / "candidates.json").read_text(encoding="utf-8"))["rows"]


def _row(row: Tuned) -> tuple[str, ...]:
    changed = {name: value for name, value in row.best.items() if value != row.default[name]}
    figures = (f"{1e3 * row.default_seconds:.3f}", f"{1e3 * row.seconds:.3f}", f"{row.gain:.2f}x")
    return (str(row.key), _text(row.default), _text(changed) or "-", str(row.tried), str(len(row.rejected)), *figures)


def _text(fields: Fields) -> str:
    return " ".join(f"{name}={value}" for name, value in fields.items())
