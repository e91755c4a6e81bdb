"""The networks that the papers train, written here; each says which published parameter count it has."""
