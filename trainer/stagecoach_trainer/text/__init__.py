"""Text to tokens and back: vocabularies and templates."""
