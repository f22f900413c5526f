"""What every test shares: the platform, strict dtype promotion, the `gpu` marker, float64 and the golden cases."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

GOLDEN_DIR = Path(__file__).resolve().parents[2] / "shared" / "golden"


def wants_gpu(config: pytest.Config) -> bool:
    """Whether this run was asked for GPU tests, as in `pytest -m gpu`."""
    marks = config.getoption("markexpr") or ""
    return "gpu" in marks and "not gpu" not in marks


def pytest_configure(config: pytest.Config) -> None:
    # Before anything imports jax; a platform that the caller chose stays.
    if not wants_gpu(config):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        _compile_quickly()
    import jax

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    gc.disable()  # a tenth of the time: traces are cyclic garbage by the million; `collected` sees to it instead


@pytest.fixture(autouse=True, scope="module")
def collected() -> Iterator[None]:
    """Garbage goes after every module of tests."""
    yield
    gc.collect()


def quick_environment() -> dict[str, str]:
    """The environment of a process that computes the same numbers as this one."""
    import jax

    quickly = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    quickly += " --xla_cpu_parallel_codegen_split_count=1"  # tests already keep all cores busy
    if jax.__version_info__ < (0, 11):  # later compilers have no such option
        quickly += " --xla_cpu_use_fusion_emitters=false"
    return os.environ | {"XLA_FLAGS": f"{quickly} {os.environ.get('XLA_FLAGS', '')}"}


def _compile_quickly() -> None:
    """Let XLA leave its code for the CPU unoptimised: most tests are compilations, and take a third of the time then.

    tests/test_optimised.py and what runs in a process of its own, as compilations for a GPU do, are not affected.
    """
    given = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = quick_environment()["XLA_FLAGS"]
    import jax

    jax.devices("cpu")  # XLA reads the variable once, here
    if given is None:
        del os.environ["XLA_FLAGS"]
    else:
        os.environ["XLA_FLAGS"] = given


def cuda_missing() -> str | None:
    """Why GPU tests cannot run here, or None where they can."""
    import jax

    if any(device.platform == "gpu" for device in jax.devices()):
        return None
    asked = os.environ.get("JAX_PLATFORMS")
    if asked and "cuda" not in asked and "gpu" not in asked:
        return f"JAX_PLATFORMS={asked}: GPU tests run under `pytest -m gpu` on a machine with a CUDA device"
    return f"JAX sees no CUDA device, only {jax.devices()}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    reason = cuda_missing() if gpu_tests else None
    for item in gpu_tests:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 and int64 within the test."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder with the original's recorded inputs and outputs, which is not part of this repository."""
    if not GOLDEN_DIR.is_dir():
        pytest.skip("the original's recorded cases are not beside this checkout (shared/golden)")
    return GOLDEN_DIR
