"""What `evaluate` measures, one module each; `export` uses the generation."""
