"""How a matrix lies in memory.

Tested in tests/: test_checkpoint.py and test_traps.py.
"""
