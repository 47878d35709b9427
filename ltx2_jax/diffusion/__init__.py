"""The diffusion process: pure functions of arrays and a velocity callable."""
