"""Films and sound, in and out of files: reading.py and writing.py alone know PyAV."""
