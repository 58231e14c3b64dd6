"""`polyvit-fast check`: every file decoded, and what was found."""
