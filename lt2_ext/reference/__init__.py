"""The oracles: plain PyTorch in any dtype, written like the equations. May import: torch only."""
