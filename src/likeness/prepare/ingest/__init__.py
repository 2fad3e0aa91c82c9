"""Import face datasets into prepared folders: each dataset format yields faces, and one writer writes them."""
