"""How good a model folder is: loss on text that it never saw."""
