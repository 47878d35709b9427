"""What compiled programs do: their FLOPs, bytes, collectives and time, read from their text."""
