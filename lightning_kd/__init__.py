"""Task-specific knowledge distillation for PyTorch Lightning."""
