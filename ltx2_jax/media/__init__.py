"""Films and sound, in and out of files: media.py alone knows PyAV, the others are arithmetic."""
