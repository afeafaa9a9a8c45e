"""Which keys and values are kept while a model writes."""
