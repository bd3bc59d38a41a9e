"""How a matrix lies in memory.

Tested in tests/: test_checkpoint.py, test_activations.py and test_traps.py.
"""
