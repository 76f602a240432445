"""Codecs that are fitted to a model, tc4, tc6 and tc8: pages of each head look their own way.

`tables` has what kernels know of a model, `tiles` what they do with tiles of pages, `attention` the
loops of attention, `kernels` what reads and writes single tokens, and `launch` launches that.
"""
