"""The mathematics of alignment: losses and estimators on tensors, without input or output. Imports nothing."""
