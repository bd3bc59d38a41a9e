"""R1 itself: what a newcomer reads first.

Tested in tests/: test_parity.py, test_properties.py and test_traps.py.
"""
