"""The dual-stream transformer: start reading at transformer.py."""
