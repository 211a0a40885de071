"""Text becomes ids and ids become text again: SentencePiece BPE with byte fallback."""
