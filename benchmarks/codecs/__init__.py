"""What page contents lose at equal bytes, measured on the model in transformers."""
