"""Losses and estimators of preference learning and PPO, as functions of tensors.

No input or output, no models, no state: this package imports torch, numpy and the standard library only, and every
formula cites its paper. `align` and `ppo` turn these functions into objectives that the training loop can minimise.
"""
