"""What tools/quantize.py is made of. Read rounding.py, gptq.py and awq.py first.

Tested in tests/: test_quantize.py.
"""
