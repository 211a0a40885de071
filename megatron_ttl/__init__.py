"""Train small Llama-2 language models for the languages the big laboratories forget.

Shape legend, used in every comment of the package:

    b  micro batch        s  sequence           h  hidden size         f  intermediate size
    n  query heads        k  key/value heads    d  head size           v  vocabulary
    t  tensor-parallel degree
"""

__version__ = "0.1.0"
