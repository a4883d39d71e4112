"""Our training loop against transformers' own Trainer: same model, data and batch, measured side by side."""
