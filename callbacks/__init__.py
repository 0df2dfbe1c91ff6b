"""lightning_kd.callbacks."""
