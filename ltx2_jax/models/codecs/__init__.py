"""VAEs, vocoders, upsamplers, and how they are tiled."""
