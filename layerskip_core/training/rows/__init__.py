"""What a model is trained on: rows of token ids, their order, and what the model itself writes."""
