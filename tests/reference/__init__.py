"""Slow float64 oracles: plain loops over task gradients g_i, in the papers' notation, sharing no helper with src."""
