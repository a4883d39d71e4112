"""Text to token ids and back: vocabularies, chat templates, encoders. Imports `batches` and `runtime`."""
