"""Prompt to clip: the compiled programs of sampling."""
