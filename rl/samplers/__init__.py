"""Samplers: token in, token out. One protocol, one file an engine."""
