"""What the problems with a value for every pixel share."""
