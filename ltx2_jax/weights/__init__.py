"""Released weights to our tree and back: the only place that knows official names and layouts."""
