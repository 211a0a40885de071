"""Text from a model folder: open it, keep keys and values, choose the next token, stream what comes."""
