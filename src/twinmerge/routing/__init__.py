"""Features in, gate out: router heads, calibration and the fall-back."""
