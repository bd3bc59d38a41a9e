"""Checkpoints: config.json, safetensors, saving.

Tested in tests/: test_checkpoint.py, test_bad_files.py, test_hostile_files.py, test_saving.py,
test_foreign.py, test_families.py, test_transformers.py, for parts of tensors test_parallel.py, and
for experts that stay in files test_disk.py.
"""
