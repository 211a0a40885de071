"""What is a duplicate: the table [dedup] of a corpus file."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class DedupSettings(BaseModel):
    """Which copies are found, and which one stays."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False,
                              use_attribute_docstrings=True)

    exact: bool = True
    """Drop documents whose normalised text (NFC, case folded, white space collapsed, punctuation kept) is there already."""
    near: bool = True
    """Drop documents that share a band of their MinHash signature with one that stays, or with one in its cluster."""
    bands: int = Field(default=14, ge=1, le=256)
    """Bands of a signature (b). Two documents of Jaccard similarity s are found with probability 1 - (1 - s^r)^b."""
    rows: int = Field(default=8, ge=1, le=64)
    """Hashes of a band (r)."""
    shingle_words: int = Field(default=5, ge=1, le=64)
    """Words of a shingle; similarity is that of the sets of shingles. Punctuation is left out."""
    min_words: int = Field(default=10, ge=1)
    """Shorter documents are compared exactly and not nearly."""
    min_similarity: float = Field(default=0.0, ge=0, le=1)
    """Share of equal hashes that two documents need beside a common band; 0 asks for none and keeps no signatures."""
    paragraphs: bool = True
    """Remove paragraphs (split at blank lines) that stand in many documents from all but the first."""
    paragraph_min_characters: int = Field(default=200, ge=1)
    """Shorter paragraphs stay: headings and formulas repeat by right."""
    paragraph_min_documents: int = Field(default=3, ge=2)
    """Documents in which a paragraph must stand to be removed."""
    prefer: tuple[str, ...] = ()
    """Sources whose documents stay before those of others, the best first. Among equals the first of the input stays."""

    @property
    def num_hashes(self) -> int:
        """Hashes of a signature."""
        return self.bands * self.rows

    @model_validator(mode="after")
    def _fits(self) -> DedupSettings:
        if self.near and self.min_words < self.shingle_words:
            raise ValueError(f"min_words: is {self.min_words}; it must be at least shingle_words ({self.shingle_words}), "
                             "for a shorter document has no shingle; raise it")
        if len(set(self.prefer)) < len(self.prefer):
            raise ValueError("prefer: names a source twice; each has one place in the order; remove the second")
        return self
