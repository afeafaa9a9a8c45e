"""One page about the heads of a model on one input: `overview.py` reads, `page.html.j2` shows; `regard inspect` runs it."""
