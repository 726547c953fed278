"""Ways out: a frozen model in other formats."""
