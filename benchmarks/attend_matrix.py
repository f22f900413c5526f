"""The softmax kernels at every width, dtype and kind of mask: more programs than the tests compile.

`python -m benchmarks.compile_report --configs benchmarks.attend_matrix --target h100 --target h200 --target a100`.
"""

from typing import Any

from benchmarks.compile_configs import Config, attention_build

WIDTHS = (64, 80, 96, 128, 256)
KINDS: dict[str, tuple[Any, ...]] = {  # operation, key/value heads, options
    "flash": ("flash_attention", 32, {}),
    "flash_full_grouped": ("flash_attention", 8, {"is_causal": False}),
    "sliding": ("sliding_window_attention", 32, {"window_size": 512}),
    "sparse": ("sparse_attention", 32, {}),
    "multiscale": ("multiscale_attention", 32, {}),
}

# Of the query's bytes: 2 MB forward and 8 MB with gradients for bfloat16 of width 128.
CONFIGS = [
    *(
        Config(f"{name}_forward", attention_build(op, heads, gradient=False, **options), ("bfloat16",), (128,), 0.03)
        for name, (op, heads, options) in KINDS.items()
    ),
    *(
        Config(f"{name}_gradient", attention_build(op, heads, **options), widths=WIDTHS, temp_ratio=0.12)
        for name, (op, heads, options) in KINDS.items()
    ),
]
