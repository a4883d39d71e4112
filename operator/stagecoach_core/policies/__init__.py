"""Policies: small, pure rules that `decide` combines, one topic per module."""
