"""Checkpoints: config.json, safetensors, saving.

Tested in tests/: test_checkpoint.py, test_bad_files.py, test_hostile_files.py, test_saving.py,
test_foreign.py and test_transformers.py.
"""
