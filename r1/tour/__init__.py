"""`python -m r1.tour`: one prompt through the model, every shape by name and number.

Tested in tests/test_tour.py.
"""
