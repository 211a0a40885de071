"""From raw text to clean documents that one can account for: read, clean, filter, deduplicate, write."""
