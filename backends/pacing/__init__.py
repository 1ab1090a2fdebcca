"""What ranks of one host share so that messages between them take what a model of a network says."""
