"""The Llama-2 decoder and its arithmetic. Knows nothing of data, layouts or engines."""
