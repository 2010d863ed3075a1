"""Weights for maskwright: files only, which it finds by the entry point `maskwright.weights`."""
