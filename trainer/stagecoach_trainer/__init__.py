"""What runs inside a stage: one module per stage kind, one training loop. torch lives only here."""
