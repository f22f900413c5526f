"""The demo: a small byte-level language model, trained on the sources of the standard library."""
