"""The built-in problems; each is a module of the same form as a user's own problem file."""
