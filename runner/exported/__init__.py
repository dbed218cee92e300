"""`outlay export`: trained weights as a folder for others, dense or packed, with a card of how they came to be."""
