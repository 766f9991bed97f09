"""A model: where it comes from, how sequences are packed for it, and what it computes of them."""
