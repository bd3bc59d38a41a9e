"""What is asked, what this machine can do, and what that makes.

Tested in tests/: test_bad_input.py, test_pairs.py, test_own_parts.py, test_own_files.py,
test_allreduce.py and test_conversation.py (--help).
"""
