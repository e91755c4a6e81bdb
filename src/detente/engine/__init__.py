"""From losses to the Gramian, and from coefficients to ``.grad``. Knows no method."""
