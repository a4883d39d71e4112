"""Proximal policy optimisation (arXiv 1707.06347, 2203.02155): generate answers, score them, check guards, update.

`loop` runs the updates, `rollout` fills an update's pool of experiences, `objectives` defines the two losses. This
package may import `rewards`, `generation`, `losses`, `models`, `samples`, `loop`, `engine` and everything below them.
"""
