"""require_cuda: an identity that traces anywhere but lowers for CUDA alone, so that a kernel fails clearly.

Whether an explicit `implementation="triton"` will meet a CUDA device is not known while tracing: the same trace may
be lowered for a machine elsewhere. It is known when lowering, so that is where the error is raised.
"""

from functools import partial
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def require_cuda(x: jax.Array, op: str) -> jax.Array:
    """`x` itself; NotImplementedError when lowered for anything but CUDA."""
    return _require_cuda.bind(x, op=op)


def _refuse(context: Any, *args: Any, op: str) -> Any:
    raise NotImplementedError(
        f"{op}: implementation='triton' needs a CUDA device and this computation is placed on another "
        f"(default backend: {jax.default_backend()}); use implementation=None or 'reference', or 'interpret' to run "
        "the kernel in Pallas' interpreter"
    )


_require_cuda = Primitive("evo_require_cuda")
_require_cuda.def_impl(lambda x, *, op: jax.jit(partial(require_cuda, op=op))(x))
_require_cuda.def_abstract_eval(lambda x, *, op: x)
mlir.register_lowering(_require_cuda, _refuse)
mlir.register_lowering(_require_cuda, lambda context, x, *, op: [x], platform="cuda")
ad.primitive_jvps[_require_cuda] = lambda primals, tangents, *, op: (require_cuda(*primals, op=op), tangents[0])
batching.primitive_batchers[_require_cuda] = lambda args, dims, *, op: (require_cuda(*args, op=op), dims[0])
