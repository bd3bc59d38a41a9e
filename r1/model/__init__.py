"""R1 itself: read it first. Tested in test_parity.py, test_properties.py, test_traps.py."""
