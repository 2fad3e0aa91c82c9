"""A request in, a portrait out: the pipelines, their loading, and the record inside every picture."""
