"""Engines: one file per implementation of the protocol in `base`."""
