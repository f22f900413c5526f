"""How a kernel is launched by default: block sizes and warps, from the head width and the dtype of its dot products.

tuned.py lays over these rules what was measured, and what a caller asks for.
"""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Launch:
    """Statics of one launch; every default below compiles without register spills (`make compile`)."""

    block_m: int  # rows (tokens) of one chunk: the step of the carry tables
    block_d: int  # columns of one program's tile; dot products loop over the width in these steps
    num_warps: int
    num_stages: int
    interpret: bool
    block_k: int = 128  # columns of one part of a row, where a kernel reads rows in parts
    repeats: int = 1  # chunks that one program of EvoAttention's forward takes, while it holds their weights

    def __post_init__(self) -> None:
        _check_tiles(self, ("block_m", "block_d", "block_k"))
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} must be at least 1")


def _check_tiles(launch: Any, names: tuple[str, ...], least: int = 16) -> None:
    for name in names:
        value = getattr(launch, name)
        if value < least or value & (value - 1):
            why = " (a tensor-core tile)" if least == 16 else ""
            raise ValueError(f"{name}={value} must be a power of two and at least {least}{why}")
    if launch.num_warps not in (1, 2, 4, 8, 16):
        raise ValueError(f"num_warps={launch.num_warps} must be 1, 2, 4, 8 or 16")
    if getattr(launch, "num_stages", 1) < 1:
        raise ValueError(f"num_stages={launch.num_stages} must be at least 1")


REPEATS = 8  # chunks of a program of EvoAttention on Hopper, whose products read kernels from shared memory
REPEAT_WAVES = 4  # fewest programs for each multiprocessor that are left then


