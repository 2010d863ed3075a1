"""Servers: predictions over HTTP (extra `web`)."""
