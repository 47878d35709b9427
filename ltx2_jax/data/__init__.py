"""Clips and captions to records, and records to batches."""
