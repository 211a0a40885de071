"""Documents become tokens once; tokens become samples by arithmetic."""
