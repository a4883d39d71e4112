"""Objectives of the stages that learn from preferences (`rewardModel`, `dpo`), and their held-out measurements.

The objectives apply the formulas of `losses` to models and micro-batches as the training loop expects them. This
package also scores answers under the reference and caches the results on disk. It may import `losses`, `models`,
`samples`, `loop`, `engine`, `kernels` and everything below them.
"""
