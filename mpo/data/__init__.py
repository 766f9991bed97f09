"""Rows of text, and the examples that a tokenizer makes of them."""
