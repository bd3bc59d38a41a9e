"""Checkpoints: config.json, safetensors, saving."""
