"""Operations of the model, one per file: the formula as `*_reference`, and the function that the model calls."""
