"""Kinds of systems: what a system can do beyond instance segmentation, as base classes."""
