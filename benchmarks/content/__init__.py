"""Measures whether `auto` loses no more than any codec that takes as much memory."""
