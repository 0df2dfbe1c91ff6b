"""Distillation losses: ``loss(student, teacher[, target]) -> scalar``, one per file."""
