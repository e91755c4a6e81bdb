"""The comparison: does resolving conflicts help on this problem? Nothing outside this package imports it."""
