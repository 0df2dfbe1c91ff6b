"""lightning_kd.tasks."""
