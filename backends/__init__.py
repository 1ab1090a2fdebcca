"""One file, one communicator; optional packages are imported only in the file that needs them."""
