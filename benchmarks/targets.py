"""The GPUs that kernels are compiled for without a GPU: one row of facts each, printed as XLA's target description."""

import os
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Target:
    """What XLA must know of a device to compile for it; bandwidth in bytes/s, sizes in bytes.

    The last two are dense tensor-core operations per second as NVIDIA states them for the SXM boards.
    """

    description: str
    capability: tuple[int, int]
    core_count: int
    fpus_per_core: int
    shared_memory_per_core: int
    shared_memory_limit: int  # per block, opt-in: more than this does not launch
    l2_cache_size: int
    memory_bandwidth: int
    memory_size: int
    clock_rate_ghz: float
    peak_16_bit: float
    peak_tf32: float

    @property
    def peak_float32(self) -> float:
        """Operations per second without tensor cores: a fused multiply-add is two."""
        return 2e9 * self.core_count * self.fpus_per_core * self.clock_rate_ghz

    @property
    def proto(self) -> str:
        """The `target_config` text of `jax.experimental.topologies.get_topology_desc`."""
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_memory_per_core}
  threads_per_core_limit: 2048
  core_count: {self.core_count}
  fpus_per_core: {self.fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.memory_bandwidth}
  l2_cache_size: {self.l2_cache_size}
  clock_rate_ghz: {self.clock_rate_ghz}
  device_memory_size: {self.memory_size}
  shared_memory_per_block_optin: {self.shared_memory_limit}
  cuda_compute_capability {{ major: {self.capability[0]} minor: {self.capability[1]} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{self.description}"
"""


_H100 = Target(
    *("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 233472, 232448, 52428800, 3352320 * 10**6, 84929347584, 1.98),
    peak_16_bit=989.4e12,
    peak_tf32=494.7e12,
)
TARGETS: dict[str, Target] = {
    "h100": _H100,
    "h200": replace(
        _H100,
        description="NVIDIA H200",
        l2_cache_size=62914560,
        memory_bandwidth=4800 * 10**9,
        memory_size=150 * 10**9,
    ),
    "a100": Target(
        *("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 167936, 166912, 41943040, 2039 * 10**9, 85520809984, 1.41),
        peak_16_bit=312e12,
        peak_tf32=156e12,
    ),
}


def allow_no_gpu() -> None:
    """Let JAX's CUDA plugin load on a machine without cuDNN, which compiling does not need.

    The plugin reads the variable when JAX starts its backends, so this comes too late in a process that has run
    something already, unless that process was started with JAX_PLATFORMS=cpu or with the variable set.
    """
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
