"""Networks that make images, motion or text.

Belongs here: generators with the networks and losses that their training needs. Does not: walks in their codes (explain).
Look at: `ppgn.py`, an upconvolutional generator beside the encoder whose codes it turns into images.
"""
