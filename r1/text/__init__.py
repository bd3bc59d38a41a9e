"""Tokenizers, chat templates, reasoning.

Tested in tests/: test_tokenizer.py.
"""
