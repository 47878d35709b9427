"""Files to batches: media in and out, synthetic clips, records, and the Grain pipeline."""
