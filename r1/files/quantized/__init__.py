"""Quantized weights as other programs publish them: what config.json says, what the tensors are.

Read `declared.py` (config.json), then `recognize.py` (the table of formats), then any format.
Tested in tests/: test_published.py and test_bad_files.py.
"""