def evo_launch(
    width: int,
    dot_dtype: str,
    *,
    interpret: bool,
    backward: bool = False,
    hopper: bool = False,
    tokens: int = 0,
    plain: bool = True,
) -> Launch:
    """The default launch for head width `width`, where all sequences and heads have so many `tokens`.

    Wider tiles read each row fewer times, until they spill registers. The forward holds 64 columns of bfloat16: then a
    width of 64 is one block, and is fused into three reads and one write. Everything else takes 32 columns where that
    (in float32 gradients: 64) divides the width, else 16, so that at most 15 columns are computed in vain. Eight warps
    give the backward's bfloat16 tiles room in registers (with four, one of them spilled on A100 with JAX 0.12's
    compiler). On Hopper that backward takes 64 columns and four warps, which an H200 ran a quarter faster, and a
    forward of a width of 16, 32, 64 or 128 takes several chunks a program: its kernels are four times what it reads
    of one, and a product waits for each. It is 64 columns and more only where the call is `plain`: no query, no rows
    that are masked or missing, more than one sequence or head. Anything else spills registers.
    """
    widest = 64 if dot_dtype == "bfloat16" and (hopper or not backward) else 32
    block_d = next(block for block in (widest, 32, 16) if width % block == 0 or block == 16)
    if dot_dtype == "float32" and backward and width % 64:
        block_d = 16  # an odd number of 32s spills on A100
    warps = 8 if dot_dtype == "bfloat16" and backward and block_d == 32 and not hopper else 4
    launch = Launch(block_m=64, block_d=block_d, num_warps=warps, num_stages=1, interpret=interpret)
    repeats = min(tokens // (REPEAT_WAVES * FILLED * launch.block_m), REPEATS)
    if not hopper or backward or dot_dtype != "bfloat16" or repeats < 2:
        return launch
    if width not in ((16, 32, 64, 128) if plain else (16, 32)):
        return launch
    return replace(launch, repeats=repeats, num_stages=2 if width <= 64 else 1)


FILLED = 128  # programs that occupy a GPU: about one for each multiprocessor of an H100 (132) or an A100 (108)
SEGMENT_WAVES = 4  # programs of each multiprocessor, once a sequence is cut: several are resident and hide waiting
SEGMENT_CHUNKS = 4  # fewest chunks of a segment: summing it first costs about a third of walking it


_LINEAR = {  # precision of dot products: tokens of a chunk (and where there is more to hold), most columns of a part
    "bf16": (64, 64, 64),
    "tf32": (32, 32, 32),
    "tf32x3": (32, 16, 16),
}


_LINEAR_HOPPER = {  # most columns of a row: tokens of a chunk, columns of a program, of a part, warps, stages
    "bf16": {64: (64, 64, 64, 4, 2), 128: (64, 32, 128, 4, 2)},
    "bf16 backward": {64: (64, 64, 64, 4, 2), 128: (64, 32, 128, 8, 3)},
    "bf16 more": {64: (64, 32, 64, 4, 2), 128: (64, 32, 64, 8, 2)},  # unless plain and causal
    "tf32x3": {64: (32, 64, 32, 8, 1)},
    "tf32x3 more": {},
}


def _linear_on_hopper(width: int, precision: str, plain: bool, backward: bool) -> Any:
    """A row of _LINEAR_HOPPER, or None."""
    names = (f"{precision} backward" if backward else "", precision) if plain else (f"{precision} more",)
    return _of_width(next((_LINEAR_HOPPER[name] for name in names if name in _LINEAR_HOPPER), {}), width)


def linear_launch(
    width: int,
    precision: str,
    *,
    plain: bool,
    causal: bool,
    interpret: bool,
    backward: bool = False,
    hopper: bool = False,
) -> Launch:
    """The default launch of a walk over rows of `width` columns.

    A program holds a state of (width, 32), so that 32 heads of width 128 give 128 programs, and reads rows in parts, at
    least two, that divide the width where it is a multiple of 16. The state has 16 columns where 32 do not divide the
    width, and where operands are split into three for TF32, in wide ones instead. The more numbers an operand is split
    into, the smaller its tiles are, and smaller still for a wide state, for sums over a whole sequence, and unless the
    call is `plain` (no rows, no groups, no sums of a softmax): anything larger spills registers. Causal float32 over a
    width of 128 is an exception, found by compiling: parts of 64. On Hopper: of what does not spill, what an H200 ran
    fastest, with no more columns of a program than leave 32 heads of width 128 without states in memory.
    """
    measured = _linear_on_hopper(width, precision, plain and causal, backward) if hopper else None
    if measured is not None:
        chunk, columns, part, warps, stages = measured
        return Launch(chunk, columns, warps, stages, interpret, part)
    chunk, small_chunk, widest = _LINEAR[precision]
    columns, wide, split = -(-width // 16) * 16, width > 128 and precision != "bf16", precision == "tf32x3"
    part = next(part for part in (64, 32, 16) if part == 16 or (part <= widest and columns % (2 * part) == 0))
    return Launch(
        block_m=min(chunk if plain else small_chunk, 16 if wide else 64 if causal else 32),
        block_d=16 if (wide if split else columns % 32) else 32,
        num_warps=8,
        num_stages=1,
        interpret=interpret,
        block_k=64 if wide and split and causal else part,
    )


def linear_segments(programs: int, chunks: int) -> int:
    """Into how many segments a sequence of `chunks` chunks is cut, each walked by a program of its own.

    One, where `programs` (heads and column tiles) fill the GPU without: then no state is held in memory. Otherwise as
    many as fill it SEGMENT_WAVES times, none shorter than SEGMENT_CHUNKS.
    """
    if programs >= FILLED:
        return 1
    wanted = min(-(-SEGMENT_WAVES * FILLED // max(programs, 1)), max(chunks // SEGMENT_CHUNKS, 1))
    steps = -(-chunks // wanted)
    return -(-chunks // steps)


@dataclass(frozen=True, slots=True)
class LinearStepLaunch:
    """Statics of one step of linear attention: the part of a state that a program holds, powers of two."""

    width: int
    columns: int
    num_warps: int
    interpret: bool

    def __post_init__(self) -> None:
        _check_tiles(self, ("width", "columns"), least=1)


def linear_step_launch(width: int, columns: int, *, interpret: bool) -> LinearStepLaunch:
    """The default launch for a state (width, columns): few columns, so that a few sequences already fill a GPU."""
    block = min(32, 1 << (columns - 1).bit_length())
    return LinearStepLaunch(1 << (width - 1).bit_length(), block, 4, interpret)


@dataclass(frozen=True, slots=True)
class PrefixLaunch:
    """Statics of one launch of a prefix sum: the most places and lanes of a program's tile, powers of two."""

    chunk: int
    block: int
    num_warps: int
    interpret: bool

    def __post_init__(self) -> None:
        _check_tiles(self, ("chunk", "block"), least=1)


def prefix_launch(last: bool, *, interpret: bool) -> PrefixLaunch:
    """The default launch: along the last axis a tile is long, to read whole cache lines."""
    return PrefixLaunch(1024, 4, 4, interpret) if last else PrefixLaunch(64, 64, 4, interpret)


def _held_as(precision: str) -> str:
    """Both 16-bit dtypes at once are multiplied as TF32, in float32 registers: launched as float32 is."""
    return "tf32x3" if precision == "tf32" else precision


@dataclass(frozen=True, slots=True)
class AttendLaunch:
    """Statics of one launch of softmax attention."""

    block_q: int  # queries of a tile
    block_k: int  # keys of a tile
    num_warps: int
    num_stages: int
    interpret: bool
    widest: int = 256  # most columns of one part of a row
    reread: bool = False  # rows are read wherever they are used, not held

    def __post_init__(self) -> None:
        _check_tiles(self, ("block_q", "block_k", "widest"))


def attend_launch(
    kind: str, width: int, precision: str, *, interpret: bool, load: str = "", hopper: bool = False
) -> AttendLaunch:
    """The default launch of "forward", "d_query", "d_key_value" or "d_bias".

    `width` is the wider of key and value. Where a program sums into so many registers that few are left, it holds no
    rows but reads them again wherever they are used: in the gradients of rows over 128 columns, 64 where operands are
    split into three for TF32, and in the forward over 256 and 128. `load` says what else takes registers: "scores"
    (bias, soft cap or dropout, for which the forward takes narrower tiles), "heads" (several in one program, or windows
    by head), "blocks" (scattered ones), "" (none of it). On Hopper the launches are those that an H200 ran fastest.
    """
    precision = _held_as(precision)
    split, forward = precision == "tf32x3", kind == "forward"
    measured = _of_width(_on_hopper(precision, kind, load), width) if hopper else None
    if measured is not None:
        q, k, warps, stages, widest, reread = measured
    else:
        q, k, warps, stages = _of_width(_ATTEND[precision][kind], width)
        reread = width > (128 if split else 256) // (1 if forward else 2)
        widest = 64 if reread else (32 if forward else 64) if split else 256
    if forward and load == "scores":
        k = min(k, 32)
    return AttendLaunch(q, k, warps, stages, interpret, widest, reread)


def _of_width(table: dict[int, Any], width: int) -> Any:
    """The row of the narrowest rows that are at least `width` wide, or None."""
    return next((row for size, row in table.items() if width <= size), None)


def _on_hopper(precision: str, kind: str, load: str) -> dict[int, Any]:
    """Rows for that load where there are such, else for less of it."""
    tables = _HOPPER[precision]
    loads = ("blocks", "more", "") if load == "blocks" else ("more", "") if load else ("",)
    names = [f"{kind} {name}".strip() for name in loads]
    return next((tables[name] for name in names if name in tables), {})


SPLIT_TILES = 4  # fewest tiles of keys of a split, lest its start and the merge cost more than it reads
SPLIT_WAVES = 8  # programs per multiprocessor: several are resident, and short ones leave no long tail


def decode_splits(programs: int, tiles: int) -> int:
    """Among how many programs the keys of one head are shared, where `programs` (heads, sequences) times that run.

    As many as fill the GPU SPLIT_WAVES times, none given fewer than SPLIT_TILES of `tiles`, the most that can be live.
    """
    return max(1, min(-(-SPLIT_WAVES * FILLED // max(programs, 1)), tiles // SPLIT_TILES))


def decode_rows(width: int, precision: str) -> int:
    """The most rows (queries of all heads of a group) that one program decodes without register spills."""
    return max(rows for columns, rows in _DECODE[_held_as(precision)] if width <= columns)


def decode_launch(width: int, precision: str, rows: int, *, interpret: bool) -> AttendLaunch:
    """The default launch of decoding for `rows` rows (queries of all heads of a group).

    Memory-bound: stages keep loads in flight, and the products' rows are as few as a tensor core's tile has.
    """
    block_q, precision = max(16, 1 << (rows - 1).bit_length()), _held_as(precision)
    table, widest = _DECODE[precision], 256
    if precision == "tf32x3":
        widest = 64 if block_q == 16 else 32
    keys, warps, stages = table[next(size for size in table if width <= size[0] and block_q <= size[1])]
    return AttendLaunch(block_q, keys, warps, stages, interpret, widest)


# Precision of dot products, (most columns, most rows): keys of a tile, warps, stages.
_DECODE = {
    "bf16": {(128, 16): (64, 4, 3), (256, 16): (32, 4, 3), (128, 64): (64, 8, 3), (256, 64): (32, 8, 3)},
    "fp16": {(128, 16): (64, 4, 3), (256, 16): (32, 4, 3), (128, 64): (64, 8, 3), (256, 64): (32, 8, 3)},
    "tf32x3": {
        **{(64, 16): (32, 4, 3), (128, 16): (16, 4, 3), (256, 16): (16, 8, 2)},
        **{(96, 64): (16, 4, 2), (128, 64): (16, 8, 2)},
    },
}

# Precision of dot products, kernel, most columns: queries and keys of a tile, warps, stages. A tensor-core product of
# Hopper needs 64 rows: queries, but keys in "d_key_value"; with fewer it is that of Ampere. Widths that are no power of
# two mask columns, which takes registers: most have rows of their own, up to 63, 127 and 255.
_ATTEND = {
    "bf16": {
        "forward": {
            **{32: (128, 64, 8, 2), 63: (128, 32, 8, 2), 128: (128, 64, 8, 2)},
            **{160: (64, 32, 8, 2), 255: (64, 16, 8, 2), 256: (64, 32, 8, 2)},
        },
        "d_query": {64: (128, 64, 8, 2), 127: (64, 32, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 2)},
        "d_key_value": {
            **{32: (64, 64, 8, 2), 64: (32, 64, 8, 2), 96: (16, 64, 8, 2), 127: (16, 64, 4, 2), 128: (32, 64, 8, 2)},
            **{256: (16, 32, 8, 2)},
        },
        "d_bias": {64: (64, 64, 8, 1), 128: (64, 32, 4, 1), 256: (64, 32, 8, 1)},
    },
    "fp16": {
        "forward": {
            **{32: (128, 64, 8, 2), 63: (128, 32, 8, 2), 128: (128, 64, 8, 2)},
            **{160: (64, 32, 8, 2), 255: (64, 16, 8, 2), 256: (64, 32, 8, 2)},
        },
        "d_query": {64: (64, 64, 8, 2), 128: (64, 32, 8, 2), 256: (64, 32, 8, 1)},
        "d_key_value": {
            **{64: (32, 64, 8, 2), 96: (16, 64, 8, 2), 127: (16, 64, 4, 2), 128: (16, 64, 8, 2), 256: (16, 32, 8, 1)},
        },
        "d_bias": {64: (64, 64, 8, 1), 128: (64, 32, 4, 1), 256: (64, 32, 8, 1)},
    },
    "tf32x3": {
        "forward": {64: (64, 32, 8, 2), 128: (64, 16, 8, 2), 256: (32, 16, 8, 2)},
        "d_query": {64: (64, 16, 8, 1), 256: (32, 16, 8, 1)},
        "d_key_value": {32: (32, 32, 8, 1), 63: (16, 32, 8, 1), 64: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
        "d_bias": {64: (32, 32, 8, 1), 256: (32, 16, 8, 1)},
    },
}

# Of what compiles for Hopper without spills, what an H200 ran fastest at widths of 64, 128 and 256: as above, then the
# most columns of a part of a row and whether rows are read again. Rows for others were chosen by compiling alone.
# "more": under any load; "blocks": under that of scattered ones. Four warps issue one product of 64 rows, whose scores
# and sums stay in their registers.
_HOPPER: dict[str, dict[str, dict[int, tuple[int, int, int, int, int, bool]]]] = {
    "bf16": {
        "forward": {128: (64, 64, 4, 3, 256, False), 256: (128, 64, 8, 2, 256, False)},
        "d_query": {
            **{64: (64, 64, 4, 2, 256, False), 128: (128, 64, 8, 3, 256, False)},
            **{256: (128, 32, 8, 2, 256, False)},
        },
        "d_key_value": {
            **{96: (64, 64, 4, 2, 256, False), 127: (32, 64, 4, 3, 256, False), 128: (64, 64, 4, 2, 256, False)},
            **{256: (64, 64, 8, 2, 64, True)},
        },
        "d_key_value more": {
            **{32: (64, 64, 4, 2, 256, False), 63: (32, 64, 4, 2, 256, False), 64: (64, 64, 4, 2, 256, False)},
            **{127: (32, 64, 8, 2, 256, False), 128: (32, 64, 4, 2, 256, False), 192: (64, 64, 8, 2, 64, True)},
            **{255: (32, 64, 8, 2, 64, True), 256: (64, 64, 8, 2, 64, True)},
        },
        "d_key_value blocks": {
            **{64: (32, 64, 4, 2, 256, False), 127: (32, 64, 8, 2, 256, False), 128: (32, 128, 8, 3, 256, False)},
            **{192: (64, 64, 8, 2, 64, True), 255: (32, 64, 8, 2, 64, True), 256: (64, 64, 8, 2, 64, True)},
        },
    },
    "fp16": {
        "forward": {128: (64, 64, 4, 3, 256, False), 256: (128, 64, 8, 2, 256, False)},
        "d_query": {
            **{64: (64, 64, 4, 2, 256, False), 128: (128, 64, 8, 3, 256, False)},
            **{256: (128, 32, 8, 2, 256, False)},
        },
        "d_query more": {64: (64, 64, 4, 2, 256, False), 128: (128, 64, 8, 3, 256, False)},
        "d_key_value": {
            **{64: (64, 64, 4, 2, 256, False), 128: (32, 128, 8, 2, 256, False), 192: (64, 64, 8, 2, 64, True)},
            **{255: (32, 64, 8, 2, 64, True), 256: (64, 64, 8, 2, 64, True)},
        },
        "d_key_value more": {
            **{64: (32, 64, 4, 2, 256, False), 96: (32, 128, 8, 2, 256, False), 127: (32, 64, 8, 1, 256, False)},
            **{128: (32, 128, 8, 2, 256, False), 256: (32, 64, 8, 2, 64, True)},
        },
        "d_key_value blocks": {64: (32, 64, 4, 2, 256, False), 128: (32, 64, 8, 2, 256, False)},
    },
    "tf32x3": {
        "forward": {
            **{32: (64, 64, 4, 1, 32, False), 63: (64, 32, 4, 1, 32, False), 64: (64, 64, 4, 1, 32, False)},
            **{128: (64, 32, 4, 1, 32, False)},
        },
        "d_query": {
            **{32: (64, 64, 4, 1, 64, False), 63: (64, 32, 4, 1, 64, False), 64: (64, 64, 4, 1, 64, False)},
            **{128: (64, 32, 4, 1, 64, True)},
        },
        "d_query blocks": {64: (64, 32, 4, 1, 64, False), 128: (64, 32, 4, 1, 64, True)},
        "d_key_value": {64: (32, 128, 8, 1, 64, False)},
    },
}
