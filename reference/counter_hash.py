"""Random numbers as a function of counters: the same in every implementation, whatever order it works in."""

from typing import Any

import numpy as np

_STEPS = ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, None))


def mixed(x: Any) -> Any:
    """A bijection of uint32 whose output bits each depend on all input bits (the `lowbias32` constants of C. Wellons).

    Takes arrays of NumPy or JAX, also inside a kernel.
    """
    for shift, factor in _STEPS:
        x = x ^ (x >> np.uint32(shift))
        x = x if factor is None else x * np.uint32(factor)
    return x
