"""Captions of a prepared folder: by a vision-language model that is checked, or by a grammar over known attributes."""
