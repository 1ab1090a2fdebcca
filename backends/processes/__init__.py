"""How ranks that are processes meet, learn that one of them is gone, and find out that they disagree."""
