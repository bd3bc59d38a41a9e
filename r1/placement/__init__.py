"""Where a weight lies.

Nothing is here yet, so nothing is tested.
"""
