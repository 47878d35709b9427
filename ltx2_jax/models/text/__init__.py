"""Gemma, the features of its states, the connectors."""
