"""How a model is run: fused, decoding token by token, with its keys and values kept."""
