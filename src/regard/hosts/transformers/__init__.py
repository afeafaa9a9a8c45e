"""Models of transformers 5: attention by its registries, everything else by hooks; nothing of the library is changed."""

from regard.contract.optional import need

need("transformers", "hf")
