"""Consolidated safetensors checkpoints in the layout of the model's library."""
