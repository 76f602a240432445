"""Codecs on the device, a module each."""
