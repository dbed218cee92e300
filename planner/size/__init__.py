"""What to rent or buy: hardware and strategy over the whole catalog, or the largest model a budget trains."""
