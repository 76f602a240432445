"""Transform-coded pages: keys in unequal bits per component, values in equal ones.

The codec in one paragraph. A key is, where the point says so, turned to how it looks from its
strip's first token, centred, and turned by a transform whose components are uncorrelated and whose
errors cost the model's output equally. Each four components share 0 to 8 bits; the bits are pooled
over all layers and heads. A value is turned by random signs and a Hadamard matrix, which makes its
channels alike, and stored in equal bits, 2 to 4 by head, with one 8-bit scale. `tables.Tables`
holds what a model needs for it; `reference` is the plain-torch oracle of what the kernels do.

Shapes use L layers, H KV heads, n tokens, and key and value sizes D and Dv. Pure torch.
"""
