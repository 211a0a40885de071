"""An encoder's folder of a few kilobytes: a random BERT, and a WordPiece vocabulary."""

from __future__ import annotations

import string
from pathlib import Path

_WORDS = "a o menina trem rio cidade viu perdeu esperou caminho café".split()


def write_encoder(folder: Path) -> Path:
    """Let transformers write a random BERT with 24 positions, and its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir()
    letters = string.ascii_lowercase + string.digits
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters),
              *(word for word in _WORDS if len(word) > 1)]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=False, model_max_length=24).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(pieces), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=24, initializer_range=0.2)
    BertModel(config).save_pretrained(folder)
    return folder
