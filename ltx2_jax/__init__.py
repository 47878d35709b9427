"""LTX-2 in JAX: joint audio-video diffusion, from one CPU core to a TPU pod."""
