"""What programs need on TPU slices that are not here: `python -m ltx2_jax.plan` prints it."""
