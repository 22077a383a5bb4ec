"""Gradient → optimizer."""

from dgc.train import wire

__all__ = ["wire"]
