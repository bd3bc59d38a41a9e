"""How a step is called, and how text is made of steps.

Tested in tests/: test_generate.py, test_speculate.py, test_graphs.py, test_start_up.py and
test_gpu.py.
"""
