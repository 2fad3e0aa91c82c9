"""Other people's weights into this project's folders."""
