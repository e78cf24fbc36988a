"""Draft vocabularies: token maps, what they are counted from, and which one is active."""
