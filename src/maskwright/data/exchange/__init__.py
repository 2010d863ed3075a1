"""Formats of labelling tools and benchmarks other than COCO: one module for each, which reads and writes it.

`collecting` turns what a reader finds into a checked table, `files` finds and parses files, `outlines` converts shapes.
"""
