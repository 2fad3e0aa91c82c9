"""Annotators: image -> condition, for preparing data and for users."""
