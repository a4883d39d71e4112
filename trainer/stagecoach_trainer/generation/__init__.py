"""Generation of answers: by transformers' `generate` for reports, and by a batched sampler for PPO.

This package may import `models`, `samples`, `text`, `batches` and everything below them.
"""
