"""What a model does on rows that are measured."""
