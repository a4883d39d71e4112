"""The training loop that `pretrain` and `sft` share. Imports nothing: `rows` and `places` need no torch."""
