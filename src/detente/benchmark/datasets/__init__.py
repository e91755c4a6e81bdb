"""Readers of the data sets that the papers use: official files, official layout, nothing ever unpickled or run."""
