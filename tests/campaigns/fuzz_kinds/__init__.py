"""The kinds of inputs of the fuzz campaign."""
