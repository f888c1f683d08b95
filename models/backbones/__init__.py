"""2-D networks that turn frames into feature vectors and offer slots for temporal modules. One paper a file."""
