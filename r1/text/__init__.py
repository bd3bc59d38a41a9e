"""Tokenizers, chat templates, reasoning.

Tested in tests/: test_tokenizer.py, and test_real_tokenizers.py with the published files.
"""
