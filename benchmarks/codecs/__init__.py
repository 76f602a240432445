"""Measures what page contents lose at equal bytes, on the model in transformers."""
