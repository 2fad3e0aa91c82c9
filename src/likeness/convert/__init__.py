"""Convert released weights to folders of this project."""
