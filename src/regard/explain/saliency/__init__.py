"""Which places of an image an answer hangs on."""
