"""The softmax kernels at every width, dtype and kind of mask: more programs than the tests compile.

`python -m benchmarks.compile_report --configs benchmarks.attend_matrix --target h100 --target h200 --target a100`.
"""

from benchmarks.compile_configs import Config, attention_build

WIDTHS = (64, 80, 96, 128, 256)
LIMIT = 0.12  # of the query's bytes: 8 MB for bfloat16 of width 128

CONFIGS = [
    Config(f"{name}_gradient", build, widths=WIDTHS, temp_ratio=LIMIT)
    for name, build in {
        "flash": attention_build("flash_attention"),
        "flash_full_grouped": attention_build("flash_attention", 8, is_causal=False),
        "sliding": attention_build("sliding_window_attention", window_size=512),
        "sparse": attention_build("sparse_attention"),
        "multiscale": attention_build("multiscale_attention"),
    }.items()
]
