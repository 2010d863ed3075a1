"""Base classes and decoding that two or more systems share."""
