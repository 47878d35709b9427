"""What `python -m ltx2_jax.bench` measures."""
