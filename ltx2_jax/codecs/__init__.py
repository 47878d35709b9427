"""Pixels and sound to latents and back: the networks at work, tiled, on devices, from files."""
