"""Pallas kernels that lower to Triton on CUDA, each inside a custom_vjp. Imports jax and reference alone."""
