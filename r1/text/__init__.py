"""Tokenizers, chat templates, reasoning."""
