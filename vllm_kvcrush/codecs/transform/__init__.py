"""Transform-coded pages: keys in unequal bits per component, values in equal ones.

The codec in one paragraph. If the operating point is local, a key is rotated back by the position
of its strip's first token. It is centred, and multiplied by a transform whose components are
uncorrelated and whose errors cost the model's output equally. All four components of a quad have
the same number of bits, 0 to 8; the bits are pooled over all layers and heads. A value is
multiplied by random signs and a Hadamard matrix, which makes its channels alike, and stored in
equal bits, 2 to 4 by head, with one 8-bit scale, with which it keeps its length: an error
that shrinks all values alike would not average out over many tokens. `tables.Tables` holds
what a model needs for it; `reference` is the plain-torch oracle of what the kernels do.

Shapes use L layers, H KV heads, n tokens, and key and value sizes D and Dv. Pure torch.
"""
