"""Pure jax.numpy semantics: the oracles of every test and the fallback on any machine. Imports jax alone."""
