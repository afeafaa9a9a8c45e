"""Tasks on text: what comes next."""
