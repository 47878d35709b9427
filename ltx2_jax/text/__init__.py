"""Prompts to what the transformer reads: the encoder, its cache, prompt enhancement."""
