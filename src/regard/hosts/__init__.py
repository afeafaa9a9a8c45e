"""Where queries, keys, scores, caches, tokens and logits lie in models of other libraries.

Belongs here: a folder for each library, which turns its models into the sites of `contract/attach`; tape and patch, which
work on any host.
Does not: what is done at a site (steer) or read from it (explain).
Look at: `transformers/session.py`.
"""
