"""Any pile of face pictures into a prepared folder: a layout says what faces there are, one writer writes them."""
