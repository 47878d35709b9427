"""What a clip is worth: onsets, lags, contact sheets. Needs no model."""
