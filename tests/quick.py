"""Compiler options for tests that each compile a small call once: optimising it would take most of their time."""

import jax

QUICK_COMPILE: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # a third of the rest; later compilers have no such option
    QUICK_COMPILE["xla_cpu_use_fusion_emitters"] = False
